"""Figures of whole models: alpha over the layers, against depth, and between models.

Every function returns a `matplotlib.figure.Figure` and draws into the Axes `ax` if they are given.
Axes of alpha show where most layers are; layers far out become triangles at the border. Layers
without a power law are counted in the title.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from operator import attrgetter

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ww_train.plots.style import (
    BLUE,
    FAINT,
    INK,
    LAYER_STYLES,
    SKY,
    alpha_range,
    dress,
    figure_of,
    label,
    legend_below,
    legend_right,
    message,
    new_axes,
    number,
    scatter,
    shade_safe_zone,
    short_labels,
    vertical,
)
from ww_train.power_law import OVER_TRAINED, UNDER_TRAINED
from ww_train.report import LayerReport, Report
from ww_train.spectrum import Array

NO_ALPHA = "no layer with a power law"

NAMED_LAYERS = 12
"""Up to so many layers are named along an axis, or have a curve of their own."""


def alpha_histogram(report: Report, *, ax: Axes | None = None) -> Figure:
    """How many layers have which alpha: safe zone shaded, mean marked.

    Layers far out are counted in the bin at the border, and above it.
    """
    ax, title = new_axes(ax), "alpha of the layers"
    alphas = _alphas(report)
    alphas = alphas[~np.isnan(alphas)]
    if len(alphas) == 0:
        return message(ax, NO_ALPHA, title=title)
    low, high = alpha_range(alphas.tolist())
    bins = np.linspace(low, high, round((high - low) * (4 if high - low < 12.0 else 2)) + 1)
    shade_safe_zone(ax, across="x")
    ax.hist(
        np.clip(alphas, low, high), bins=bins.tolist(), color=BLUE, edgecolor="white", linewidth=0.5
    )
    above, below = int((alphas > high).sum()), int((alphas < low).sum())
    for count, text, x, side in (
        (above, f"{above} beyond →", 0.99, "right"),
        (below, f"← {below} beyond", 0.01, "left"),
    ):
        if count:
            ax.text(x, 0.95, text, transform=ax.transAxes, ha=side, fontsize=8, color=INK)
    finite = alphas[np.isfinite(alphas)]
    if len(finite):
        mean = float(finite.mean())
        vertical(ax, min(max(mean, low), high), f"mean {number(mean)}", color=INK)
        legend_below(ax)
    ax.set_xlim(low, high)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    dress(ax, title=title, facts=_facts(report), x="alpha", y="layers")
    return figure_of(ax)


def correlation_flow(
    report: Report,
    *,
    group: Callable[[LayerReport], str] = attrgetter("layer_type"),
    ax: Axes | None = None,
) -> Figure:
    """Alpha against depth, colour and marker by the type of layer, with the safe zone.

    Triangles at the border are layers beyond it, crosses at the bottom layers without a power law.

    Args:
        report: The layers, in the order of the model.
        group: The name of a layer's colour in the legend. `lambda layer: layer.name.split(".")[-1]`
            tells the query, key and value projections of a transformer apart.
        ax: Axes to draw into.
    """
    ax, title = new_axes(ax), "correlation flow"
    alphas, depth = _alphas(report), np.arange(len(report), dtype=np.float64)
    if np.isnan(alphas).all():
        return message(ax, NO_ALPHA, title=title)
    low, high = alpha_range(alphas[~np.isnan(alphas)].tolist())
    shade_safe_zone(ax, across="y")
    ax.plot(depth, np.clip(alphas, low, high), color=FAINT, linewidth=0.6, alpha=0.5, zorder=1)
    xlim = (-0.5, len(report) - 0.5)
    _by_group(ax, list(map(group, report)), depth, alphas, xlim=xlim, ylim=(low, high))
    margin = 0.05 * (high - low)
    lost = depth[np.isnan(alphas)]
    if len(lost):
        at_bottom = np.full(len(lost), low - margin)
        ax.plot(lost, at_bottom, "x", color=INK, clip_on=False, label="no power law")
    _name_far(ax, depth, alphas, low, high)
    ax.set_xlim(*xlim)
    ax.set_ylim(low - margin, high + margin)
    _depth_ticks(ax, [layer.name for layer in report])
    dress(ax, title=title, facts=_facts(report), x="depth: position in the model", y="alpha")
    if len(report) <= NAMED_LAYERS:
        ax.set_xlabel("")
    legend_right(ax)
    return figure_of(ax)


def alpha_vs_alpha(base: Report, finetuned: Report, *, ax: Axes | None = None) -> Figure:
    """Alpha of each layer before and after fine-tuning, matched by name.

    On the diagonal nothing changed; below it alpha fell.
    """
    ax, title = new_axes(ax, width=5.0, height=5.0), "alpha before and after fine-tuning"
    after = {layer.name: layer for layer in finetuned}
    matched = [layer for layer in base if layer.name in after]
    x = np.array([_alpha(layer) for layer in matched])
    y = np.array([_alpha(after[layer.name]) for layer in matched])
    both = ~(np.isnan(x) | np.isnan(y))
    if not both.any():
        return message(ax, f"{NO_ALPHA}\nin both models", title=title)
    low, high = alpha_range([*x[both].tolist(), *y[both].tolist()])
    shade_safe_zone(ax, across="both")
    ax.plot([low, high], [low, high], color=FAINT, linewidth=0.8, linestyle="--", zorder=1)
    _by_group(ax, _types(matched), x, y, xlim=(low, high), ylim=(low, high))
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    ax.set_aspect("equal")
    most = int(np.nanargmax(np.where(both, np.abs(y - x), -1.0)))
    facts = (
        f"{both.sum()} layers, alpha fell in {(y < x).sum()} and rose in {(y > x).sum()}\n"
        f"largest change: {label(matched[most].name, 32)}, {number(x[most])} to {number(y[most])}"
    )
    dress(ax, title=title, facts=facts, x="alpha of the base model", y="alpha after fine-tuning")
    legend_below(ax, columns=4)
    return figure_of(ax)


def alpha_vs_rand_distance(report: Report, *, ax: Axes | None = None) -> Figure:
    """Alpha against the distance of the spectrum from the shuffled one: both tell what was learned.

    A well-trained layer lies in the safe zone and far to the right; a random one far left.

    Raises:
        ValueError: If the layers were not measured with `measure(..., randomize=True)`.
    """
    ax, title = new_axes(ax), "alpha and distance from the shuffled spectrum"
    layers = [layer for layer in report if not math.isnan(_alpha(layer))]
    if not layers:
        return message(ax, NO_ALPHA, title=title)
    if all(layer.rand_distance is None for layer in layers):
        raise ValueError("no rand_distance: measure the model with measure(..., randomize=True)")
    y = np.array([_alpha(layer) for layer in layers])
    x = np.array([math.nan if d.rand_distance is None else d.rand_distance for d in layers])
    low, high = alpha_range(y.tolist())
    right = 1.05 * float(np.nanmax(x)) or 1.0
    shade_safe_zone(ax, across="y")
    _by_group(ax, _types(layers), x, y, xlim=(0.0, right), ylim=(low, high))
    ax.set_xlim(-0.03 * right, right)
    margin = 0.05 * (high - low)
    ax.set_ylim(low - margin, high + margin)
    xlabel = "rand_distance: Jensen-Shannon distance to the shuffled spectrum"
    dress(ax, title=title, facts=_facts(report), x=xlabel, y="alpha")
    legend_below(ax, columns=4)
    return figure_of(ax)


def compare_models(reports: Mapping[str, Report], *, ax: Axes | None = None) -> Figure:
    """The alphas of several models below each other: every layer, the quartiles and the median.

    Raises:
        ValueError: If there are no models.
    """
    if not reports:
        raise ValueError('expected models as {"name": report, ...}, got none')
    ax = new_axes(ax, height=min(1.6 + 0.5 * len(reports), 9.0))
    alphas = {name: _alphas(report) for name, report in reports.items()}
    alphas = {name: values[~np.isnan(values)] for name, values in alphas.items()}
    everything = np.concatenate(list(alphas.values()))
    title = "alpha of the layers of each model"
    if len(everything) == 0:
        return message(ax, NO_ALPHA, title=title)
    ranges = [alpha_range(values.tolist()) for values in alphas.values()]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    shade_safe_zone(ax, across="x")
    rows = []
    for row, (name, values) in enumerate(alphas.items()):
        height = row + 0.28 * np.modf(np.arange(1, len(values) + 1) * 0.618034)[0] + 0.06
        scatter(
            ax, values, height, xlim=(low, high), ylim=(-1.0, np.inf), style=(BLUE, "o"), size=12
        )
        _quartiles(ax, np.clip(values, low, high), row)
        median = f"median {number(float(np.median(values)))}" if len(values) else NO_ALPHA
        rows.append(f"{label(name)}\n{median}")
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(low, high)
    dress(ax, title=title, facts="dots: layers, box: middle half, line: median", x="alpha", y="")
    return figure_of(ax)


def _alpha(layer: LayerReport) -> float:
    """Alpha, or NaN if there is no power law."""
    return math.nan if layer.alpha is None else float(layer.alpha)


def _alphas(report: Report) -> Array:
    return np.array([_alpha(layer) for layer in report], dtype=np.float64)


def _facts(report: Report) -> str:
    alphas = _alphas(report)
    above, below = (alphas > UNDER_TRAINED).sum(), (alphas < OVER_TRAINED).sum()
    facts = [f"{len(report)} layers", f"{below} below 2", f"{above} above 6"]
    lost = int(np.isnan(alphas).sum())
    return " · ".join([*facts, f"{lost} without a power law"] if lost else facts)


def _types(layers: Sequence[LayerReport]) -> list[str]:
    return [layer.layer_type for layer in layers]


def _by_group(
    ax: Axes,
    groups: Sequence[str],
    x: Array,
    y: Array,
    *,
    xlim: tuple[float, float],
    ylim: tuple[float, float],
) -> None:
    """Points of each group of layers in its colour, named in the legend.

    Layer types have styles of their own; other groups take turns with those left.
    """
    size = 36.0 if len(groups) <= 60 else 14.0
    left = [style for kind, style in LAYER_STYLES.items() if kind not in groups]
    turns = cycle(left or LAYER_STYLES.values())
    for group in dict.fromkeys(groups):
        ours = np.array([other == group for other in groups])
        style = LAYER_STYLES.get(group) or next(turns)
        scatter(ax, x[ours], y[ours], xlim=xlim, ylim=ylim, style=style, size=size)
        ax.plot([], [], color=style[0], marker=style[1], linestyle="", label=label(group))


def _name_far(ax: Axes, depth: Array, alphas: Array, low: float, high: float) -> None:
    """Write alpha beside the triangles, unless they are many."""
    far = np.flatnonzero((alphas > high) | (alphas < low))
    if len(far) > 5:
        return
    for i in far:
        top = alphas[i] > high
        ax.annotate(
            f"{alphas[i]:.3g}",
            (depth[i], high if top else low),
            xytext=(-6 if i > len(alphas) / 2 else 6, -2 if top else 2),
            ha="right" if i > len(alphas) / 2 else "left",
            textcoords="offset points",
            fontsize=7,
            color=INK,
        )


def _depth_ticks(ax: Axes, names: Sequence[str]) -> None:
    """Names of few layers, numbers of many."""
    if len(names) > NAMED_LAYERS:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    ax.set_xticks(range(len(names)), short_labels(names, 20))
    if sum(len(name) + 3 for name in names) > 80:
        ax.tick_params(axis="x", labelrotation=40)
        for text in ax.get_xticklabels():
            text.set_horizontalalignment("right")
            text.set_rotation_mode("anchor")


def _quartiles(ax: Axes, values: Array, row: int) -> None:
    """A box of the middle half below the dots, with the median."""
    if len(values) == 0:
        return
    first, median, third = np.quantile(values, [0.25, 0.5, 0.75])
    ax.barh(row - 0.14, third - first, left=first, height=0.2, color=SKY, zorder=2)
    ax.vlines(median, row - 0.26, row - 0.02, color=INK, linewidth=2.0, zorder=3)
