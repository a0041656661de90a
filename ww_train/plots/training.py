"""Figures of training: one metric of all layers over the epochs.

Both functions take records as in `SpectralMonitor.history` of the callbacks, return a
`matplotlib.figure.Figure` and draw into the Axes `ax` if they are given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ww_train.plots.model import NAMED_LAYERS, NO_ALPHA
from ww_train.plots.style import (
    BLUE,
    INK,
    alpha_range,
    dress,
    every_nth,
    figure_of,
    inches,
    label,
    legend_right,
    message,
    new_axes,
    shade_safe_zone,
    short_labels,
)
from ww_train.power_law import OVER_TRAINED
from ww_train.spectrum import Array

METRICS = ("alpha", "erg_gap", "trace_log", "traps", "distance")
"""What the monitor of the callbacks records for each layer, as `ww_<metric>/<layer>`."""

CENTRES = {"alpha": OVER_TRAINED}
"""Where the colours of a heat map are neutral, if not at zero."""

Records = Sequence[Mapping[str, float]]


def heat_map(history: Records, metric: str = "alpha", *, ax: Axes | None = None) -> Figure:
    """One metric of every layer over the epochs: layers from top to bottom, epochs to the right.

    Colours are neutral at the critical value: 2 for alpha, 0 for the others. What was not measured is
    grey; values far out have the last colour.

    Args:
        history: Records as in `SpectralMonitor.history`, each with "epoch".
        metric: One of `METRICS`, or any other `ww_<metric>/<layer>` of the records.
        ax: Axes to draw into.

    Raises:
        ValueError: If no record has such a metric and it is none of `METRICS`, or one has no epoch.
    """
    title = f"{label(metric)} of the layers during training"
    epochs, names, values = _table(history, metric)
    height = min(max(1.6 + 0.16 * len(names), 2.8), 7.0)
    ax = new_axes(ax, height=height)
    if not np.isfinite(values).any():
        return message(ax, NO_ALPHA if metric == "alpha" else f"no {metric}", title=title)
    centre = CENTRES.get(metric, 0.0)
    norm, ends = _diverging(values[np.isfinite(values)], centre)
    colours = colormaps["RdBu"].with_extremes(bad="#bbbbbb")
    image = ax.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    room = inches(ax)[1]
    bar = figure_of(ax).colorbar(image, ax=ax, extend=ends, pad=0.02, aspect=max(8.0, 7.0 * room))
    bar.ax.tick_params(labelsize=8, colors=INK)
    rows, texts = every_nth(len(names), room), short_labels(names, 36)
    ax.set_yticks(rows, [texts[i] for i in rows], fontsize=6.5)
    columns = every_nth(len(epochs), 2.2)
    ax.set_xticks(columns, [f"{epochs[i]:g}" for i in columns])
    dress(ax, title=title, facts=f"{len(names)} layers, neutral at {centre:g}", x="epoch", y="")
    return figure_of(ax)


def training_curves(history: Records, *, ax: Axes | None = None) -> Figure:
    """Alpha over the epochs: a curve a layer, or with many layers the median and quantile bands.

    Where a layer was not measured the curve goes straight on, and the bands take its latest alpha.

    Args:
        history: Records as in `SpectralMonitor.history`, each with "epoch".
        ax: Axes to draw into.

    Raises:
        ValueError: If a record has no epoch.
    """
    ax, title = new_axes(ax), "alpha during training"
    epochs, names, values = _table(history, "alpha")
    known = np.isfinite(values)
    if not known.any():
        return message(ax, NO_ALPHA, title=title)
    low, high = alpha_range(values[known].tolist())
    shade_safe_zone(ax, across="y")
    if len(names) <= NAMED_LAYERS:
        for i, (name, curve) in enumerate(zip(short_labels(names, 20), values, strict=True)):
            color = colormaps["viridis"](0.85 * i / max(len(names) - 1, 1))
            style = ("-", "--", "-.")[i % 3]
            seen = ~np.isnan(curve)  # a monitor with a budget measures layers in turn
            ax.plot(epochs[seen], curve[seen], color=color, linestyle=style, marker=".", label=name)
    else:
        _bands(ax, epochs, values)
    ax.set_ylim(low, high)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    beyond = int((values[known] > high).sum() + (values[known] < low).sum())
    facts = f"{len(names)} layers" + (f", values beyond the border: {beyond}" if beyond else "")
    dress(ax, title=title, facts=facts, x="epoch", y="alpha")
    legend_right(ax)
    return figure_of(ax)


def _diverging(values: Array, centre: float) -> tuple[TwoSlopeNorm, str]:
    """Colours from centre to where most values are, on each side; and which ends some lie beyond."""
    above = max(float(np.quantile(values, 0.95)) - centre, 1e-3)
    below = max(centre - float(np.quantile(values, 0.05)), 1e-3)
    above, below = max(above, 0.25 * below), max(below, 0.25 * above)
    norm = TwoSlopeNorm(centre, centre - below, centre + above)
    too_low, too_high = values.min() < centre - below, values.max() > centre + above
    ends = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}
    return norm, ends[bool(too_low), bool(too_high)]


def _bands(ax: Axes, epochs: Array, values: Array) -> None:
    """Median over the layers, and the bands of 50 and 90 % of them."""
    known = ~np.isnan(values)
    latest = np.maximum.accumulate(np.where(known, np.arange(values.shape[1]), 0), axis=1)
    filled = np.take_along_axis(values, latest, axis=1)
    some = known.any(axis=0).cumsum() > 0
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    low, first, median, third, high = np.nanquantile(filled[:, some], levels, axis=0)
    x = epochs[some]
    ax.fill_between(x, low, high, color=BLUE, alpha=0.15, linewidth=0, label="90 % of layers")
    ax.fill_between(x, first, third, color=BLUE, alpha=0.3, linewidth=0, label="50 %")
    ax.plot(x, median, color=BLUE, marker=".", label="median")


def _table(history: Records, metric: str) -> tuple[Array, list[str], Array]:
    """Epochs, layers, and `(layers, epochs)` values, NaN where missing."""
    prefix = f"ww_{metric}/"
    fullest = sorted(history, key=len, reverse=True)  # whose layers are all there, in model order
    tags = [tag for record in fullest for tag in record if tag.startswith(prefix)]
    if not tags and metric not in METRICS:
        raise ValueError(f"no ww_{metric}/<layer> in the history; known: {', '.join(METRICS)}")
    if any("epoch" not in record for record in history):
        raise ValueError('expected records with "epoch", as in SpectralMonitor.history')
    names = list(dict.fromkeys(tags))
    measured = [record for record in history if any(tag in record for tag in names)]
    values = [[float(record.get(tag, math.nan)) for record in measured] for tag in names]
    table = np.array(values, dtype=np.float64).reshape(len(names), len(measured))
    epochs = np.array([float(record["epoch"]) for record in measured], dtype=np.float64)
    return epochs, [tag[len(prefix) :] for tag in names], table
