"""The critical manifold in closed form: spectra with a given alpha and trace-log zero.

Let `lambda_1 >= ... >= lambda_n` be the eigenvalues of WᵀW and m their mean. A spectrum is critical
with tail size k when

1. its k largest eigenvalues are the power-law template `c i^-q`, i = 1..k (HTSR);
2. they satisfy `sum ln(lambda_i / m) = 0` (the ERG condition of SETOL);
3. the others lie below: `0 <= lambda_j <= lambda_k`.

Conditions 1 and 2 fix c, the mean fixes the sum of the others, and so only a narrow band of k is
feasible. Everything here works on eigenvalues alone, in float64 on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ww_train.power_law import fit_power_law
from ww_train.spectrum import Array

EPSILON = 1e-4
"""Target of the trace-log is -EPSILON: below zero, so that WeightWatcher's smallest k with a product
under one is exactly k; far above the rounding of float32 weights, far below anything measurable."""


@dataclass(frozen=True, eq=False)
class CriticalSpectrum:
    """The critical spectrum nearest to a given one.

    Attributes:
        evals: `(n,)` eigenvalues, descending, with the sum of the original ones.
        tail_size: Number k of eigenvalues in the tail.
        distance: `|| sigma* - sigma || / || sigma ||`, the relative Frobenius distance of the weights.
    """

    evals: Array
    tail_size: int
    distance: float


def template_exponent(k: Array, alpha: float) -> Array:
    """Exponent q of a template `i^-q`, i = 1..k, that the estimator reads as alpha at any size k.

    `1 / (alpha - 1)` holds for k to infinity only. Solving the maximum-likelihood estimator
    `alpha = 1 + k / sum ln(lambda_i / lambda_k)` for the template gives
    `q = k / ((alpha - 1) (k ln k - ln k!))`.
    """
    return k / ((alpha - 1.0) * (k * np.log(k) - log_factorial(k)))


def log_factorial(k: Array) -> Array:
    """`ln k!` of the entries of an array. Not scipy's gammaln: importing it takes half a second."""
    return np.array([math.lgamma(size + 1.0) for size in k])


def feasible_tail_sizes(n: int, alpha: float = 2.0, rank: int | None = None) -> Array:
    """Tail sizes k for which a critical spectrum of n eigenvalues exists, ascending.

    Args:
        n: Number of eigenvalues.
        alpha: Target exponent, above 1.
        rank: Number of eigenvalues that may be positive; n by default.

    Returns:
        A float array; empty if there is no critical spectrum: for alpha 2 and 3 when n is below 5, for
        alpha 1.5 for many n up to 78.
    """
    k, scale, harmonic, q = _templates(n, alpha)
    bulk = n - scale * harmonic  # sum of the bulk for m = 1
    room = ((n if rank is None else rank) - k) * scale * k**-q
    return k[(bulk >= 0.0) & (bulk <= room)]


