"""Figures of whole models and of training: alpha over layers, between models and over epochs.

Every function returns a `matplotlib.figure.Figure` and draws into the Axes `ax` if they are given.
Axes of alpha show where most layers are; layers far out become triangles at the border. Layers
without a power law are counted in the title.
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

from ww_train.plots.style import (
    BLUE,
    FAINT,
    INK,
    LAYER_STYLES,
    OTHER_STYLE,
    SKY,
    alpha_range,
    dress,
    every_nth,
    figure_of,
    inches,
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

METRICS = ("alpha", "erg_gap", "trace_log", "traps", "distance")
"""What the monitor of the callbacks records for each layer, as `ww_<metric>/<layer>`."""

CENTRES = {"alpha": OVER_TRAINED}
"""Where the colours of a heat map are neutral, if not at zero."""

Records = Sequence[Mapping[str, float]]


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


def correlation_flow(report: Report, *, ax: Axes | None = None) -> Figure:
    """Alpha against depth, colour and marker by the type of layer, with the safe zone.

    Triangles at the border are layers beyond it, crosses at the bottom layers without a power law.
    """
    ax, title = new_axes(ax), "correlation flow"
    alphas, depth = _alphas(report), np.arange(len(report), dtype=np.float64)
    if np.isnan(alphas).all():
        return message(ax, NO_ALPHA, title=title)
    low, high = alpha_range(alphas[~np.isnan(alphas)].tolist())
    shade_safe_zone(ax, across="y")
    ax.plot(depth, np.clip(alphas, low, high), color=FAINT, linewidth=0.6, alpha=0.5, zorder=1)
    xlim = (-0.5, len(report) - 0.5)
    _by_type(ax, report.layers, depth, alphas, xlim=xlim, ylim=(low, high))
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
    _by_type(ax, matched, x, y, xlim=(low, high), ylim=(low, high))
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
    _by_type(ax, layers, x, y, xlim=(0.0, right), ylim=(low, high))
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


def _by_type(
    ax: Axes,
    layers: Sequence[LayerReport],
    x: Array,
    y: Array,
    *,
    xlim: tuple[float, float],
    ylim: tuple[float, float],
) -> None:
    """Points of each type of layer in its colour, named in the legend."""
    kinds = np.array([layer.layer_type for layer in layers])
    size = 36.0 if len(layers) <= 60 else 14.0
    for kind in dict.fromkeys(kinds.tolist()):
        ours, style = kinds == kind, LAYER_STYLES.get(kind, OTHER_STYLE)
        scatter(ax, x[ours], y[ours], xlim=xlim, ylim=ylim, style=style, size=size)
        ax.plot([], [], color=style[0], marker=style[1], linestyle="", label=label(kind))


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
