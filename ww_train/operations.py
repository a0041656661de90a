"""The operations that `ww_train.calibration` times, on stacks of square matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ww_train.cores import one_core_each
from ww_train.linalg import gram

Operation: TypeAlias = Callable[[Tensor], object]
"""What is timed, of a stack `(number, n, n)`."""


def noise(device: torch.device, dtype: torch.dtype, n: int, number: int = 1) -> Tensor:
    """A stack of Gaussian matrices."""
    generator = torch.Generator(device).manual_seed(n)
    made = torch.randn(number, n, n, generator=generator, dtype=torch.float32, device=device)
    return made.to(dtype)


def symmetric(device: torch.device, dtype: torch.dtype, n: int, number: int = 1) -> Tensor:
    """A stack of symmetric matrices."""
    made = noise(device, dtype, n, number)
    return made + made.mT


def eigenvalues(stack: Tensor) -> Tensor:
    """As one batch."""
    found: Tensor = torch.linalg.eigvalsh(stack)
    return found


def eigenvalues_on_host(stack: Tensor) -> Tensor:
    """In float64 on the host, with the copies."""
    return eigenvalues(stack.cpu().to(torch.float64)).to(stack)


def eigenvectors(stack: Tensor) -> Tensor:
    """As one batch."""
    found: Tensor = torch.linalg.eigh(stack)[1]
    return found


def eigenvectors_on_host(stack: Tensor) -> Tensor:
    """In float64 on the host, with the copies."""
    return eigenvectors(stack.cpu().to(torch.float64)).to(stack)


def spread_eigenvalues(stack: Tensor) -> list[object]:
    """One core for each matrix."""
    return _on_all_cores(eigenvalues, stack)


def spread_eigenvectors(stack: Tensor) -> list[object]:
    """One core for each matrix."""
    return _on_all_cores(eigenvectors, stack)


def gram_matrices(stack: Tensor) -> Tensor:
    """In float64, as `measure` makes them."""
    return gram(stack)


def gram_on_host(stack: Tensor) -> Tensor:
    """In float64 on the host."""
    return gram(stack.cpu())


def shuffled(stack: Tensor) -> Tensor:
    """All entries in a random order."""
    generator = torch.Generator(stack.device).manual_seed(0)
    order = torch.randperm(
        stack.numel(), generator=generator, dtype=torch.int32, device=stack.device
    )
    return stack.reshape(-1).index_select(0, order)


def to_host(stack: Tensor) -> Tensor:
    """A copy in host memory."""
    return stack.to("cpu", copy=True)


def _on_all_cores(operation: Operation, stack: Tensor) -> list[object]:
    with one_core_each() as pool:
        return list(pool.map(operation, stack))
