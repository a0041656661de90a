"""The power law of a spectrum's tail: rho(lambda) ~ lambda^-alpha above xmin.

Clauset, Shalizi and Newman, SIAM Review 51 (2009) 661: maximum likelihood for alpha (eq. 3.1) with
the xmin that minimises the Kolmogorov-Smirnov distance (section 3.3), as WeightWatcher uses it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ww_train.spectrum import Array

SMALL_N = 20
"""Below this many eigenvalues the small-sample rule of `fit_power_law` applies (WeightWatcher)."""

MIN_TAIL = 8
"""Smallest tail that the small-sample rule accepts (WeightWatcher)."""

KS_MEDIAN = 0.868
"""Median of sqrt(n) times the KS distance of n samples: what a good fit costs at tail size n."""

OVER_TRAINED, UNDER_TRAINED = 2.0, 6.0
"""Safe range of alpha: Martin, Peng and Mahoney, Nature Communications 12 (2021) 4122."""


@dataclass(frozen=True)
class PowerLawFit:
    """A fitted tail.

    Attributes:
        alpha: Exponent of the density.
        xmin: Smallest eigenvalue of the tail, in units of the eigenvalues.
        xmax: Largest eigenvalue.
        D: Kolmogorov-Smirnov distance between tail and fit, one-sided as in WeightWatcher (the
            empirical distribution starts each step at its lower edge).
        sigma: Standard error `(alpha - 1) / sqrt(num_pl_spikes)`; ignores the choice of xmin and
            that eigenvalues repel, so it is a lower bound on the uncertainty.
        num_pl_spikes: Number of eigenvalues in the tail.
    """

    alpha: float
    xmin: float
    xmax: float
    D: float
    sigma: float
    num_pl_spikes: int

    @property
    def warning(self) -> str:
        """WeightWatcher's word for alpha outside 2 to 6: "over-trained", "under-trained" or ""."""
        if self.alpha < OVER_TRAINED:
            return "over-trained"
        return "under-trained" if self.alpha > UNDER_TRAINED else ""


def fit_power_law(evals: Array) -> PowerLawFit | None:
    """Fit alpha and xmin to the positive eigenvalues of a spectrum.

    Every eigenvalue but the largest is a candidate xmin; among equal distances the smallest wins.
    The search is exact but visits few candidates: the distance at a handful of points bounds the
    distance from below, and candidates are taken in the order of their bounds until the next bound
    exceeds the best distance.

    With fewer than `SMALL_N` eigenvalues alpha is bias-corrected, tails below `MIN_TAIL` are not
    considered, and the distance is compared with what a sample of that size is expected to show.

    Args:
        evals: Positive eigenvalues, ascending. The result does not depend on their scale, except
            that xmin and xmax are proportional to it.

    Returns:
        The fit, or None if there is none: fewer than `MIN_TAIL` eigenvalues, or all of them equal.

    Cost: O(n log n) and typically a few hundred tails of up to n terms; no device work.
    """
    n = len(evals)
    if n < MIN_TAIL:
        return None
    small = n < SMALL_N
    logs = np.log(evals / evals[-1])  # relative to the largest: sums of logs stay small
    sizes = np.arange(n, 1, -1, dtype=np.float64)  # tail sizes of the candidates 0 .. n-2
    excess = np.cumsum(logs[::-1])[::-1][:-1] - sizes * logs[:-1]  # sum ln(lambda_j / xmin)
    spread = excess > sizes * 4e-16 * max(1.0, -float(logs[0]))
    with np.errstate(divide="ignore", invalid="ignore"):
        alphas = np.where(spread, 1.0 + (sizes - small) / excess, np.inf)
    penalty = np.full(n - 1, 0.0)
    if small:
        spread &= sizes >= MIN_TAIL
        penalty = KS_MEDIAN / np.sqrt(sizes)
    candidates = np.flatnonzero(spread)
    if len(candidates) == 0:
        return None
    best = _least_distance(logs, alphas, candidates, penalty)
    alpha, size = float(alphas[best]), n - best
    return PowerLawFit(
        alpha=alpha,
        xmin=float(evals[best]),
        xmax=float(evals[-1]),
        D=_distance(logs, float(alphas[best]), best),
        sigma=(alpha - 1.0) / math.sqrt(size),
        num_pl_spikes=size,
    )


def _distance(logs: Array, alpha: float, i: int) -> float:
    """KS distance of the tail that starts at i (Clauset et al. eq. 3.9, one-sided)."""
    tail = logs[i:] - logs[i]
    n = len(tail)
    # not expm1: WeightWatcher's plain form, and rounding decides between equal distances
    return float(np.abs(1.0 - np.exp((1.0 - alpha) * tail) - np.arange(n) / n).max())


def _least_distance(logs: Array, alphas: Array, start: npt.NDArray[np.intp], penalty: Array) -> int:
    """Candidate of the least distance (minus penalty), smallest index among equals; exact."""
    size = len(logs) - start
    bound = np.zeros(len(start))
    for fraction in _PROBES:
        j = start + np.minimum((fraction * size).astype(np.intp), size - 1)
        fitted = 1.0 - np.exp((1.0 - alphas[start]) * (logs[j] - logs[start]))
        np.maximum(bound, np.abs(fitted - (j - start) / size), out=bound)
    bound -= penalty[start]
    best_value, best = math.inf, -1
    for c in np.argsort(bound, kind="stable"):
        # 1e-12: the bound and the distance are rounded differently
        if bound[c] > best_value + 1e-12:
            break
        i = int(start[c])
        value = _distance(logs, float(alphas[i]), i) - penalty[i]
        if value < best_value or (value == best_value and i < best):
            best_value, best = value, i
    return best


_PROBES = np.concatenate([np.linspace(0.0, 1.0, 25), 1.0 - np.geomspace(0.02, 0.001, 5)])
"""Relative positions in the tail at which the distance is bounded."""
