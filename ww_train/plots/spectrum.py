"""Figures of the spectrum of one layer: its eigenvalues, the fit of the tail, the ERG condition.

Every function takes a `LayerReport` of `ww_train.measure`, returns a `matplotlib.figure.Figure` and
draws into the Axes `ax` if they are given. Eigenvalues that are rounding are left out.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ww_train.plots.bins import bin_width, linear_edges, log_edges
from ww_train.plots.style import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    dress,
    figure_of,
    legend_below,
    message,
    new_axes,
    number,
    title_of,
    vertical,
)
from ww_train.plots.ticks import log_counts, log_scale
from ww_train.power_law import PowerLaw, PowerLawFit
from ww_train.report import LayerReport
from ww_train.spectrum import Array

SCANNED = 300
"""Most values of xmin that `xmin_scan` fits."""

ZOOM = 30.0
"""How far below xmin and detX the picture of the tail reaches."""

NO_TAIL = "no power law in this layer"


def esd(layer: LayerReport, *, ax: Axes | None = None) -> Figure:
    """The spectrum on logarithmic axes, with the power law of its tail, xmin (red) and detX (purple).

    Heights are numbers of eigenvalues in bins of equal width in log lambda; a density of exponent
    alpha falls with slope 1 - alpha there. The view begins a factor of `ZOOM` below both lines, and
    has bins for what it shows; `esd_semilog` shows everything.
    """
    evals, fit = layer.spectrum.positive, layer.fit
    tail = (
        0 if fit is None else math.log(fit.xmax / fit.xmin) / max(5, math.sqrt(fit.num_pl_spikes))
    )
    left = _left_of_view(layer)
    shown = evals[evals >= left]
    ax = _spectrum_axes(layer, ax, log_edges(shown, narrow=tail))
    log_counts(ax)
    if len(shown) < len(evals):
        ax.set_xlim(left=left)
    return figure_of(ax)


def esd_linear(layer: LayerReport, *, ax: Axes | None = None) -> Figure:
    """The spectrum on linear axes, with the same lines as `esd`."""
    evals = layer.spectrum.positive
    return figure_of(_spectrum_axes(layer, ax, linear_edges(evals, evals[0], evals[-1])))


def esd_semilog(layer: LayerReport, *, ax: Axes | None = None) -> Figure:
    """All of the spectrum against log lambda, with the same lines as `esd`: the bulk and its peak."""
    ax = _spectrum_axes(layer, ax, log_edges(layer.spectrum.positive))
    log_scale(ax)
    return figure_of(ax)


def xmin_scan(layer: LayerReport, *, ax: Axes | None = None) -> Figure:
    """Distance D (blue) and alpha (orange) of the power law above every xmin, and the chosen one.

    A deep minimum of D on a plateau of alpha is a tail; several minima are several tails. Of more
    than `SCANNED` eigenvalues some are left out. The distance is the plain power law's also if the
    layer was fitted with a cutoff.
    """
    ax = new_axes(ax)
    fit = layer.fit
    if fit is None:
        return message(ax, NO_TAIL, title=title_of(layer))
    scan = _scan(layer.spectrum.positive, fit)
    xmin = [one.xmin for one in scan]
    dot = "o" if len(scan) == 1 else ""  # a line of one point is not seen
    log_scale(ax)
    if xmin[-1] < 1.01 * xmin[0]:
        ax.set_xlim(xmin[0] / 2.0, 2.0 * xmin[-1])
    distances = [one.D for one in scan]
    (distance,) = ax.plot(xmin, distances, dot + "-", color=BLUE, linewidth=1.4, label="D")
    ax.set_ylim(bottom=0.0)
    line = ax.axvline(fit.xmin, color=RED, linestyle="--", linewidth=1.4)
    right = ax.twinx()
    new_axes(right).patch.set_visible(False)
    right.spines["right"].set_visible(True)
    (alpha,) = right.plot(xmin, [one.alpha for one in scan], dot + "-", color=ORANGE, label="alpha")
    top = 1.0 + 2.0 * max(fit.alpha - 1.0, 2.0)  # short tails reach alphas of hundreds
    right.set_ylim(min(1.0, fit.alpha - 1.0), top)
    right.set_ylabel("alpha (orange)", fontsize=9, color=INK)
    dress(ax, title=title_of(layer), facts=_facts(layer), x="xmin", y="distance D (blue)")
    handles = [distance, alpha, line]
    legend_below(ax, handles=handles, labels=["D", "alpha", f"xmin = {fit.xmin:.3g}"])
    return figure_of(ax)


def detX(layer: LayerReport, *, ax: Axes | None = None) -> Figure:
    """The trace-log of the k largest eigenvalues against k: the ERG tail ends where it crosses zero.

    At criticality the power-law tail (red) ends there too (purple): `ERG_gap` is the distance of the
    lines, `trace_log` the height of the curve at the red one.
    """
    ax = new_axes(ax)
    s, erg = layer.spectrum, layer.erg
    if erg.detX_num is None:
        return message(ax, "no ERG tail: all eigenvalues are equal", title=title_of(layer))
    positive = s.normalized()[::-1][: s.matrix_rank]
    log_det = np.cumsum(np.log(positive))
    tail = None if layer.fit is None else int(np.count_nonzero(s.evals >= layer.fit.xmin))
    last = min(len(log_det), max(8, 1 + int(1.4 * max(erg.detX_num, tail or 0))))
    k = np.arange(1, last + 1)
    ax.axhline(0.0, color=FAINT, linewidth=0.8)
    ax.plot(k, log_det[:last], color=BLUE, marker=".", markersize=3, linewidth=1.2)
    if tail is not None:
        vertical(ax, tail, f"power-law tail, {tail} eigenvalues", color=RED)
    vertical(ax, erg.detX_num, f"ERG tail, {erg.detX_num}", color=PURPLE, style="-.")
    facts = NO_TAIL
    if erg.ERG_gap is not None and erg.trace_log is not None:
        facts = f"ERG gap {erg.ERG_gap:+d} · trace-log {erg.trace_log:.3g}"
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(
        ax,
        title=title_of(layer),
        facts=facts,
        x="number k of the largest eigenvalues",
        y="sum of ln λ (mean λ = 1)",
    )
    legend_below(ax)
    return figure_of(ax)


def _left_of_view(layer: LayerReport) -> float:
    """Where the picture of the tail begins; zero if it shows everything."""
    fit, detX = layer.fit, layer.erg.detX_val
    if fit is None:
        return 0.0
    left = (fit.xmin if detX is None else min(fit.xmin, detX)) / ZOOM
    return left if left < layer.spectrum.positive[-1] else 0.0


def _spectrum_axes(layer: LayerReport, ax: Axes | None, edges: Array) -> Axes:
    """Histogram of the eigenvalues in these bins, with the fitted law, xmin and detX."""
    ax = new_axes(ax)
    evals, fit = layer.spectrum.positive, layer.fit
    ax.hist(evals, bins=edges.tolist(), color=SKY, label="eigenvalues")
    if fit is not None:
        x = np.geomspace(fit.xmin, fit.xmax, 400)
        ax.plot(x, _tail_density(fit, x) * bin_width(edges, x), color=RED, label="power law")
        vertical(ax, fit.xmin, f"xmin = {fit.xmin:.3g}", color=RED)
    if layer.erg.detX_val is not None:
        detX = f"detX = {layer.erg.detX_val:.3g}"
        vertical(ax, layer.erg.detX_val, detX, color=PURPLE, style="-.")
    dress(
        ax,
        title=title_of(layer),
        facts=_facts(layer),
        x="eigenvalue λ of WᵀW",
        y="eigenvalues in a bin",
    )
    legend_below(ax, columns=4)
    return ax


def _facts(layer: LayerReport) -> str:
    s, fit = layer.spectrum, layer.fit
    if fit is None:
        facts = [f"no power law in {s.matrix_rank} eigenvalues"]
    else:
        tail = f"{fit.num_pl_spikes} of {s.matrix_rank} eigenvalues"
        facts = [f"alpha = {number(fit.alpha)}", f"D = {fit.D:.3f}", tail, layer.verdict]
    if s.rank_loss:
        facts.append(f"{s.rank_loss} that are rounding not shown")
    return " · ".join(facts)


def _tail_density(fit: PowerLawFit, x: Array) -> Array:
    """Eigenvalues of the tail per unit of lambda at `x`, for a law with or without a cutoff."""
    if not fit.Lambda:
        scaled = np.exp(-fit.alpha * np.log(x / fit.xmin))
        plain: Array = fit.num_pl_spikes * (fit.alpha - 1.0) / fit.xmin * scaled
        return plain
    t = fit.Lambda * fit.xmin
    u, du = np.linspace(0.0, math.log1p(700.0 / t), 4096, retstep=True)  # exp(-700) is nothing
    total = float(np.exp((1.0 - fit.alpha) * u - t * np.expm1(u)).sum() - 0.5) * float(du)
    scaled = np.exp(-fit.alpha * np.log(x / fit.xmin) - t * (x / fit.xmin - 1.0))
    cut: Array = fit.num_pl_spikes / (total * fit.xmin) * scaled
    return cut


def _scan(evals: Array, fit: PowerLawFit) -> list[PowerLawFit]:
    """Power laws above some eigenvalues as xmin, the fitted one among them."""
    kept = evals[evals <= fit.xmax]
    thinned = kept[np.unique(np.linspace(0, len(kept) - 2, SCANNED).astype(np.intp))]
    candidates = np.unique(np.append(thinned, fit.xmin)).tolist()
    return [found for xmin in candidates if (found := PowerLaw(xmin=xmin)(kept))]
