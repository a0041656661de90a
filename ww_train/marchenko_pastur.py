"""The Marchenko-Pastur law: the spectrum of a random matrix, its edges, and what sticks out of it.

For an N x M matrix of independent entries of variance sigma², N >= M, the eigenvalues of WᵀW fill
`sigma² (sqrt(N) ± sqrt(M))²` (Marchenko and Pastur 1967). The largest fluctuates around the upper
edge on the Tracy-Widom scale (Johnstone, Annals of Statistics 29 (2001) 295, theorem 1.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaincinv

from ww_train.spectrum import Array, Spectrum

FALSE_ALARM = 0.01
"""Probability that a purely random spectrum shows a spike."""


@dataclass(frozen=True)
class MPFit:
    """The random bulk of a spectrum and the spikes above it.

    Attributes:
        sigma_mp: Standard deviation of the random bulk on the scale on which all eigenvalues have mean
            one: 1 for pure noise, and its square is the share of noise in the squared norm.
        bulk_min: Lower Marchenko-Pastur edge, in units of the eigenvalues.
        bulk_max: Upper Marchenko-Pastur edge.
        threshold: `bulk_max` with the Tracy-Widom margin: eigenvalues above it are spikes.
        num_spikes: Number of eigenvalues above `threshold`.
    """

    sigma_mp: float
    bulk_min: float
    bulk_max: float
    threshold: float
    num_spikes: int


def fit_mp(spectrum: Spectrum, false_alarm: float = FALSE_ALARM) -> MPFit:
    """Fit the random bulk, unaffected by spikes.

    The energy of the matrix (the sum of its eigenvalues) is that of the noise, `sigma² N M`, plus
    that of the signals. A signal of strength theta² shows as a spike at
    `(theta² + sigma² N)(theta² + sigma² M) / theta²` (Benaych-Georges and Nadakuditi, J.
    Multivariate Analysis 111 (2012) 120), which is solved for theta² and taken from the energy; that
    lowers the threshold and may reveal more spikes, until none is left. Starting from no spikes keeps
    the false alarms of a random matrix at their nominal rate; more than about M/4 equally strong
    spikes would hide each other.

    Args:
        spectrum: A spectrum, possibly pooled over `rf` slices.
        false_alarm: Probability of at least one spike in a purely random matrix.

    Returns:
        The fit. Heavy-tailed entries are no Gaussian noise: their largest stand out as spikes.
    """
    evals, N, M = spectrum.evals, spectrum.N, spectrum.M
    entries = N * M * spectrum.rf
    edge = tracy_widom_edge(N, M, false_alarm / spectrum.rf)
    variance, previous = spectrum.norm / entries, math.inf
    floor = spectrum.floor
    while variance < (1 - 1e-9) * previous:  # decreasing, hence it ends
        spikes = int(np.count_nonzero(evals > max(variance * edge, floor)))
        signals = signal_energy(evals[len(evals) - spikes :], N, M, variance)
        noise = max(spectrum.norm - float(signals.sum()), 0.0)
        variance, previous = min(variance, noise / entries), variance
    spikes = int(np.count_nonzero(evals > max(variance * edge, floor)))
    low, high = mp_edges(N, M)
    return MPFit(
        sigma_mp=math.sqrt(variance * entries / spectrum.norm),
        bulk_min=variance * low,
        bulk_max=variance * high,
        threshold=variance * edge,
        num_spikes=spikes,
    )


def signal_energy(spikes: Array, N: int, M: int, variance: float) -> Array:
    """Strength theta² of the signals behind spikes above the edge, for noise of that variance."""
    shifted = spikes - variance * (N + M)
    return 0.5 * (shifted + np.sqrt(np.maximum(shifted**2 - 4.0 * variance**2 * N * M, 0.0)))


def mp_edges(N: float, M: float) -> tuple[float, float]:
    """Edges of the spectrum of an N x M matrix of unit-variance entries, N >= M."""
    return (math.sqrt(N) - math.sqrt(M)) ** 2, (math.sqrt(N) + math.sqrt(M)) ** 2


def tracy_widom_edge(N: float, M: float, false_alarm: float) -> float:
    """Value that the largest eigenvalue of a unit-variance N x M matrix exceeds that rarely.

    Johnstone's centre and scale with half-integer corrections (Ma, Bernoulli 18 (2012) 322):
    `mu = (sqrt(N-½) + sqrt(M-½))²`, `s = sqrt(mu) (1/sqrt(N-½) + 1/sqrt(M-½))^⅓`.
    """
    n, m = math.sqrt(N - 0.5), math.sqrt(M - 0.5)
    scale: float = (n + m) * (1 / n + 1 / m) ** (1 / 3)
    return (n + m) ** 2 + scale * tracy_widom_quantile(1.0 - false_alarm)


def tracy_widom_quantile(p: float) -> float:
    """Quantile of the Tracy-Widom law TW1, by its shifted gamma approximation.

    Chiani, J. Multivariate Analysis 129 (2014) 69: `TW1 + 9.84801 ~ Gamma(46.446, 0.186054)`; within
    0.01 of the exact quantile for 0.05 <= p <= 0.999.
    """
    return float(0.186054 * gammaincinv(46.446, p) - 9.84801)


def mp_density(x: Array, N: int, M: int, sigma: float) -> Array:
    """Density of the eigenvalues of WᵀW at `x` under the Marchenko-Pastur law, normalised to one."""
    low, high = (sigma**2 * edge for edge in mp_edges(N, M))
    inside = np.clip((high - x) * (x - low), 0.0, None)
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.sqrt(inside) / (2 * math.pi * sigma**2 * M * x)
    return np.where(inside > 0, density, 0.0)
