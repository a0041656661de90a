"""How far alpha may be off if the eigenvalues are off by a little.

Two things happen. With xmin fixed alpha moves by up to `(alpha - 1)² shift`. And another xmin may be
the right one: any whose Kolmogorov-Smirnov distance is within what the shift can do of the least; then
alpha jumps. The bar reaches to the farthest of these.

How much a shift does to a distance is calibrated on training runs, so that at least 95 % of the true
alphas are within the bar (`benchmarks/tracking.py` measures it anew), and no theorem. It is for errors
most of which average out; after a jump they do not, and `ww_train.tracking` allows for that. What can
be proved, a bound by the norm of the whole change, lets one eigenvalue take all of it and says nothing
about xmin.
"""

from __future__ import annotations

import math

import numpy as np

from ww_train.power_law import PowerLawFit
from ww_train.spectrum import Array

DISTANCE_PER_SHIFT = 0.15
"""Change of a tail's Kolmogorov-Smirnov distance in units of `(alpha - 1) shift`; most averages out."""


def alpha_error(evals: Array, fit: PowerLawFit, shift: float) -> float:
    """How far alpha may be off if the eigenvalues err relatively by about `shift`.

    Args:
        evals: Positive eigenvalues, ascending, at least `ww_train.power_law.SMALL_N`.
        fit: `fit_power_law(evals)`.
        shift: Typical relative error.

    Returns:
        Half the width of the bar around `fit.alpha`; infinity if the fit is not of these eigenvalues or
        they are fewer.

    Cost: O(n) for each candidate xmin that is nearly as good as the best, and for some others.
    """
    logs = np.log(evals / evals[-1])
    n = len(logs)
    sizes = np.arange(n, 1, -1)
    excess = np.cumsum(logs[::-1])[::-1][:-1] - sizes * logs[:-1]
    with np.errstate(divide="ignore"):  # equal eigenvalues at the top: never a rival
        alphas = 1.0 + sizes / np.maximum(excess, 0.0)
    moves = np.abs(alphas - fit.alpha) + shift * (alphas - 1.0) ** 2
    limits = fit.D + DISTANCE_PER_SHIFT * shift * (alphas + fit.alpha - 2.0)
    rivals = np.flatnonzero(_least_distances(logs, alphas) <= limits)
    for i in rivals[np.argsort(-moves[rivals])]:
        tail = logs[i:] - logs[i]
        gaps = np.abs(1.0 - np.exp((1.0 - alphas[i]) * tail) - np.arange(n - i) / (n - i))
        if gaps.max() <= limits[i]:
            return float(moves[i])
    return math.inf


def _least_distances(logs: Array, alphas: Array) -> Array:
    """Lower bounds of the distances of all candidate tails: their distances at a few points."""
    start = np.arange(len(alphas))
    sizes = len(logs) - start
    points = start + (_POINTS * (sizes - 1)).astype(np.intp)
    with np.errstate(invalid="ignore"):  # where alpha is infinite: NaN, no bound
        fitted = 1.0 - np.exp((1.0 - alphas) * (logs[points] - logs[:-1]))
    bounds: Array = np.abs(fitted - (points - start) / sizes).max(axis=0)
    return bounds


_POINTS = np.linspace(0.0, 1.0, 32)[:, None]
"""Relative positions in the tail of the bounds."""
