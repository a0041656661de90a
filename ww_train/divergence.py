"""How far apart two spectra are as distributions of eigenvalues."""

from __future__ import annotations

import math

import numpy as np

from ww_train.spectrum import Array


def jensen_shannon_distance(x: Array, y: Array) -> float:
    """Jensen-Shannon distance of two spectra, from their histograms on common bins.

    The square root of `½ KL(p ‖ m) + ½ KL(q ‖ m)`, m = (p + q)/2, in nats (Lin, IEEE Trans. Inf.
    Theory 37 (1991) 145; a metric: Endres and Schindelin, ibid. 49 (2003) 1858). WeightWatcher's
    `rand_distance` puts the sorted eigenvalues themselves in the place of p and q.

    The bins hold equal mass of m, `2 ceil(n^⅓)` of them (Rice's rule, an even number), n the length
    of the shorter spectrum. Hence the distance does not change under a common scaling, or any other
    increasing function of both, such as a logarithm; and as half of the mass of m lies on either side
    of a gap between the spectra, an edge falls into that gap.

    Args:
        x: Eigenvalues in any order.
        y: Eigenvalues in any order; another number of them is fine.

    Returns:
        A number from 0 (equal on these bins) to sqrt(ln 2) = 0.8326 (one spectrum lies above the
        other). Two random matrices of one law are about 0.02 apart at 512 eigenvalues, two
        independent samples 0.08.

    Raises:
        ValueError: If a spectrum is empty or not finite.
    """
    x, y = _sorted(x), _sorted(y)
    edges = _equal_mass_edges(x, y, 2 * math.ceil(np.cbrt(min(len(x), len(y)))))
    p, q = (
        np.bincount(np.searchsorted(edges, z), minlength=len(edges) + 1) / len(z) for z in (x, y)
    )
    mixture = (p + q) / 2
    divergence = _entropy(mixture) - (_entropy(p) + _entropy(q)) / 2
    return math.sqrt(min(max(divergence, 0.0), math.log(2)))


def _sorted(evals: Array) -> Array:
    evals = np.sort(np.asarray(evals, dtype=np.float64))
    if evals.ndim != 1 or len(evals) == 0 or not np.isfinite(evals).all():
        raise ValueError(
            f"expected a vector of finite eigenvalues, got shape {evals.shape} with "
            f"{np.count_nonzero(~np.isfinite(evals))} not finite; leave out failed layers"
        )
    return evals


def _equal_mass_edges(x: Array, y: Array, num_bins: int) -> Array:
    """Upper edges of all bins but the last; each belongs to the bin below it.

    An eigenvalue of x weighs as many units as y has eigenvalues, and the other way round: masses are
    integers, so that the half of them is met exactly.
    """
    pooled = np.concatenate([x, y])
    weights = np.repeat([len(y), len(x)], [len(x), len(y)])
    order = np.argsort(pooled, kind="stable")
    mass = np.cumsum(weights[order]) * num_bins
    wanted = np.arange(1, num_bins) * (2 * len(x) * len(y))
    edges: Array = pooled[order][np.searchsorted(mass, wanted)]
    return edges


def _entropy(p: Array) -> float:
    positive = p[p > 0]
    return float(-(positive * np.log(positive)).sum())
