"""Figures of one layer against noise: the random bulk, the shuffled spectrum, the level spacings.

Every function takes a `LayerReport` of `ww_train.measure`, returns a `matplotlib.figure.Figure` and
draws into the Axes `ax` if they are given.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ww_train.marchenko_pastur import MPFit, fit_mp, mp_density, mp_edges
from ww_train.plots.bins import linear_edges, log_edges
from ww_train.plots.style import (
    INK,
    ORANGE,
    RED,
    SKY,
    dress,
    figure_of,
    legend_below,
    message,
    new_axes,
    title_of,
    vertical,
)
from ww_train.plots.ticks import log_counts
from ww_train.report import LayerReport
from ww_train.spectrum import Array, Spectrum

NAMED_CAUSES = 3
"""Most causes of traps that `randomized_esd` names."""


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
    bins = linear_edges(values, 0.0, border)
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
    dress(ax, title=title_of(layer), facts=facts, x="singular value √λ", y="number in a bin")
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
    bins = log_edges(np.sort(np.concatenate([evals, shuffled]))).tolist()
    ax.hist(evals, bins=bins, color=SKY, label="layer")
    ax.hist(shuffled, bins=bins, histtype="step", color=INK, linewidth=1.4, label="shuffled")
    vertical(ax, edge, "edge of the noise", color=RED)
    if layer.traps.num_traps:
        traps = shuffled[shuffled > edge]
        ax.plot(traps, np.full(len(traps), 0.75), "v", color=ORANGE, markersize=7, label="traps")
    log_counts(ax)
    facts = f"traps: {layer.traps.num_traps}"
    if layer.rand_distance is not None:
        facts += f" · distance to the shuffled spectrum {layer.rand_distance:.2f}"
    dress(
        ax,
        title=title_of(layer),
        facts=f"{facts}\n{_causes(layer)}",
        x="eigenvalue λ",
        y="eigenvalues in a bin",
    )
    legend_below(ax, columns=4)
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
        return message(ax, "too few different eigenvalues for spacings", title=title_of(layer))
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
        title=title_of(layer),
        facts=f"mean ratio of adjacent spacings {ratio:.2f} (random matrix 0.53, independent 0.39)",
        x="spacing / local mean",
        y="density",
    )
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


def _bulk_density(spectrum: Spectrum, mp: MPFit, law: float) -> tuple[Array, Array]:
    """Singular values and `law` times their Marchenko-Pastur density."""
    sigma = math.sqrt(mp.bulk_max / mp_edges(spectrum.N, spectrum.M)[1])
    if sigma == 0.0:
        return np.empty(0), np.empty(0)
    low, high = mp_edges(spectrum.N, spectrum.M)
    x = np.linspace(math.sqrt(low), math.sqrt(high), 401)[1:]  # for noise of variance one
    return sigma * x, law / sigma * 2.0 * x * mp_density(x * x, spectrum.N, spectrum.M, 1.0)


def _causes(layer: LayerReport) -> str:
    if not layer.trap_causes:
        return ""
    named = [str(cause) for cause in layer.trap_causes[:NAMED_CAUSES]]
    more = len(layer.trap_causes) - len(named)
    return "causes: " + "; ".join(named) + (f" and {more} more" if more else "")
