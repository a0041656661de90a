"""The Marchenko-Pastur law: the spectrum of a random matrix, its edges, and what sticks out of it.

For an N x M matrix of independent entries of variance sigma², N >= M, the eigenvalues of WᵀW fill
`sigma² (sqrt(N) ± sqrt(M))²` (Marchenko and Pastur 1967). The largest fluctuates around the upper
edge on the Tracy-Widom scale (Johnstone, Annals of Statistics 29 (2001) 295, theorem 1.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ww_train.spectrum import Array, Spectrum

FALSE_ALARM = 0.01
"""Probability that a purely random spectrum shows a spike."""

TW_MEAN, TW_VARIANCE = -1.2065336, 1.6077810
"""Moments of the Tracy-Widom law TW1 (Bornemann, Markov Processes Relat. Fields 16 (2010) 803)."""


@dataclass(frozen=True)
class MPFit:
    """The random bulk of a spectrum and the spikes above it.

    Attributes:
        sigma_mp: Standard deviation of the random bulk on the scale on which all eigenvalues have mean
            one: 1 for pure noise, and its square is the share of noise in the squared norm.
        bulk_min: Lower Marchenko-Pastur edge of N x M noise, in units of the eigenvalues.
        bulk_max: Upper Marchenko-Pastur edge of N x M noise.
        threshold: Eigenvalues above it are spikes. It is `bulk_max` with a margin, less what the
            spikes found so far have taken out of the noise: many spikes bring it below `bulk_max`.
        num_spikes: Number of eigenvalues above `threshold`. More than half of all means that there
            is no random bulk to speak of.
    """

    sigma_mp: float
    bulk_min: float
    bulk_max: float
    threshold: float
    num_spikes: int


class BulkFit(Protocol):
    """A way to separate the random bulk of a spectrum from its spikes."""

    def __call__(self, spectrum: Spectrum, /) -> MPFit:
        """Fit one spectrum; ValueError if it cannot be."""


@dataclass(frozen=True)
class EnergyMP:
    """The bulk from the energy of the matrix: what the spikes do not explain is noise.

    Think of k signals in their own singular vectors: a k x k block that holds the signals, an
    (N-k) x (M-k) block of pure noise, and noise between the two. The first lifts k eigenvalues to
    `lambda = (theta² + sigma² (N-k)) (theta² + sigma² (M-k)) / theta²` (Benaych-Georges and
    Nadakuditi, J. Multivariate Analysis 111 (2012) 120) and so pushes `sigma⁴ (N-k) (M-k) / theta²`
    each out of the second, which gives sigma². A spike is an eigenvalue above the Tracy-Widom edge
    of the second block. Both are repeated until the number of spikes is consistent with itself.

    The first guess of k comes from the median, which holds while fewer than half of the eigenvalues
    are spikes; from k = 0, equal spikes in number above `N M / (sqrt(N) + sqrt(M))²` would hide each
    other. The median alone (Gavish and Donoho, IEEE Transactions on Information Theory 60 (2014) 5040)
    is misled less by signals too weak to be spikes, but gives up to eight times the stated false
    alarms at M <= 64, and on square trained layers each spike it removes makes another.

    False alarms are as rare as stated for Gaussian entries and rarer for bounded ones. Single large
    entries are spikes, as they are correlation traps: one matrix in four has one if the entries
    follow Student's t with 5 degrees of freedom. Zero eigenvalues are noise of no variance: of a
    matrix of low rank, or with a third of its columns zero, everything else is a spike.

    Attributes:
        false_alarm: Probability of at least one spike in a purely random matrix, over all slices
            of a pooled spectrum (Bonferroni).
    """

    false_alarm: float = FALSE_ALARM

    def __post_init__(self) -> None:
        if not 0.0 < self.false_alarm < 1.0:
            raise ValueError(f"false_alarm is a probability in (0, 1), got {self.false_alarm}")

    def __call__(self, spectrum: Spectrum, /) -> MPFit:
        """Fit the bulk of a spectrum, possibly pooled over `rf` slices.

        Raises:
            ValueError: If the eigenvalues have no positive, finite sum.

        Cost: some 10 to 200 passes over the spikes, under a few milliseconds; no device work.
        """
        N, M, rf = spectrum.N, spectrum.M, spectrum.rf
        norm, entries = spectrum.norm, N * M * rf
        if not 0.0 < norm < math.inf:
            raise ValueError(
                f"expected eigenvalues with a positive, finite sum, got the sum {norm}"
            )
        # the median of noise is 0.65 to 1 sigma² N; 3 times it exceeds sigma² N by so much that the
        # first guess is that of k = 0 unless spikes do hide each other
        guess = min(norm / entries, 3.0 * float(np.median(spectrum.evals)) / N)
        edge = tracy_widom_edge(N, M, self.false_alarm / rf)
        spikes = int(np.count_nonzero(spectrum.evals > max(guess * edge, spectrum.floor)))
        variance, threshold, found = self._step(spectrum, spikes)
        upwards = found > spikes
        while found > spikes if upwards else found < spikes:  # one direction, hence it ends
            spikes = found
            variance, threshold, found = self._step(spectrum, spikes)
        low, high = mp_edges(N, M)
        return MPFit(
            sigma_mp=math.sqrt(variance * entries / norm),
            bulk_min=variance * low,
            bulk_max=variance * high,
            threshold=threshold,
            num_spikes=found,
        )

    def _step(self, spectrum: Spectrum, spikes: int) -> tuple[float, float, int]:
        """Variance and threshold beside so many spikes, and how many they are then."""
        variance = noise_variance(spectrum, spikes)
        n, m = _noise_block(spectrum, spikes)
        rf = spectrum.rf
        edge = tracy_widom_edge(n, m, self.false_alarm / rf, entries=n * m * rf)
        threshold = max(variance * edge, spectrum.floor)
        return variance, threshold, int(np.count_nonzero(spectrum.evals > threshold))


def fit_mp(spectrum: Spectrum, false_alarm: float = FALSE_ALARM) -> MPFit:
    """Fit the random bulk with the default algorithm, `EnergyMP`."""
    return EnergyMP(false_alarm)(spectrum)


def noise_variance(spectrum: Spectrum, spikes: int) -> float:
    """Variance of the noise if the largest `spikes` eigenvalues stand for signals.

    Solves `sum of the others = sigma² n m - sigma⁴ n m sum 1/theta²`, n = N-k, m = M-k, for the
    smallest sigma²; see `EnergyMP`. Eigenvalues that are rounding count as zero.
    """
    n, m = _noise_block(spectrum, spikes)
    split = len(spectrum.evals) - spikes
    bulk, top = spectrum.evals[:split], spectrum.evals[split:]
    base = float(bulk[bulk > spectrum.floor].sum()) / (n * m * spectrum.rf)
    variance = base
    for _ in range(100):
        # a signal that makes a spike is no weaker than the one whose spike is at the edge
        theta2 = np.maximum(signal_energy(top, n, m, variance), variance * math.sqrt(n * m))
        pushed = float((1.0 / theta2).sum()) / spectrum.rf
        previous = variance
        variance = 2.0 * base / (1.0 + math.sqrt(max(1.0 - 4.0 * base * pushed, 0.0)))
        if variance <= (1.0 + 1e-12) * previous:
            break
    return variance


def _noise_block(spectrum: Spectrum, spikes: int) -> tuple[float, float]:
    """Size of the noise of one slice that is left beside the spikes, at least 1 x 1."""
    share = spikes / spectrum.rf
    return max(spectrum.N - share, 1.0), max(spectrum.M - share, 1.0)


def signal_energy(spikes: Array, N: float, M: float, variance: float) -> Array:
    """Strength theta² of the signals behind spikes above the edge, for noise of that variance."""
    if variance == 0.0:
        return spikes.copy()
    shifted = spikes / variance - (N + M)  # in units of the noise, whose square may overflow
    gap = 2.0 * math.sqrt(N * M)
    root = np.sqrt(np.maximum(shifted - gap, 0.0)) * np.sqrt(np.maximum(shifted + gap, 0.0))
    theta2: Array = 0.5 * variance * (shifted + root)
    return theta2


def mp_edges(N: float, M: float) -> tuple[float, float]:
    """Edges of the spectrum of an N x M matrix of unit-variance entries, N >= M."""
    return (math.sqrt(N) - math.sqrt(M)) ** 2, (math.sqrt(N) + math.sqrt(M)) ** 2


def tracy_widom_edge(N: float, M: float, false_alarm: float, entries: float = math.inf) -> float:
    """Value that the largest eigenvalue of a unit-variance N x M matrix exceeds that rarely.

    Johnstone's centre and scale with half-integer corrections (Ma, Bernoulli 18 (2012) 322):
    `mu = (sqrt(N-½) + sqrt(M-½))²`, `s = sqrt(mu) (1/sqrt(N-½) + 1/sqrt(M-½))^⅓`.

    Args:
        N: Larger dimension, at least 1.
        M: Smaller dimension, at least 1.
        false_alarm: Probability of exceeding it.
        entries: If the variance is not known but the mean square of that many entries, these
            included, the number of them. The largest eigenvalue l over that mean square t is
            independent of t (Basu), hence has the variance `(Var l - E(l)² v) / (1 + v)` with
            `v = Var t = 2 / entries`, and the fluctuation around the mean shrinks in proportion.
            Without it, 16 x 16 noise gave one alarm for ten (Nadler, J. Multivariate Analysis 102
            (2011) 363, has the first order in v).
    """
    n, m = math.sqrt(N - 0.5), math.sqrt(M - 0.5)
    centre: float = (n + m) ** 2
    scale: float = (n + m) * (1 / n + 1 / m) ** (1 / 3)
    v = 2.0 / entries
    variance = (TW_VARIANCE - (centre / scale + TW_MEAN) ** 2 * v) / (1.0 + v)
    shrink = math.sqrt(max(variance, 0.0) / TW_VARIANCE)
    margin = TW_MEAN + shrink * (tracy_widom_quantile(1.0 - false_alarm) - TW_MEAN)
    return centre + scale * margin


def tracy_widom_quantile(p: float) -> float:
    """Quantile of the Tracy-Widom law TW1, by its shifted gamma approximation.

    Chiani, J. Multivariate Analysis 129 (2014) 69: `TW1 + 9.84801 ~ Gamma(46.446, 0.186054)`; within
    0.01 of the exact quantile for 0.05 <= p <= 0.99, too low by 0.026 at 0.999 and 0.038 at 0.9999.
    """
    from scipy.special import gammaincinv  # here, because importing it takes half a second

    return float(0.186054 * gammaincinv(46.446, p) - 9.84801)


def mp_density(x: Array, N: int, M: int, sigma: float) -> Array:
    """Density of the eigenvalues of WᵀW at `x` under the Marchenko-Pastur law, normalised to one."""
    low, high = (sigma**2 * edge for edge in mp_edges(N, M))
    inside = np.clip((high - x) * (x - low), 0.0, None)
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.sqrt(inside) / (2 * math.pi * sigma**2 * M * x)
    return np.where(inside > 0, density, 0.0)


def mp_distribution(x: Array, N: int, M: int) -> Array:
    """Share of the eigenvalues of WᵀW up to `x` under the law of unit-variance entries, N >= M.

    The integral of `mp_density` in closed form. With c = M / N, x over N, its edges a and b, and
    R = sqrt((b-x)(x-a)):
    `½ + (R + (1+c) atan((x-1-c) / R) - (1-c) atan(((1+c)x - (1-c)²) / ((1-c)R))) / 2πc`.
    """
    c = M / N
    low, high = (edge / N for edge in mp_edges(N, M))
    x = np.clip(x / N, low, high)
    root = np.sqrt((high - x) * (x - low))
    # not asin: near the edges it loses half of the digits, and the sum is then divided by c
    upper = np.arctan2(x - 1.0 - c, root)
    lower = np.arctan2((1.0 + c) * x - (1.0 - c) ** 2, (1.0 - c) * root)
    share: Array = 0.5 + (root + (1.0 + c) * upper - (1.0 - c) * lower) / (2.0 * math.pi * c)
    return np.clip(share, 0.0, 1.0)
