"""Figures of one layer: its spectrum, the fit of the tail, the random bulk, traps, eigenvectors.

Every function takes a `LayerReport` of `ww_train.measure`, returns a `matplotlib.figure.Figure` and
draws into the Axes `ax` if they are given. Eigenvalues that are rounding are left out.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from ww_train.localization import (
    information_entropy,
    localization_ratio,
    participation_ratio,
    vector_entropy,
)
from ww_train.marchenko_pastur import MPFit, fit_mp, mp_density, mp_edges
from ww_train.plots.style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    dress,
    figure_of,
    label,
    legend_below,
    message,
    new_axes,
    number,
    vertical,
)
from ww_train.power_law import PowerLaw, PowerLawFit
from ww_train.report import LayerReport
from ww_train.spectrum import Array, Spectrum

SCANNED = 300
"""Most values of xmin that `xmin_scan` fits."""

ZOOM = 30.0
"""How far below xmin and detX the picture of the tail reaches."""

NAMED_CAUSES = 3
"""Most causes of traps that `randomized_esd` names."""

MOST_BINS = 400
"""Most bins of a histogram whose tail is to have several."""

NO_TAIL = "no power law in this layer"


def esd(layer: LayerReport, *, ax: Axes | None = None) -> Figure:
    """The spectrum on logarithmic axes, with the power law of its tail, xmin (red) and detX (purple).

    Heights are numbers of eigenvalues in bins of equal width in log lambda; a density of exponent
    alpha falls with slope 1 - alpha there. The view begins a factor of `ZOOM` below both lines;
    `esd_semilog` shows everything.
    """
    evals, fit, erg = layer.spectrum.positive, layer.fit, layer.erg
    tail = (
        0 if fit is None else math.log(fit.xmax / fit.xmin) / max(5, math.sqrt(fit.num_pl_spikes))
    )
    ax = _spectrum_axes(layer, ax, _log_edges(evals, narrow=tail))
    _log_log(ax)
    lines = [x for x in (fit and fit.xmin, erg.detX_val) if x]
    if fit is not None and min(lines) / ZOOM > evals[0]:
        ax.set_xlim(left=min(lines) / ZOOM)
    return figure_of(ax)


def esd_linear(layer: LayerReport, *, ax: Axes | None = None) -> Figure:
    """The spectrum on linear axes, with the same lines as `esd`."""
    evals = layer.spectrum.positive
    return figure_of(_spectrum_axes(layer, ax, _linear_edges(evals, evals[0], evals[-1])))


def esd_semilog(layer: LayerReport, *, ax: Axes | None = None) -> Figure:
    """All of the spectrum against log lambda, with the same lines as `esd`: the bulk and its peak."""
    ax = _spectrum_axes(layer, ax, _log_edges(layer.spectrum.positive))
    ax.set_xscale("log")
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
        return message(ax, NO_TAIL, title=_title(layer))
    scan = _scan(layer.spectrum.positive, fit)
    xmin = [one.xmin for one in scan]
    dot = "o" if len(scan) == 1 else ""  # a line of one point is not seen
    ax.set_xscale("log")
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
    dress(ax, title=_title(layer), facts=_facts(layer), x="xmin", y="distance D (blue)")
    handles = [distance, alpha, line]
    legend_below(ax, handles=handles, labels=["D", "alpha", f"xmin = {fit.xmin:.3g}"])
    return figure_of(ax)


def mp_fit(layer: LayerReport, *, ax: Axes | None = None) -> Figure:
    """The singular values and the Marchenko-Pastur law of their random bulk; spikes marked.

    Singular values, because the density of the eigenvalues of a square layer is infinite at zero. The
    law is `layer.mp` if that was measured (`measure(..., mp_fit=True)`), else `fit_mp`. Spikes far
    beyond the bulk are counted at the border.
    """
    ax = new_axes(ax)
    s, mp = layer.spectrum, layer.mp or fit_mp(layer.spectrum)
    values, threshold = np.sqrt(s.evals), math.sqrt(mp.threshold)
    edge = max(threshold, math.sqrt(mp.bulk_max))
    border = 1.02 * s.sv_max if s.sv_max < 2.5 * edge else 1.8 * edge
    bins = _linear_edges(values, 0.0, border)
    ax.hist(values, bins=bins.tolist(), color=SKY, label="singular values")
    law = (len(values) - mp.num_spikes) * (bins[1] - bins[0])
    ax.plot(*_bulk_density(s, mp, law), color=INK, linewidth=1.4, label="Marchenko-Pastur")
    vertical(ax, threshold, "threshold", color=RED)
    spikes = values[values > threshold]
    near = spikes[spikes <= border]
    ax.plot(near, np.zeros(len(near)), "|", color=ORANGE, markersize=14, label="spikes")
    if len(near) < len(spikes):
        far = f"{len(spikes) - len(near)} more, up to {s.sv_max:.3g} →"
        ax.text(0.99, 0.5, far, transform=ax.transAxes, ha="right", color=INK, fontsize=8)
    ax.set_xlim(0.0, border)
    ax.set_ylim(bottom=0.0)
    facts = f"sigma = {mp.sigma_mp:.3g} · {mp.num_spikes} spikes of {len(values)} eigenvalues"
    if 2 * mp.num_spikes > len(values):
        facts += " · hardly a random bulk"
    dress(ax, title=_title(layer), facts=facts, x="singular value √λ", y="number in a bin")
    legend_below(ax, columns=4)
    return figure_of(ax)


def randomized_esd(layer: LayerReport, *, ax: Axes | None = None) -> Figure:
    """The spectrum against that of the shuffled matrix, the edge of its noise, traps and causes.

    What reaches beyond the shuffled spectrum was learned; what of the shuffled one reaches beyond the
    edge are traps.

    Raises:
        ValueError: If the layer was not measured with `measure(..., randomize=True)`.
    """
    if layer.shuffled is None or layer.traps is None:
        raise ValueError(
            f"{layer.name} has no shuffled spectrum: measure it with measure(..., randomize=True)"
        )
    ax = new_axes(ax)
    evals, shuffled = layer.spectrum.positive, layer.shuffled.positive
    edge = layer.traps.mp.threshold
    bins = _log_edges(np.sort(np.concatenate([evals, shuffled]))).tolist()
    ax.hist(evals, bins=bins, color=SKY, label="layer")
    ax.hist(shuffled, bins=bins, histtype="step", color=INK, linewidth=1.4, label="shuffled")
    vertical(ax, edge, "edge of the noise", color=RED)
    if layer.traps.num_traps:
        traps = shuffled[shuffled > edge]
        ax.plot(traps, np.full(len(traps), 0.75), "v", color=ORANGE, markersize=7, label="traps")
    _log_log(ax)
    facts = f"traps: {layer.traps.num_traps}"
    if layer.rand_distance is not None:
        facts += f" · distance to the shuffled spectrum {layer.rand_distance:.2f}"
    dress(
        ax,
        title=_title(layer),
        facts=f"{facts}\n{_causes(layer)}",
        x="eigenvalue λ",
        y="eigenvalues in a bin",
    )
    legend_below(ax, columns=4)
    return figure_of(ax)


def detX(layer: LayerReport, *, ax: Axes | None = None) -> Figure:
    """The trace-log of the k largest eigenvalues against k: the ERG tail ends where it crosses zero.

    At criticality the power-law tail (red) ends there too (purple): `ERG_gap` is the distance of the
    lines, `trace_log` the height of the curve at the red one.
    """
    ax = new_axes(ax)
    s, erg = layer.spectrum, layer.erg
    if erg.detX_num is None:
        return message(ax, "no ERG tail: all eigenvalues are equal", title=_title(layer))
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
        title=_title(layer),
        facts=facts,
        x="number k of the largest eigenvalues",
        y="sum of ln λ (mean λ = 1)",
    )
    legend_below(ax)
    return figure_of(ax)


def level_spacings(layer: LayerReport, *, ax: Axes | None = None) -> Figure:
    """Distances of neighbouring eigenvalues, against those of random matrices and of chance.

    Each is divided by the mean around it (unfolded, in ln lambda). Eigenvalues of a random matrix
    repel (Wigner surmise, `(pi/2) s exp(-pi s² / 4)`), independent ones do not (Poisson, `exp(-s)`).
    The pooled slices of a convolution are independent of each other, hence nearer to Poisson. The
    ratio of the title needs no unfolding: mean of the smaller over the larger of two adjacent
    distances, 0.53 for random matrices and 0.39 for Poisson (Atas et al., Physical Review Letters
    110 (2013) 084101).
    """
    ax = new_axes(ax)
    spacings = unfolded_spacings(layer.spectrum.positive)
    if len(spacings) < 8:
        return message(ax, "too few different eigenvalues for spacings", title=_title(layer))
    bins = np.linspace(0.0, 4.0, min(41, max(9, len(spacings) // 8)))
    weight = 1.0 / (len(spacings) * (bins[1] - bins[0]))
    ax.hist(
        np.minimum(spacings, 4.0),  # the rare larger ones count in the last bin
        bins=bins.tolist(),
        weights=np.full(len(spacings), weight),
        color=SKY,
        label="layer",
    )
    s = np.linspace(0.0, 4.0, 200)
    wigner = 0.5 * np.pi * s * np.exp(-0.25 * np.pi * s * s)
    ax.plot(s, wigner, color=INK, linewidth=1.4, label="random matrix (Wigner)")
    ax.plot(s, np.exp(-s), color=RED, linestyle="--", label="independent (Poisson)")
    gaps = np.diff(layer.spectrum.positive)
    low, high = np.minimum(gaps[1:], gaps[:-1]), np.maximum(gaps[1:], gaps[:-1])
    ratio = float((low[high > 0.0] / high[high > 0.0]).mean())
    dress(
        ax,
        title=_title(layer),
        facts=f"mean ratio of adjacent spacings {ratio:.2f} (random matrix 0.53, independent 0.39)",
        x="spacing / local mean",
        y="density",
    )
    legend_below(ax)
    return figure_of(ax)


def vector_metrics(layer: LayerReport, *, ax: Axes | None = None) -> Figure:
    """How spread the eigenvectors are, relative to Gaussian vectors, against their eigenvalues.

    One is spread like noise; below it few coordinates carry the vector. Dots are eigenvectors, lines
    their running median; the tail is right of xmin.

    Raises:
        ValueError: If the layer was not measured with `measure(..., vectors=True)`.
    """
    if layer.localization is None:
        raise ValueError(
            f"{layer.name} has no eigenvector metrics: measure it with measure(..., vectors=True)"
        )
    ax = new_axes(ax)
    if layer.spectrum.M < 2:
        return message(ax, "vectors of one coordinate", title=_title(layer))
    found = layer.localization
    above = found.evals > layer.spectrum.floor
    evals = found.evals[above]
    vectors = torch.from_numpy(np.random.default_rng(0).standard_normal((layer.spectrum.M, 64)))
    for name, color, values, metric in (
        ("histogram entropy", GREEN, found.vec_entropy, vector_entropy),
        ("localisation ratio", BLUE, found.loc_ratio, localization_ratio),
        ("participation ratio", ORANGE, found.part_ratio, participation_ratio),
        ("information entropy", PURPLE, found.info_entropy, information_entropy),
    ):
        relative = values[above] / float(metric(vectors).mean())
        ax.plot(evals, relative, ".", color=color, markersize=2.5, alpha=0.35)
        ax.plot(evals, _running_median(relative), color=color, linewidth=1.4, label=name)
    ax.axhline(1.0, color=FAINT, linewidth=0.8)
    if layer.fit is not None:
        vertical(ax, layer.fit.xmin, "xmin", color=RED)
    ax.set_xscale("log")
    ax.set_ylim(bottom=0.0)
    facts = f"{found.num_tail} of {len(found.evals)} eigenvectors in the tail"
    dress(ax, title=_title(layer), facts=facts, x="eigenvalue λ", y="spread / that of noise")
    legend_below(ax)
    return figure_of(ax)


def unfolded_spacings(evals: Array) -> Array:
    """Spacings of ascending positive eigenvalues in ln lambda, over their mean in a window around.

    Args:
        evals: `(n,)`; windows are some `sqrt(n)` spacings wide.

    Returns:
        At most `n - 1` spacings of mean about one; those among equal eigenvalues are left out.
    """
    gaps = np.diff(np.log(evals))
    if len(gaps) == 0:
        return gaps
    window = np.ones(2 * max(2, round(math.sqrt(len(gaps)) / 2)) + 1)
    if len(window) > len(gaps):
        window = np.ones(len(gaps))
    number = np.convolve(np.ones(len(gaps)), window, mode="same")
    local = np.convolve(gaps, window, mode="same") / number
    spread = local > 1e-14  # differences of logs of equal eigenvalues are rounding
    unfolded: Array = gaps[spread] / local[spread]
    return unfolded


def _spectrum_axes(layer: LayerReport, ax: Axes | None, edges: Array) -> Axes:
    """Histogram of the eigenvalues in these bins, with the fitted law, xmin and detX."""
    ax = new_axes(ax)
    evals, fit = layer.spectrum.positive, layer.fit
    ax.hist(evals, bins=edges.tolist(), color=SKY, label="eigenvalues")
    if fit is not None:
        x = np.geomspace(fit.xmin, fit.xmax, 400)
        ax.plot(x, _tail_density(fit, x) * _width(edges, x), color=RED, label="power law")
        vertical(ax, fit.xmin, f"xmin = {fit.xmin:.3g}", color=RED)
    if layer.erg.detX_val is not None:
        detX = f"detX = {layer.erg.detX_val:.3g}"
        vertical(ax, layer.erg.detX_val, detX, color=PURPLE, style="-.")
    dress(
        ax,
        title=_title(layer),
        facts=_facts(layer),
        x="eigenvalue λ of WᵀW",
        y="eigenvalues in a bin",
    )
    legend_below(ax, columns=4)
    return ax


def _log_log(ax: Axes) -> None:
    """Logarithmic axes for bars of one and more, with plain numbers."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.5)
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _title(layer: LayerReport) -> str:
    return label(layer.name, 64)


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


