"""What becomes of an optimizer's momentum when the weights under it are projected.

A policy is a function of the momentum and the linear operator that was applied to the weights, and
returns the new momentum. `benchmarks/evidence.md` compares the three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ww_train.linalg import all_finite
from ww_train.steering.projection import Operator
from ww_train.weights.matrices import WeightMatrix

Momentum: TypeAlias = Callable[[Tensor, Operator], Tensor]

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""Where the optimizers of torch.optim keep their momentum: Adam and its kin; SGD, RMSprop and Muon."""


def keep(momentum: Tensor, operator: Operator) -> Tensor:
    """Leave it as it is, the default."""
    return momentum


def project(momentum: Tensor, operator: Operator) -> Tensor:
    """Apply to it what was applied to the weights."""
    return operator(momentum)


def reset(momentum: Tensor, operator: Operator) -> Tensor:
    """Start again from zero."""
    return torch.zeros_like(momentum)


def change_momentum_(
    policy: Momentum, matrix: WeightMatrix, state: Mapping[str, Any], operator: Operator
) -> None:
    """Apply a policy to the momentum of one projected matrix, in place and only if finite.

    If the policy raises, no buffer has changed.

    Args:
        policy: One of the functions above, or your own.
        matrix: The matrix that was projected; a view of its parameter.
        state: The optimizer's state of that parameter.
        operator: What was applied to the weights.
    """
    buffers = list(momentum_buffers(matrix, state))
    changed = [policy(buffer, operator).to(buffer.dtype) for buffer in buffers]
    for buffer, new in zip(buffers, changed, strict=True):
        if all_finite(new):
            buffer.copy_(new)


def momentum_buffers(matrix: WeightMatrix, state: Mapping[str, Any]) -> Iterator[Tensor]:
    """The momentum of a matrix: the same view of each first moment as the matrix is of its weights."""
    weights, stack = matrix.parameter, matrix.stack
    if weights is None:
        return
    for name in FIRST_MOMENTS:
        buffer = state.get(name)
        if isinstance(buffer, Tensor) and buffer.shape == weights.shape:
            if buffer.stride() != weights.stride():
                continue  # no view; no optimizer of torch.optim makes such a buffer
            offset = buffer.storage_offset() + stack.storage_offset() - weights.storage_offset()
            yield buffer.as_strided(stack.shape, stack.stride(), offset)
