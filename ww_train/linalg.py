"""Eigenvalues of WᵀW: which arithmetic, and how many layers at a time.

A product of two float32 numbers is exact in float64, so only the summation of a float64 Gram matrix
rounds and its eigenvalues are good to about `M * eps64 * lambda_max`. Against a float64 SVD this
leaves alpha unchanged to 5e-13 at half the cost, and it is the default. TF32 never applies to float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 25
"""Size of the float64 copy of a part of a matrix that `gram` makes at a time."""

BATCH_BYTES = 1 << 28
"""Gram matrices on an accelerator that may wait for others of their size."""

LARGE = 1024
"""On the CPU, smaller Gram matrices get one core each; larger ones all cores, one after another."""

Eigensolver: TypeAlias = Callable[[Tensor], Tensor]
"""From a stack `(rf, rows, cols)` to its eigenvalues `(rf, M)`, ascending, float64."""


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
    except RuntimeError:  # no convergence, or no memory
        evals = _one_by_one(grams)
    return evals.clamp_min_(0.0).masked_fill_(~finite[:, None], torch.nan)


def _one_by_one(grams: Tensor) -> Tensor:
    """Eigenvalues where the batch as a whole failed: one bad matrix must spoil only itself."""
    evals = grams.new_empty(grams.shape[:2])
    for i, matrix in enumerate(grams):
        try:
            evals[i] = torch.linalg.eigvalsh(matrix)
        except RuntimeError:
            evals[i] = torch.inf
    return evals


@dataclass(frozen=True, eq=False)
class Job:
    """Stacks that are made when their turn comes, so that only a few are in memory.

    Attributes:
        stacks: Makes the stacks to decompose, all of one shape.
        M: Smaller dimension of a slice.
        device: Where the stacks are.
    """

    stacks: Callable[[], Iterable[Tensor]]
    M: int
    device: torch.device


def decompose(
    jobs: Sequence[Job], solver: Eigensolver = gram_eigenvalues, done: Callable[[], object] = bool
) -> list[list[Tensor]]:
    """Eigenvalues of many layers, ascending, float64, in host memory.

    On an accelerator the Gram matrices of one size are decomposed as a batch. On the CPU small layers
    are spread over the cores, because LAPACK gains nothing from a second core there; large layers use
    all cores in turn.

    Args:
        jobs: What to decompose.
        solver: Arithmetic to use; batching applies to `gram_eigenvalues` only.
        done: Called after each job.

    Returns:
        For each job one tensor `(rf, M)` a stack.

    Cost: see `gram` and `symmetric_eigenvalues`; one copy to the host a job on the CPU path, one in
    all for each accelerator.
    """
    results: list[list[Tensor]] = [[] for _ in jobs]

    def solve(i: int) -> None:
        with torch.no_grad():
            results[i] = [solver(stack) for stack in jobs[i].stacks()]

    cpu = [i for i, job in enumerate(jobs) if job.device.type == "cpu"]
    small = [i for i in cpu if jobs[i].M < LARGE]
    for _ in _on_all_cores(solve, small):
        done()
    for i in cpu:
        if jobs[i].M >= LARGE:
            solve(i)
            done()
    for device in {job.device for job in jobs if job.device.type != "cpu"}:
        chosen = [i for i, job in enumerate(jobs) if job.device == device]
        if solver is gram_eigenvalues:
            _batched(jobs, chosen, results, done)
        else:
            for i in chosen:
                solve(i)
                done()
        flat = [evals for i in chosen for evals in results[i]]
        together = torch.cat([evals.flatten() for evals in flat]).cpu()
        host = iter(torch.split(together, [evals.numel() for evals in flat]))
        for i in chosen:
            results[i] = [next(host).view_as(evals) for evals in results[i]]
    return results


def _on_all_cores(solve: Callable[[int], None], indices: list[int]) -> Iterator[None]:
    """Solve each on one core; yields after each, in order."""
    threads = torch.get_num_threads()
    if threads == 1 or len(indices) < 2:
        yield from map(solve, indices)
        return
    try:
        # the number of threads is a property of each thread; new ones inherit the last one set
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(solve, indices)
    finally:
        torch.set_num_threads(threads)


def _batched(
    jobs: Sequence[Job],
    chosen: list[int],
    results: list[list[Tensor]],
    done: Callable[[], object],
) -> None:
    """Decompose the Gram matrices of equal size together, at most `BATCH_BYTES` at a time."""
    by_size: dict[int, list[int]] = {}
    for i in chosen:
        by_size.setdefault(jobs[i].M, []).append(i)
    for indices in by_size.values():
        waiting: list[tuple[int, Tensor]] = []
        for i in indices:
            waiting += [(i, gram(stack)) for stack in jobs[i].stacks()]
            if sum(g.nbytes for _, g in waiting) >= BATCH_BYTES or i == indices[-1]:
                evals = symmetric_eigenvalues(torch.cat([g for _, g in waiting]))
                for (owner, _), part in zip(
                    waiting, torch.split(evals, [len(g) for _, g in waiting]), strict=True
                ):
                    results[owner].append(part)
                waiting = []
            done()
