"""The power law of a spectrum's tail: rho(lambda) ~ lambda^-alpha above xmin.

Clauset, Shalizi and Newman, SIAM Review 51 (2009) 661: maximum likelihood for alpha (eq. 3.1) with
the xmin that minimises the Kolmogorov-Smirnov distance (section 3.3), as WeightWatcher uses it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

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
        xmin: Where the tail starts, in units of the eigenvalues.
        xmax: Largest eigenvalue of the tail: of all, unless some were dropped from the top.
        D: Kolmogorov-Smirnov distance between tail and fit, one-sided as in WeightWatcher (the
            empirical distribution starts each step at its lower edge).
        sigma: Standard error of alpha, `(alpha - 1) / sqrt(num_pl_spikes)` for a power law; ignores
            the choice of xmin and that eigenvalues repel. See `ww_train.confidence`.
        num_pl_spikes: Number of eigenvalues that alpha was computed from. Eigenvalues dropped from
            the top are not among them.
        Lambda: Rate of the exponential cutoff, in units of one over the eigenvalues, of
            `ww_train.truncated.TruncatedPowerLaw`; None from other fits.
        num_fingers: Eigenvalues that `ww_train.fingers.ClipXmax` removed from the top.
        raw_alpha: Exponent before their removal.
    """

    alpha: float
    xmin: float
    xmax: float
    D: float
    sigma: float
    num_pl_spikes: int
    Lambda: float | None = None
    num_fingers: int | None = None
    raw_alpha: float | None = None

    @property
    def warning(self) -> str:
        """WeightWatcher's word for alpha outside 2 to 6: "over-trained", "under-trained" or ""."""
        if self.alpha < OVER_TRAINED:
            return "over-trained"
        return "under-trained" if self.alpha > UNDER_TRAINED else ""


class TailFit(Protocol):
    """What fits the tail of a spectrum: `fit_power_law` or an algorithm such as `PowerLaw`."""

    def __call__(self, evals: Array, /) -> PowerLawFit | None:
        """Fit positive eigenvalues, ascending; None if there is no fit."""
        ...


@dataclass(frozen=True)
class PowerLaw:
    """Maximum likelihood for alpha above an xmin that is searched or given.

    Attributes:
        drop_top: Largest eigenvalues left out of the fit (WeightWatcher's `xmax=k`).
        xmin: None to search xmin among all eigenvalues; a pair to search it among those in this
            closed range; a number to fix it. A fixed xmin is taken as it is, in the likelihood too:
            the tail is every eigenvalue at or above it. (WeightWatcher's `WWFit` moves it to the
            nearest eigenvalue and then still searches above it; its `fit_powerlaw` ignores it.)

    Raises:
        ValueError: If `drop_top` is negative, or `xmin` is not positive and finite, or no range.
    """

    drop_top: int = 0
    xmin: float | tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.drop_top < 0:
            raise ValueError(f"drop_top is a number of eigenvalues, got {self.drop_top}")
        if isinstance(self.xmin, tuple):
            low, high = self.xmin
            if not 0 <= low <= high:
                raise ValueError(f"a range of xmin is 0 <= low <= high, got {self.xmin}")
        elif self.xmin is not None and not 0 < self.xmin < math.inf:
            raise ValueError(f"xmin must be positive and finite, got {self.xmin}; None searches it")

    def __call__(self, evals: Array, /) -> PowerLawFit | None:
        """Fit positive eigenvalues, ascending.

        Returns:
            The fit as described at `fit_power_law`, or None if there is none: fewer than `MIN_TAIL`
            eigenvalues remain, `drop_top` is more than half of them (what is left then says little
            about the tail; WeightWatcher's limit), no eigenvalue lies in the range of xmin, or the
            tail above a fixed xmin has fewer than two eigenvalues or only equal ones.
        """
        if 2 * self.drop_top > len(evals):
            return None
        kept = evals[: len(evals) - self.drop_top]
        if len(kept) < MIN_TAIL:
            return None
        if self.xmin is None:
            return _search(kept, 0.0, math.inf)
        if isinstance(self.xmin, tuple):
            return _search(kept, *self.xmin)
        return _fit_above(kept, self.xmin)


def fit_power_law(evals: Array) -> PowerLawFit | None:
    """Fit alpha and xmin to the positive eigenvalues of a spectrum.

    Every eigenvalue but the largest is a candidate xmin; among equal distances the smallest wins.
    The search is exact but visits few candidates: the distance at any point of a tail bounds the
    tail's distance from below. The candidate of the least bound is computed in full, the point
    where it is farthest off joins the bounds of all others, and the search ends when the least
    bound exceeds the best distance.

    With fewer than `SMALL_N` eigenvalues alpha is bias-corrected, tails below `MIN_TAIL` are not
    considered, and the distance is compared with what a sample of that size is expected to show.

    Args:
        evals: Positive eigenvalues, ascending. The result does not depend on their scale, except
            that xmin and xmax are proportional to it.

    Returns:
        The fit, or None if there is none: fewer than `MIN_TAIL` eigenvalues, or all of them equal.

    Cost: O(n) a visited candidate, of which there are usually 1 to 10; no device work.
    """
    return PowerLaw()(evals)


