"""Which numbers TensorBoard gets, and the charts that bring many of them together.

TensorBoard gives every tag a chart of its own. What can be read at a glance depends on how many layers
there are, so the limits below do; the time that TensorBoard needs to load them is printed by
`benchmarks/tensorboard_scale.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from ww_train import LayerReport, Report

EACH = 64
"""Up to so many layers every metric of every layer is logged; above, only alpha."""

ALPHAS = 1024
"""Up to so many layers alpha of each is logged; above, quantiles and figures only."""

FEW = 12
"""Up to so many layers share a chart; with more, quantiles and a histogram over them are logged."""

MOST_KINDS = 12
"""Most charts of layers of one kind."""

QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}

METRICS: Mapping[str, str] = {
    "alpha": "alpha",
    "erg_gap": "ERG gap",
    "trace_log": "trace-log",
    "traps": "traps",
    "distance": "distance to criticality",
}
"""Metrics of a layer, `ww_<metric>/<layer>`, and their titles."""

_VALUES: dict[str, Callable[[LayerReport], float | None]] = {
    "alpha": lambda layer: layer.alpha,
    "erg_gap": lambda layer: layer.ERG_gap,
    "trace_log": lambda layer: layer.trace_log,
}

Charts: TypeAlias = dict[str, list[str | list[str]]]
"""Kind and tags of a chart, by title."""

Layout: TypeAlias = dict[str, Charts]
"""What `SummaryWriter.add_custom_scalars` takes: categories of charts."""


def chosen(scalars: Mapping[str, float], layers: int) -> dict[str, float]:
    """The scalars that TensorBoard can show of a model with so many layers.

    Args:
        scalars: Tags and numbers as from `SpectralMonitor.boundary`.
        layers: Number of layers in the model.
    """
    if layers <= EACH:
        return dict(scalars)
    groups = ("ww/", "ww_alpha/") if layers <= ALPHAS else ("ww/",)
    return {tag: value for tag, value in scalars.items() if tag.startswith(groups)}


def bands(report: Report) -> dict[str, float]:
    """Quantiles over all layers and, of alpha, over the layers of each kind; {} for few layers.

    The tags are `ww_bands/<metric>_<quantile>` and `ww_kinds/<kind>_<quantile>`.
    """
    if len(report) <= FEW:
        return {}
    tags: dict[str, float] = {}
    for metric in _VALUES:
        tags |= _quantiles(_band(metric), [_value(layer, metric) for layer in report])
    for kind, places in kinds([layer.name for layer in report]).items():
        alphas = [_value(report.layers[place], "alpha") for place in places]
        tags |= _quantiles(_band_of_kind(kind), alphas)
    return tags


def alphas(report: Report) -> list[float]:
    """Alpha of the layers that have one, in model order."""
    return [x for layer in report if not math.isnan(x := _value(layer, "alpha"))]


def layout(names: Sequence[str], metrics: Collection[str]) -> Layout:
    """The charts of the page "Custom scalars" for a model with layers of these names.

    Up to `FEW` layers all of them in one chart a metric. TensorBoard gives all lines of a run the same
    colour, so that with more layers there are bands of quantiles instead: of each metric, and of alpha
    over the layers of one kind, such as every q_proj.

    Args:
        names: The layers.
        metrics: Which of `METRICS` are logged.
    """
    if len(names) <= FEW:
        lines: Charts = {
            title: ["Multiline", [f"ww_{metric}/"]]
            for metric, title in METRICS.items()
            if metric in metrics
        }
        return {"ww: layers": lines}
    # TensorBoard shows the last chart of a band first
    charts: Layout = {
        "ww: median and 80 % of all layers": {
            METRICS[metric]: _margin(_band(metric)) for metric in reversed(_VALUES)
        }
    }
    by_kind = kinds(names)
    if by_kind:
        charts["ww: alpha, median and 80 % of the layers of a kind"] = {
            f"{kind} ({len(places)})": _margin(_band_of_kind(kind))
            for kind, places in reversed(by_kind.items())
        }
    return charts


def kinds(names: Sequence[str]) -> dict[str, list[int]]:
    """Kinds of layers and the positions of their layers; {} if there are not two kinds.

    The kind of "blocks.3.attn.q_proj" is "q_proj": the last part of a path that is no number. If there
    are more than `MOST_KINDS`, numbers at the end of a part do not count: "fc1" and "fc2" are "fc". Of
    still more the most frequent are taken. A single layer makes no kind.
    """
    found = [_kind(name) for name in names]
    if len(set(found)) > MOST_KINDS:
        found = [kind.rstrip("0123456789") for kind in found]
    places: dict[str, list[int]] = {}
    for place, kind in enumerate(found):
        places.setdefault(kind, []).append(place)
    frequent = sorted(places, key=lambda kind: -len(places[kind]))[:MOST_KINDS]
    shown = {
        kind or "numbered": where
        for kind, where in places.items()
        if kind in frequent and len(where) > 1
    }
    return shown if len(shown) > 1 else {}


def _kind(name: str) -> str:
    path = re.sub(r"(\[\d+\])+$", "", name).split(".")
    return next((part for part in reversed(path) if not part.isdigit()), "")


def _value(layer: LayerReport, metric: str) -> float:
    """NaN for what a layer does not have."""
    value = _VALUES[metric](layer)
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _quantiles(tags: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return {}
    return dict(zip(tags, np.quantile(known, list(QUANTILES.values())).tolist(), strict=True))


def _band(metric: str) -> list[str]:
    return [f"ww_bands/{metric}_{quantile}" for quantile in QUANTILES]


def _band_of_kind(kind: str) -> list[str]:
    return [f"ww_kinds/{kind}_{quantile}" for quantile in QUANTILES]


def _margin(band: Sequence[str]) -> list[str | list[str]]:
    low, median, high = band
    return ["Margin", [median, low, high]]
