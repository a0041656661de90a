"""How localised the eigenvectors of a layer are: spread over all coordinates, or over a few.

The eigenvectors of a random matrix are delocalised: their entries are Gaussian, all alike. Values
below those of Gaussian vectors mean that few coordinates carry a vector (Martin and Mahoney, JMLR
22 (2021) 165, on eigenvector localization).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ww_train.linalg import all_finite, gram, symmetric_eigenvectors
from ww_train.spectrum import EPS64, Array
from ww_train.weights.matrices import WeightMatrix

NUM_BINS = 100
"""Bins of `vector_entropy` (WeightWatcher)."""


@dataclass(frozen=True, eq=False)
class Localization:
    """The eigenvectors of one layer's Gram matrices, all slices pooled, by ascending eigenvalue.

    Attributes:
        evals: `(n,)` eigenvalues, in units of the spectrum; `n = rf * M`.
        num_tail: Number of eigenvalues at xmin and above, the last ones: the tail. Others are bulk.
        vec_entropy: `(n,)` histogram entropies, see `vector_entropy`.
        loc_ratio: `(n,)` see `localization_ratio`.
        part_ratio: `(n,)` see `participation_ratio`.
        info_entropy: `(n,)` see `information_entropy`.
    """

    evals: Array
    num_tail: int
    vec_entropy: Array
    loc_ratio: Array
    part_ratio: Array
    info_entropy: Array

    def to_dict(self) -> dict[str, float | None]:
        """Means and variances under WeightWatcher's column names, and those of `info_entropy`.

        The columns are `{bulk,tail}_{mean,var}_{vec_entropy,loc_ratio,part_ratio,info_entropy}`;
        None where there is no bulk or no tail.
        """
        split = len(self.evals) - self.num_tail
        row: dict[str, float | None] = {}
        for metric in ("vec_entropy", "loc_ratio", "part_ratio", "info_entropy"):
            values: Array = getattr(self, metric)
            for name, part in (("bulk", values[:split]), ("tail", values[split:])):
                row[f"{name}_mean_{metric}"] = float(part.mean()) if len(part) else None
                row[f"{name}_var_{metric}"] = float(part.var()) if len(part) else None
        return row


def vector_metrics(matrix: WeightMatrix, xmin: float) -> Localization:
    """Localisation of the eigenvectors of a layer, in the bulk and in the power-law tail.

    The vectors are those of the shorter side of each slice: of `W Wᵀ` if it has no more rows than
    columns, as in WeightWatcher, else of `WᵀW`. Where eigenvalues coincide, such as the zeros of a
    rank-deficient matrix, the vectors are whatever the solver returns.

    Args:
        matrix: A layer; a convolution has the vectors of all its slices.
        xmin: Start of the tail in units of the spectrum, such as `PowerLawFit.xmin`. An eigenvalue
            that equals it up to rounding belongs to the tail (in WeightWatcher, to either).

    Raises:
        ValueError: If the weights are not finite, or their squares overflow, or xmin is NaN.

    Cost: for each slice about `9 M³` float64 operations and some ten M x M float64 matrices, on the
    weights' device; two synchronisations.
    """
    if math.isnan(xmin):
        raise ValueError(f"expected the start of a tail, got xmin = {xmin} for {matrix.name}")
    stack = matrix.stack.detach()
    grams = gram(stack if stack.shape[1] > stack.shape[2] else stack.mT, matrix.scale)
    if not all_finite(grams):
        raise ValueError(
            f"expected finite weights, got NaN, infinite or overflowing in {matrix.name}"
        )
    evals, vectors = symmetric_eigenvectors(grams)
    evals, order = evals.flatten().clamp(min=0.0).sort()
    columns = vectors.transpose(0, 1).flatten(1)[:, order]
    metrics = (vector_entropy, localization_ratio, participation_ratio, information_entropy)
    host = torch.stack([evals, *(metric(columns) for metric in metrics)]).cpu().numpy()
    rounding = matrix.M * EPS64 * float(host[0, -1])
    num_tail = int(np.count_nonzero(host[0] >= xmin - rounding))
    return Localization(host[0], num_tail, *host[1:])


def localization_ratio(vectors: Tensor) -> Tensor:
    """Localisation ratio `||v||_1 / ||v||_inf` of each column: 1 (one coordinate) to M (all equal).

    Args:
        vectors: `(M, k)`, or one vector `(M,)`; of any scale and dtype.

    Returns:
        `(k,)` in float64 on the same device, or a scalar for one vector; NaN for a zero vector.
    """
    return _relative(vectors).sum(dim=0)


def participation_ratio(vectors: Tensor) -> Tensor:
    """Participation ratio `||v||_2 / ||v||_4` of each column: 1 (one coordinate) to M^¼ (all equal).

    Its fourth power is the participation number `1 / sum v⁴` of unit vectors; `(M/3)^¼` for Gaussian
    entries. Shapes as in `localization_ratio`.
    """
    squares = _relative(vectors).square()
    return squares.sum(dim=0).sqrt() / squares.square().sum(dim=0).pow(0.25)


def information_entropy(vectors: Tensor) -> Tensor:
    """Entropy `-sum p ln p / ln M` of `p = v² / ||v||²`: 0 (one coordinate) to 1 (all equal).

    For Gaussian entries about `1 - 0.7296 / ln M`; 0.7296 is the mean of `x² ln x²` for standard
    normal x. This is what the column `entropy` of WeightWatcher's `vector_metrics` should be; that
    one is `exp(-||v|| / 2) / sqrt(2 pi)`, the same for all unit vectors. Shapes as in
    `localization_ratio`.
    """
    squares = _relative(vectors).square()
    p = squares / squares.sum(dim=0)
    entropy: Tensor = torch.special.entr(p).sum(dim=0)
    return entropy / math.log(max(len(p), 2))


def vector_entropy(vectors: Tensor) -> Tensor:
    """Entropy in nats of the histogram of |v| in 100 equal bins from its minimum to its maximum.

    WeightWatcher's `discrete_entropy`, from which its `vec_entropy` columns come. It is the variety
    of the entries rather than their spread: near 0 for a vector on one coordinate, but also for one
    whose entries are all equal. For Gaussian entries it depends on M: 2.6 at 16, 4.0 from 256 to
    4096. For localisation see `information_entropy`. Shapes as in `localization_ratio`.
    """
    magnitude = _relative(vectors)
    low = magnitude.amin(dim=0)
    width = (1.0 - low) / NUM_BINS  # the largest is 1
    bins = (magnitude - low).div_(torch.where(width > 0.0, width, 1.0)).long()
    bins.clamp_(0, NUM_BINS - 1)  # the largest entry belongs to the last bin
    counts = torch.zeros(NUM_BINS, *bins.shape[1:], dtype=torch.float64, device=bins.device)
    counts.scatter_add_(0, bins, torch.ones_like(magnitude))
    entropy: Tensor = torch.special.entr(counts / len(magnitude)).sum(dim=0)
    return entropy.masked_fill(low.isnan(), torch.nan)


def _relative(vectors: Tensor) -> Tensor:
    """Absolute entries over the largest of each column, in float64: no power under- or overflows."""
    magnitude = vectors.to(torch.float64).abs()
    return magnitude / magnitude.amax(dim=0)
