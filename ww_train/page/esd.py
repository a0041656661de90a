"""A small drawing of a spectrum for web pages: SVG elements that take their colours from the page."""

from __future__ import annotations

import math
from typing import TypeAlias
from xml.etree.ElementTree import Element, SubElement

import numpy as np
import numpy.typing as npt

from ww_train.power_law import PowerLawFit
from ww_train.report import LayerReport
from ww_train.spectrum import Array, Spectrum

IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

WIDTH, HEIGHT = 440.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 432.0, 8.0, 216.0
"""Size of the drawing and borders of its axes, in its own units."""

DEEPEST = 1e-6
"""Eigenvalues smaller than this share of the largest are left out, so that the others show."""


def esd_svg(layer: LayerReport) -> Element:
    """A layer's eigenvalues on two logarithmic axes, with its power law, as `ww_train.plots.esd`.

    Heights are numbers of eigenvalues in bins of equal width in log lambda. Parts have the classes
    `bulk`, `tail`, `fit`, `xmin`, `detx`, `edge` and `shuffled`; the page styles them. Some 3 kB,
    whatever the number of eigenvalues.
    """
    evals = _drawn(layer.spectrum)
    edges = _edges(evals)
    counts, _ = np.histogram(evals, edges)
    x = _Axis(edges[0], edges[-1], LEFT, RIGHT)
    y = _Axis(0.5, 1.5 * counts.max(), BOTTOM, TOP)
    box = f"0 0 {WIDTH:g} {HEIGHT:g}"
    svg = Element("svg", {"viewBox": box, "class": "esd", "role": "img"})
    svg.set("aria-label", f"Histogram of {len(evals)} eigenvalues on logarithmic axes")
    xmin = layer.fit.xmin if layer.fit else math.inf
    for kind, chosen in (("bulk", edges[1:] <= xmin), ("tail", edges[1:] > xmin)):
        SubElement(svg, "path", {"class": kind, "d": _bars(edges, counts, chosen, x, y)})
    if layer.shuffled is not None:
        outline = _outline(layer.shuffled, edges, x, y)
        SubElement(svg, "path", {"class": "shuffled", "d": outline})
    if layer.fit:
        SubElement(svg, "path", {"class": "fit", "d": _law(layer.fit, edges, x, y)})
    _positions(svg, layer, x)
    _frame(svg, x, y)
    return svg


class _Axis:
    """A logarithmic axis: where a value lies in the drawing."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = float(low), float(high), start, end

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Some five powers of ten, or 1, 2 and 5 times them where they would be few."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        span = math.log10(self.high / self.low)
        digits = (1, 2, 5) if span < 2.0 else (1,)
        step = max(math.ceil(span / 6.0), 1)
        values = [d * 10.0**e for e in decades if e % step == 0 for d in digits]
        return [(v, f"{v:.4g}") for v in values if self.low <= v <= self.high]


def _drawn(spectrum: Spectrum) -> Array:
    evals = spectrum.positive
    drawn: Array = evals[evals >= evals[-1] * DEEPEST]
    return drawn


def _edges(evals: Array) -> Array:
    low, high = float(evals[0]), float(evals[-1])
    if high / low < 1.0 + 1e-6:  # all equal: one bar in the middle
        low, high = low / 2.0, high * 2.0
    bins = min(max(round(3.0 * len(evals) ** (1.0 / 3.0)), 8), 48)
    edges: Array = np.geomspace(low * (1.0 - 1e-9), high * (1.0 + 1e-9), bins + 1)
    return edges


def _bars(edges: Array, counts: IntArray, chosen: BoolArray, x: _Axis, y: _Axis) -> str:
    return "".join(
        f"M{x(left):.1f} {BOTTOM:g}V{y(count):.1f}H{x(right):.1f}V{BOTTOM:g}z"
        for left, right, count, wanted in zip(edges, edges[1:], counts, chosen, strict=False)
        if wanted and count
    )


def _outline(spectrum: Spectrum, edges: Array, x: _Axis, y: _Axis) -> str:
    counts, _ = np.histogram(spectrum.positive, edges)
    steps = "".join(
        f"V{y(count):.1f}H{x(right):.1f}" for right, count in zip(edges[1:], counts, strict=True)
    )
    return f"M{x(edges[0]):.1f} {BOTTOM:g}{steps}V{BOTTOM:g}"


def _law(fit: PowerLawFit, edges: Array, x: _Axis, y: _Axis) -> str:
    """What the fit expects in bins of the same width, from xmin to xmax."""
    grid = np.geomspace(fit.xmin, fit.xmax, 24)
    law = (grid / fit.xmin) ** -fit.alpha * np.exp(-(fit.Lambda or 0.0) * (grid - fit.xmin))
    area = float(((law[1:] + law[:-1]) / 2.0 * np.diff(grid)).sum())
    if not area > 0.0:
        return ""
    expected = fit.num_pl_spikes / area * law * grid * math.log(edges[1] / edges[0])
    points = [(a, b) for a, b in zip(grid, expected, strict=True) if y.low <= b <= y.high]
    return "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points) if points else ""


def _positions(svg: Element, layer: LayerReport, x: _Axis) -> None:
    """Vertical lines where the tails start and where noise ends."""
    marks = {
        "xmin": layer.fit.xmin if layer.fit else None,
        "detx": layer.erg.detX_val,
        "edge": layer.traps.mp.threshold if layer.traps else None,
    }
    for kind, value in marks.items():
        if value is not None and x.low <= value <= x.high:
            line = f"M{x(value):.1f} {TOP:g}V{BOTTOM:g}"
            SubElement(svg, "path", {"class": kind, "d": line})


def _frame(svg: Element, x: _Axis, y: _Axis) -> None:
    """Axes, ticks and their numbers."""
    ticks = "".join(f"M{x(value):.1f} {BOTTOM:g}v4" for value, _ in x.ticks())
    ticks += "".join(f"M{LEFT:g} {y(value):.1f}h-4" for value, _ in y.ticks())
    SubElement(
        svg, "path", {"class": "axis", "d": f"M{LEFT:g} {TOP:g}V{BOTTOM:g}H{RIGHT:g}{ticks}"}
    )
    for value, label in x.ticks():
        _text(svg, label, x(value), BOTTOM + 16.0, "middle")
    for value, label in y.ticks():
        _text(svg, label, LEFT - 7.0, y(value) + 4.0, "end")
    _text(svg, "eigenvalue", (LEFT + RIGHT) / 2.0, HEIGHT - 3.0, "middle")
    _text(svg, "eigenvalues per bin", LEFT + 6.0, TOP + 9.0, "start")


def _text(svg: Element, words: str, x: float, y: float, anchor: str) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    SubElement(svg, "text", place).text = words
