"""Eigenvalue policy: float64 Gram matrices of the shorter side, decomposed in batches of one size.

A product of two float32 numbers is exact in float64, so only the summation of the Gram matrix rounds
and eigenvalues are good to about `M * eps64 * lambda_max`. Against a float64 SVD this leaves alpha
unchanged to 5e-13 at half the cost; a float32 Gram matrix would give negative eigenvalues.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ww_train.matrices import WeightMatrix

CHUNK_BYTES = 1 << 27
"""Size of the float64 copy that `gram` makes of a matrix at a time."""


def gram(stack: Tensor, scale: float = 1.0) -> Tensor:
    """Gram matrices of the shorter side in float64.

    Args:
        stack: `(rf, rows, cols)` weights of any floating dtype.
        scale: Factor c on the weights.

    Returns:
        `(rf, M, M)` float64 on the same device: `c² WᵀW` if rows >= cols, else `c² W Wᵀ`.

    Cost: `2 N M²` operations and `CHUNK_BYTES` beyond the result; no synchronisation. TF32 does not
    apply to float64.
    """
    rf, rows, cols = stack.shape
    tall = stack if rows >= cols else stack.mT
    M = tall.shape[-1]
    step = max(1, CHUNK_BYTES // (8 * rf * M))
    result = stack.new_zeros(rf, M, M, dtype=torch.float64)
    for start in range(0, tall.shape[1], step):
        part = tall[:, start : start + step].to(torch.float64)
        result.baddbmm_(part.mT, part)
    return result.mul_(scale * scale)


def gram_eigenvalues(grams: Sequence[Tensor]) -> list[Tensor]:
    """Eigenvalues of stacks of Gram matrices of one size M, in one batch.

    Args:
        grams: Tensors `(rf_i, M, M)` on one device.

    Returns:
        One float64 tensor `(rf_i * M,)` each, sorted ascending, rounding below zero clamped to zero.
        All NaN where a Gram matrix was not finite, all infinite where the solver failed.

    Cost: about `(4/3) M³` operations a matrix; one synchronisation on the CPU path of LAPACK errors.
    """
    batch = torch.cat(list(grams))
    finite = batch.isfinite().all(dim=-1).all(dim=-1)
    batch = torch.where(finite[:, None, None], batch, 0.0)
    try:
        evals = torch.linalg.eigvalsh(batch)
    except RuntimeError:
        evals = _one_by_one(batch)
    evals = evals.clamp_min_(0.0).masked_fill_(~finite[:, None], torch.nan)
    return [part.flatten().sort().values for part in evals.split([len(g) for g in grams])]


def _one_by_one(batch: Tensor) -> Tensor:
    """Eigenvalues where the batch as a whole failed, so that one bad matrix spoils only itself."""
    evals = batch.new_empty(batch.shape[:2])
    for i, matrix in enumerate(batch):
        try:
            evals[i] = torch.linalg.eigvalsh(matrix)
        except RuntimeError:
            evals[i] = torch.inf
    return evals


def eigenvalues(matrix: WeightMatrix) -> Tensor:
    """Eigenvalues of WᵀW of one layer, all slices pooled, ascending; see `gram_eigenvalues`."""
    return gram_eigenvalues([gram(matrix.stack, matrix.scale)])[0]
