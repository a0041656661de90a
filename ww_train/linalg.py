"""Eigenvalues of WᵀW: which arithmetic.

A product of two float32 numbers is exact in float64, so only the summation of a float64 Gram matrix
rounds and its eigenvalues are good to about `M * eps64 * lambda_max`. Against a float64 SVD this
leaves alpha unchanged to 5e-13 at half the cost, and it is the default. TF32 never applies to float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    with _shortages():
        result = stack.new_zeros(rf, M, M, dtype=torch.float64)
        for start in range(0, tall.shape[1], step):
            part = tall[:, start : start + step].to(torch.float64)
            result.baddbmm_(part.mT, part)
        result *= scale * scale
    return result


@contextmanager
def _shortages() -> Iterator[None]:
    """Too little memory for CUDA's libraries, as any other shortage."""
    try:
        yield
    except RuntimeError as error:
        if any(word in str(error) for word in _SHORT):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


_SHORT = ("CUDA error: out of memory", "STATUS_ALLOC_FAILED", "STATUS_NOT_INITIALIZED")


def gram_eigenvalues(stack: Tensor) -> Tensor:
    """Eigenvalues from the float64 Gram matrix, the default eigensolver."""
    return symmetric_eigenvalues(gram(stack))


def svd_eigenvalues(stack: Tensor) -> Tensor:
    """Eigenvalues from a float64 SVD: twice the cost, exact below `M * eps64 * lambda_max` too.

    What is not finite or fails, see `symmetric_eigenvalues`.
    """
    svals = _of_finite(stack.to(torch.float64), torch.linalg.svdvals)
    return svals.square().flip(-1)


def float32_eigenvalues(stack: Tensor) -> Tensor:
    """Eigenvalues from a float32 Gram matrix: half the cost, for alpha and norms only.

    Eigenvalues below about `M * eps32 * lambda_max` are noise and enter ERG tail, ranks and entropy;
    `benchmarks/accuracy.py` prints how much. On an accelerator, whose float32 products may be TF32,
    only the decomposition is in float32.
    """
    if stack.device.type != "cpu":
        return symmetric_eigenvalues(gram(stack).to(torch.float32)).to(torch.float64)
    tall = stack.to(torch.float32)
    tall = tall if tall.shape[-2] >= tall.shape[-1] else tall.mT
    with torch.autocast("cpu", enabled=False):
        return symmetric_eigenvalues(tall.mT @ tall).to(torch.float64)


def symmetric_eigenvalues(grams: Tensor) -> Tensor:
    """Eigenvalues of `(b, M, M)` Gram matrices, ascending, rounding below zero clamped to zero.

    A matrix that is not finite gives NaN, one for which the solver fails infinity; the others of the
    batch are not affected.

    Cost: about `(4/3) M³` operations a matrix; LAPACK's error code is one synchronisation a batch.
    """
    return _of_finite(grams, torch.linalg.eigvalsh).clamp_min_(0.0)


def symmetric_eigenvectors(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `(b, M)`, ascending, and eigenvectors `(b, M, M)`, as columns.

    Where the solver of an accelerator gives up, LAPACK is asked.

    Raises:
        torch.linalg.LinAlgError: If a matrix is not finite, or there is no convergence.

    Cost: about `9 M³` operations a matrix; one synchronisation a batch.
    """
    try:
        evals, vectors = torch.linalg.eigh(grams)
        return evals, vectors
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if grams.device.type == "cpu":
            raise
    evals, vectors = torch.linalg.eigh(grams.cpu())
    return evals.to(grams.device), vectors.to(grams.device)


Solve: TypeAlias = Callable[[Tensor], Tensor]
"""From matrices, many or one, to the eigenvalues or singular values of each."""


def _of_finite(matrices: Tensor, solve: Solve) -> Tensor:
    """What `solve` gives; NaN where a matrix is not finite, infinity where it fails."""
    finite = matrices.isfinite().all(dim=-1).all(dim=-1)
    matrices = torch.where(finite[:, None, None], matrices, 0.0)
    try:
        values = solve(matrices)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # one bad matrix must spoil only itself
        values = torch.stack([_alone(matrix, solve) for matrix in matrices])
    return values.masked_fill_(~finite[:, None], torch.nan)


def _alone(matrix: Tensor, solve: Solve) -> Tensor:
    """Of one matrix; where the solver of an accelerator gives up, by LAPACK."""
    try:
        return solve(matrix)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if matrix.device.type == "cpu":
            return matrix.new_full((min(matrix.shape),), torch.inf)
    return _alone(matrix.cpu(), solve).to(matrix.device)