def critical_spectrum(
    evals: Array, alpha: float = 2.0, rank: int | None = None
) -> CriticalSpectrum | None:
    """The critical spectrum nearest to `evals` in the Frobenius norm of the weights.

    With fixed singular vectors the distance is that of the singular values, and by Mirsky's theorem
    (1960) no other vectors come nearer. For each feasible k the tail is given; the bulk is
    `min(lambda_k, s lambda_j)` with the one s that gives the right sum, the exact minimiser under
    the Lagrange condition. Since the norm is kept, the nearest k has the largest `sum sigma* sigma`.

    Args:
        evals: `(n,)` eigenvalues, descending, at least zero.
        alpha: Target exponent, above 1.
        rank: The first `rank` eigenvalues are signal; the others are rounding and become zero. By
            default all that are positive.

    A bulk that touches the tail can make the estimator count it in, for small n above all. So the
    nearest spectrum is taken that `fit_power_law` itself reads with k eigenvalues in the tail, and if
    it reads none so, the nearest.

    Returns:
        The spectrum, or None if there is none for this n, alpha and rank.

    Raises:
        ValueError: If alpha is not above 1.

    Cost: O(n) a feasible k (about n/10 of them).
    """
    if not 1.0 < alpha < math.inf:
        raise ValueError(f"the target alpha must be a finite number above 1, got {alpha}")
    n = len(evals)
    positive = int(np.count_nonzero(evals > 0.0))
    rank = positive if rank is None else min(rank, positive)
    mean = float(evals.sum()) / n
    if not mean > 0.0:
        return None
    source = np.where(np.arange(n) < rank, evals / mean, 0.0)
    roots = np.sqrt(source)
    tails = feasible_tail_sizes(n, alpha, rank).astype(int)
    if len(tails) == 0:
        return None
    overlaps = [np.sqrt(_nearest_with_tail(source, k, alpha, rank)) @ roots for k in tails]
    by_distance = [int(k) for k in tails[np.argsort(overlaps)[::-1]]]
    for k in by_distance:
        nearest = _nearest_with_tail(source, k, alpha, rank)
        fit = fit_power_law(nearest[nearest > 0.0][::-1])
        if fit is not None and fit.num_pl_spikes == k:
            break
    else:
        k = by_distance[0]
        nearest = _nearest_with_tail(source, k, alpha, rank)
    difference = np.sqrt(nearest) - np.sqrt(evals / mean)
    return CriticalSpectrum(nearest * mean, k, float(np.linalg.norm(difference)) / math.sqrt(n))


@lru_cache(maxsize=64)
def _templates(n: int, alpha: float) -> tuple[Array, Array, Array, Array]:
    """For every k in 2..n-1: k, c for mean one, the sum of i^-q, and q. O(n²), hence cached."""
    k = np.arange(2.0, max(n, 2))
    q = template_exponent(k, alpha)
    scale = np.exp((q * log_factorial(k) - EPSILON) / k)
    index = np.arange(1.0, n)
    harmonic = np.array(
        [(index[: int(size)] ** -power).sum() for size, power in zip(k, q, strict=True)]
    )
    return k, scale, harmonic, q


def _nearest_with_tail(source: Array, k: int, alpha: float, rank: int) -> Array:
    """The critical spectrum with tail size k and mean one nearest to `source` (mean one)."""
    n = len(source)
    q = float(template_exponent(np.array([float(k)]), alpha)[0])
    scale = math.exp((q * math.lgamma(k + 1.0) - EPSILON) / k)
    tail = scale * np.arange(1.0, k + 1.0) ** -q
    bulk = source[k:rank]
    target = n - float(tail.sum())
    result = np.zeros(n)
    result[:k] = tail
    result[k:rank] = _capped(bulk, float(tail[-1]), target)
    return result


def _capped(bulk: Array, cap: float, total: float) -> Array:
    """`min(cap, s * bulk)` with the s for which it sums to `total`; bulk descending, positive."""
    if len(bulk) == 0:
        return bulk
    # with the first j capped, s = (total - j cap) / rest_j; it is right when bulk_j stays below
    rest = np.cumsum(bulk[::-1])[::-1]
    j = np.arange(len(bulk))
    slope = (total - j * cap) / rest
    fits = np.flatnonzero(slope * bulk <= cap)
    if len(fits) == 0:  # everything at the cap, up to rounding
        return np.full(len(bulk), total / len(bulk))
    first = int(fits[0])
    result = np.full(len(bulk), cap)
    result[first:] = max(float(slope[first]), 0.0) * bulk[first:]
    return result


def partial_step(evals: Array, target: Array, strength: float) -> Array:
    """Move `strength` of the way from one spectrum to another, in log sigma, keeping the sum.

    Args:
        evals: Eigenvalues, at least zero.
        target: Where to, in the same order.
        strength: 0 (stay) to 1 (arrive).
    """
    if strength == 0.0:
        return evals.copy()
    if strength == 1.0:
        return target.copy()
    moved: Array = evals ** (1.0 - strength) * target**strength  # zero stays zero
    moved *= evals.sum() / moved.sum()
    return moved
