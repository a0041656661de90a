"""Eigenvalues of WᵀW: which arithmetic.

A product of two float32 numbers is exact in float64, so only the summation of a float64 Gram matrix
rounds and its eigenvalues are good to about `M * eps64 * lambda_max`. Against a float64 SVD this
leaves alpha unchanged to 5e-13 at half the cost, and it is the default. TF32 never applies to float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 25
"""Size of the float64 copy of a part of a matrix that `gram` makes at a time."""

Eigensolver: TypeAlias = Callable[[Tensor], Tensor]
"""From a stack `(rf, rows, cols)` to its eigenvalues `(rf, M)`, ascending, float64."""


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; Apple's GPUs do not."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except torch.OutOfMemoryError:  # no room even for this
        return True
    except (RuntimeError, TypeError):
        return False
    return True


def all_finite(values: Tensor) -> Tensor:
    """Whether no number is NaN or infinite, as a boolean on the same device.

    Cost: one pass without temporaries, a tenth of what `isfinite` takes; no synchronisation.
    """
    low, high = torch.aminmax(values)  # NaN if there is one
    return low.isfinite() & high.isfinite()


def gram(stack: Tensor, scale: float = 1.0) -> Tensor:
    """Gram matrices of the shorter side in float64.

    Args:
        stack: `(rf, rows, cols)` weights of any floating dtype.
        scale: Factor c on the weights.

    Returns:
        `(rf, M, M)` float64 on the same device: `c² WᵀW` if rows >= cols, else `c² W Wᵀ`.

    Cost: `2 N M²` operations and `CHUNK_BYTES` beyond the result; no synchronisation.
    """
    rf, rows, cols = stack.shape
    tall = stack if rows >= cols else stack.mT
    M = tall.shape[-1]
    step = max(1, CHUNK_BYTES // (8 * rf * M))
    result = stack.new_zeros(rf, M, M, dtype=torch.float64)
    for start in range(0, tall.shape[1], step):
        part = tall[:, start : start + step].to(torch.float64)
        result.baddbmm_(part.mT, part)
    result *= scale * scale
    return result


def gram_eigenvalues(stack: Tensor) -> Tensor:
    """Eigenvalues from the float64 Gram matrix, the default eigensolver."""
    return symmetric_eigenvalues(gram(stack))


def svd_eigenvalues(stack: Tensor) -> Tensor:
    """Eigenvalues from a float64 SVD: twice the cost, exact below `M * eps64 * lambda_max` too."""
    svals: Tensor = torch.linalg.svdvals(stack.to(torch.float64))
    return svals.square().flip(-1)


def float32_eigenvalues(stack: Tensor) -> Tensor:
    """Eigenvalues from a float32 Gram matrix: half the cost, for alpha and norms only.

    Eigenvalues below about `M * eps32 * lambda_max` are noise and enter ERG tail, ranks and entropy;
    `benchmarks/accuracy.py` prints how much.
    """
    tall = stack.to(torch.float32)
    tall = tall if tall.shape[-2] >= tall.shape[-1] else tall.mT
    evals: Tensor = torch.linalg.eigvalsh(tall.mT @ tall)
    return evals.clamp_min_(0.0).to(torch.float64)


def symmetric_eigenvalues(grams: Tensor) -> Tensor:
    """Eigenvalues of `(b, M, M)` Gram matrices, ascending, rounding below zero clamped to zero.

    A matrix that is not finite gives NaN, one for which the solver fails infinity; the others of the
    batch are not affected.

    Cost: about `(4/3) M³` operations a matrix; LAPACK's error code is one synchronisation a batch.
    """
    finite = grams.isfinite().all(dim=-1).all(dim=-1)
    grams = torch.where(finite[:, None, None], grams, 0.0)
    try:
        evals: Tensor = torch.linalg.eigvalsh(grams)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # no convergence
        evals = _one_by_one(grams)
    return evals.clamp_min_(0.0).masked_fill_(~finite[:, None], torch.nan)


def _one_by_one(grams: Tensor) -> Tensor:
    """Eigenvalues where the batch as a whole failed: one bad matrix must spoil only itself."""
    return torch.stack([_alone(matrix) for matrix in grams])


def _alone(matrix: Tensor) -> Tensor:
    """Eigenvalues of one matrix; where the solver of an accelerator gives up, by LAPACK."""
    try:
        evals: Tensor = torch.linalg.eigvalsh(matrix)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if matrix.device.type == "cpu":
            return matrix.new_full(matrix.shape[:1], torch.inf)
        return _alone(matrix.cpu()).to(matrix.device)
    return evals