def _search(evals: Array, low: float, high: float) -> PowerLawFit | None:
    n = len(evals)
    small = n < SMALL_N
    logs = np.log(evals / evals[-1])  # relative to the largest: sums of logs stay small
    sizes = np.arange(n, 1, -1, dtype=np.float64)  # tail sizes of the candidates 0 .. n-2
    excess = np.cumsum(logs[::-1])[::-1][:-1] - sizes * logs[:-1]  # sum ln(lambda_j / xmin)
    usable = excess > sizes * _rounding(logs)
    with np.errstate(divide="ignore", invalid="ignore"):
        alphas = np.where(usable, 1.0 + (sizes - small) / excess, np.inf)
    usable &= (evals[:-1] >= low) & (evals[:-1] <= high)
    penalty = np.full(n - 1, 0.0)
    if small:
        usable &= sizes >= MIN_TAIL
        penalty = KS_MEDIAN / np.sqrt(sizes)
    candidates = np.flatnonzero(usable)
    if len(candidates) == 0:
        return None
    best = _least_distance(logs, alphas, candidates, penalty)
    alpha = float(alphas[best])
    return _fitted(evals[best:], float(evals[best]), logs[best:] - logs[best], alpha)


def _fit_above(evals: Array, xmin: float) -> PowerLawFit | None:
    small = len(evals) < SMALL_N
    tail = evals[np.searchsorted(evals, xmin) :]
    n = len(tail)
    if n < (MIN_TAIL if small else 2):
        return None
    logs = np.log(tail / xmin)
    if logs.sum() - n * logs[0] <= n * _rounding(logs):
        return None
    return _fitted(tail, xmin, logs, 1.0 + (n - small) / float(logs.sum()))


def _fitted(tail: Array, xmin: float, logs: Array, alpha: float) -> PowerLawFit:
    return PowerLawFit(
        alpha=alpha,
        xmin=xmin,
        xmax=float(tail[-1]),
        D=float(_gaps(logs, alpha).max()),
        sigma=(alpha - 1.0) / math.sqrt(len(tail)),
        num_pl_spikes=len(tail),
    )


def _rounding(logs: Array) -> float:
    """Rounding error of a difference of these logs: below it eigenvalues count as equal."""
    return 4e-16 * max(1.0, float(np.abs(logs[[0, -1]]).max()))


def _gaps(logs: Array, alpha: float) -> Array:
    """Distance of a tail `logs = ln(lambda / xmin)` from its law at each point; one-sided.

    Its maximum is the KS distance (Clauset et al. eq. 3.9).
    """
    n = len(logs)
    # not expm1: WeightWatcher's plain form, and rounding decides between equal distances
    return np.abs(1.0 - np.exp((1.0 - alpha) * logs) - np.arange(n) / n)


def _least_distance(logs: Array, alphas: Array, start: npt.NDArray[np.intp], penalty: Array) -> int:
    """Candidate of the least distance (minus penalty), smallest index among equals; exact."""
    slopes, origins, sizes = 1.0 - alphas[start], logs[start], len(logs) - start

    def gap_at(points: npt.NDArray[np.intp] | int, some: slice) -> Array:
        fitted = 1.0 - np.exp(slopes[some] * (logs[points] - origins[some]))
        gap: Array = np.abs(fitted - (points - start[some]) / sizes[some]) - penalty[start[some]]
        return gap

    probes = start + (_PROBES * (sizes - 1)).astype(np.intp)
    bound = gap_at(probes, slice(None)).max(axis=0)
    best_value, best = math.inf, -1
    while True:
        c = int(bound.argmin())
        # 1e-12: the bound and the distance are rounded differently
        if bound[c] > best_value + 1e-12 or bound[c] == math.inf:
            return best
        i = int(start[c])
        gaps = _gaps(logs[i:] - logs[i], float(alphas[i]))
        worst = int(gaps.argmax())
        value = float(gaps[worst]) - penalty[i]
        if value < best_value or (value == best_value and i < best):
            best_value, best = value, i
        # tails that start near each other are farthest off at the same eigenvalue
        some = slice(int(np.searchsorted(start, i + worst, side="right")))
        np.maximum(bound[some], gap_at(i + worst, some), out=bound[some])
        bound[c] = math.inf


_PROBES = np.linspace(0.0, 1.0, 8)[:, None]
"""Relative positions in the tail of the first bounds; more of them save no time."""
