"""How the figures look: colours, Axes made without pyplot, lines and labels that fit.

Figures are made on their own canvas, so that nothing is shown, registered or left open, and with
colours of their own, so that a dark style of the notebook does not make their text invisible.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.transforms import ScaledTranslation

from ww_train.power_law import OVER_TRAINED, UNDER_TRAINED
from ww_train.report import LayerReport
from ww_train.spectrum import Array

INK, FAINT = "#222222", "#888888"
BLUE, ORANGE, GREEN, SKY = "#0072B2", "#E69F00", "#009E73", "#9CC9E6"
RED, PURPLE = "#C8102E", "#7B2D8E"
"""Of the power law (xmin) and of the ERG condition (detX). They differ in line style too.

All these stay apart for colour-blind readers (after Okabe and Ito's palette)."""

LAYER_STYLES = {
    "dense": (BLUE, "o"),
    "embedding": (GREEN, "s"),
    "attention": (ORANGE, "*"),
    "conv1d": ("#D55E00", "P"),
    "conv2d": ("#D55E00", "D"),
    "conv3d": ("#D55E00", "X"),
    "recurrent": ("#CC79A7", "h"),
    "expert": ("#56B4E9", "p"),
    "bilinear": (PURPLE, "d"),
}
"""Colour and marker of each layer type; triangles are for what lies beyond the border."""

WIDEST = 100.0
"""No axis of alpha reaches beyond, whatever the layers say."""


def new_axes(ax: Axes | None, *, width: float = 6.0, height: float = 4.0) -> Axes:
    """The given Axes, or those of a new figure of this size in inches."""
    if ax is None:
        figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
    ax.set_facecolor("white")
    ax.tick_params(which="both", colors=INK, labelsize=8)
    ax.spines[:].set_color(FAINT)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def figure_of(ax: Axes) -> Figure:
    """The figure in which the Axes lie, also if they lie in a subfigure."""
    figure: Figure | SubFigure | None = ax.figure
    while isinstance(figure, SubFigure):
        figure = figure.figure
    assert figure is not None
    return figure


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of the Axes before the layout makes room for labels."""
    return ax.bbox.width / figure_of(ax).dpi, ax.bbox.height / figure_of(ax).dpi


def dress(ax: Axes, *, title: str, facts: str = "", x: str, y: str) -> None:
    """Title with lines of facts below it, broken where the Axes end, and labels of the axes."""
    fits = max(int(17.5 * inches(ax)[0]), 20)
    lines = [title, *facts.replace(" ·", "\N{NO-BREAK SPACE}·").splitlines()]
    text = "\n".join(textwrap.fill(line, fits) for line in lines)
    ax.set_title(text, loc="left", fontsize=9, color=INK)
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)


def message(ax: Axes, text: str, *, title: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    ax.set_axis_off()
    ax.set_title(title, loc="left", fontsize=9, color=INK)
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=INK, wrap=True)
    return figure_of(ax)


def legend_below(ax: Axes, columns: int = 3, **entries: Any) -> None:
    """A legend below the label of the x axis, where no data are."""
    fits = max(int(inches(ax)[0] / 1.15), 1)
    down = ScaledTranslation(0.0, -34 / 72, figure_of(ax).dpi_scale_trans)
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=ax.transAxes + down,
        ncols=min(columns, fits),
        columnspacing=1.2,
        **_LEGEND,
        **entries,
    )


def legend_right(ax: Axes) -> None:
    """A legend beside the Axes, for many entries or where tick labels need the room below."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), **_LEGEND)


_LEGEND: dict[str, Any] = {
    "fontsize": 8,
    "labelcolor": INK,
    "frameon": False,
    "handlelength": 1.8,
    "borderaxespad": 0.0,
}


def label(name: str, limit: int = 28) -> str:
    """A name as a label: one line, plain ASCII, not read as mathematics, shortened in the middle."""
    plain = "".join(
        c if c.isascii() and c.isprintable() else c.encode("unicode_escape").decode()
        for c in " ".join(name.split())
    )
    if len(plain) > limit:
        head = (limit - 1) // 2
        plain = f"{plain[:head]}…{plain[len(plain) - (limit - 1 - head) :]}"
    escaped = plain.replace("$", r"\$")
    # a legend leaves out "_name" and ""
    return f" {escaped}" if escaped.startswith("_") or not escaped else escaped


def title_of(layer: LayerReport) -> str:
    """The layer's name as the title of a figure."""
    return label(layer.name, 64)


def number(value: float) -> str:
    """Two decimals, unless the value is absurd."""
    return f"{value:.2f}" if abs(value) < 1e4 else f"{value:.3g}"


def short_labels(names: Sequence[str], limit: int) -> list[str]:
    """Labels of many layers, without the part of the path that all of them share."""
    paths = [name.split(".") for name in names]
    shared = takewhile(lambda segments: len(set(segments)) == 1, zip(*paths, strict=False))
    start = min(len(list(shared)), min(map(len, paths), default=1) - 1)  # something must be left
    return [label(".".join(path[start:]), limit) for path in paths]


def vertical(ax: Axes, x: float, text: str, *, color: str, style: str = "--") -> None:
    """A marked position, named in the legend."""
    ax.axvline(x, color=color, linestyle=style, linewidth=1.4, label=text)


def shade_safe_zone(ax: Axes, *, across: Literal["x", "y", "both"]) -> None:
    """Shade alpha from 2 to 6 and mark 2, along the axis or axes of alpha."""
    for axis, span, line in (("x", ax.axvspan, ax.axvline), ("y", ax.axhspan, ax.axhline)):
        if across in (axis, "both"):
            span(OVER_TRAINED, UNDER_TRAINED, color=GREEN, alpha=0.10, linewidth=0, zorder=0)
            line(OVER_TRAINED, color=GREEN, linewidth=0.8, zorder=0.5)


def alpha_range(alphas: Sequence[float]) -> tuple[float, float]:
    """Range of an axis of alpha: the safe zone and the bulk of the layers, but no single far value.

    Up to six times the median absolute deviation, or half the median if that is more, around the
    median; at least 1 to 7, and at most `WIDEST`.
    """
    kept = [alpha for alpha in alphas if math.isfinite(alpha)]
    if not kept:
        return 1.0, UNDER_TRAINED + 1.0
    kept = [max(-WIDEST, min(alpha, WIDEST)) for alpha in kept]
    median = statistics.median(kept)
    spread = statistics.median(abs(alpha - median) for alpha in kept)
    reach = max(6.0 * spread, abs(median) / 2.0)
    low, high = max(min(kept), median - reach), min(max(kept), median + reach)
    return min(1.0, math.floor(low)), max(UNDER_TRAINED + 1.0, min(math.ceil(high) + 0.5, WIDEST))


def every_nth(count: int, room: float, size: float = 6.5) -> list[int]:
    """Which of `count` labels of this size in points to show along `room` inches: evenly thinned."""
    fits = max(int(room * 72 / (1.25 * size)), 1)
    return list(range(0, count, max(math.ceil(count / fits), 1)))


def scatter(
    ax: Axes,
    x: Array,
    y: Array,
    *,
    xlim: tuple[float, float],
    ylim: tuple[float, float],
    style: tuple[str, str],
    size: float = 24.0,
) -> None:
    """Points of one colour and marker; those beyond the limits as triangles that point outwards.

    NaN is left out. The limits are those of the data: the caller sets the ones of the Axes.
    """
    color, marker = style
    inside_x, inside_y = np.clip(x, *xlim), np.clip(y, *ylim)
    inside = (x == inside_x) & (y == inside_y)
    ax.scatter(x[inside], y[inside], s=size, c=color, marker=marker, linewidths=0, zorder=3)
    left = ~np.isnan(x) & ~np.isnan(y)
    beyond = {"^": y > ylim[1], "v": y < ylim[0], ">": x > xlim[1], "<": x < xlim[0]}
    for triangle, where in beyond.items():
        chosen, left = where & left, left & ~where
        if chosen.any():
            ax.scatter(
                inside_x[chosen],
                inside_y[chosen],
                s=1.6 * size,
                c=color,
                marker=triangle,
                edgecolors=INK,
                linewidths=0.8,
                clip_on=False,
                zorder=4,
            )