def _causes(layer: LayerReport) -> str:
    if not layer.trap_causes:
        return ""
    named = [str(cause) for cause in layer.trap_causes[:NAMED_CAUSES]]
    more = len(layer.trap_causes) - len(named)
    return "causes: " + "; ".join(named) + (f" and {more} more" if more else "")


def _number_of_bins(evals: Array) -> int:
    return min(100, max(10, round(3.0 * math.sqrt(len(evals)))))


def _log_edges(evals: Array, narrow: float = 0.0) -> Array:
    """Edges of bins of equal width in ln lambda, of that width if it is given and narrower."""
    low, high = float(evals[0]), float(evals[-1])
    if high < low * (1.0 + 1e-6):
        low, high = low / 1.05, high * 1.05
    number = _number_of_bins(evals)
    if narrow > 0.0:
        number = max(number, min(math.ceil(math.log(high / low) / narrow), MOST_BINS))
    edges: Array = np.geomspace(low, high, number + 1)
    return edges


def _linear_edges(evals: Array, low: float, high: float) -> Array:
    if high < low + 1e-6 * abs(low):
        low, high = 0.95 * low, 1.05 * high
    edges: Array = np.linspace(low, high, _number_of_bins(evals) + 1)
    return edges


def _width(edges: Array, x: Array) -> Array:
    """Width of a bin at `x`: linear in lambda, be the bins equal in lambda or in ln lambda."""
    centres, widths = 0.5 * (edges[1:] + edges[:-1]), np.diff(edges)
    slope = (widths[-1] - widths[0]) / (centres[-1] - centres[0])
    width: Array = widths[0] + slope * (x - centres[0])
    return width


def _bulk_density(spectrum: Spectrum, mp: MPFit, law: float) -> tuple[Array, Array]:
    """Singular values and `law` times their Marchenko-Pastur density."""
    sigma = math.sqrt(mp.bulk_max / mp_edges(spectrum.N, spectrum.M)[1])
    if sigma == 0.0:
        return np.empty(0), np.empty(0)
    low, high = mp_edges(spectrum.N, spectrum.M)
    x = np.linspace(math.sqrt(low), math.sqrt(high), 401)[1:]  # for noise of variance one
    return sigma * x, law / sigma * 2.0 * x * mp_density(x * x, spectrum.N, spectrum.M, 1.0)


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


def _running_median(values: Array) -> Array:
    half = max(1, len(values) // 40)
    medians = [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    return np.array(medians, dtype=np.float64)
