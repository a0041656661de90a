"""Copies of layers that training does not change while they are measured in the background."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from ww_train import Skipped
from ww_train.batching import BATCH_BYTES
from ww_train.weights.matrices import WeightMatrix
from ww_train.weights.stored import CPU, Deferred

from .survey import work_of

Layers: TypeAlias = "list[WeightMatrix | Skipped]"
Entry: TypeAlias = "tuple[int, WeightMatrix | Skipped]"
"""Position of a layer in the model, and the layer."""

Failure = TypeVar("Failure", bound=BaseException)


class Elsewhere(Skipped):
    """A layer that is not in the lot, or in that of another rank."""


def without_frames(error: Failure) -> Failure:
    """The error alone: the variables of the functions that it came through would keep the copies."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def copy_bytes(matrix: WeightMatrix | Skipped, whole: bool) -> int:
    """Size of a layer's copy; 0 if it will be skipped, for which its weights are not needed."""
    if isinstance(matrix, Skipped) or not work_of(matrix):
        return 0
    entries, weights = matrix.num_evals * matrix.N, matrix.weights
    if isinstance(weights, Deferred) and weights.core is not None:  # in float64
        return 8 * (matrix.max_rank**2 // matrix.rf + entries * whole)
    return entries * matrix.dtype.itemsize


def copies_of(number: int, lot: Sequence[Entry], mine: Sequence[bool], *, whole: bool) -> Layers:
    """Copies of this rank's layers at their places in the model.

    Raises:
        Exception: What went wrong first; all the same a rank takes part in gathering what is sharded.
    """
    copies: Layers = [Elsewhere("", "") for _ in range(number)]
    failure: Exception | None = None
    for (i, matrix), own in zip(lot, mine, strict=True):
        if isinstance(matrix, Skipped) or not copy_bytes(matrix, whole):
            copies[i] = matrix if own else copies[i]
        elif own or matrix.collective:
            beside = sum(copy_bytes(copy, whole) for copy in copies if _on(copy, matrix.device))
            try:
                copy = _copied(matrix, whole=whole, beside=beside)
                copies[i] = copy if own else copies[i]
            except Exception as error:
                failure = failure or without_frames(error)
    if failure is not None:
        raise failure
    return copies


def _on(copy: WeightMatrix | Skipped, device: torch.device) -> bool:
    return isinstance(copy, WeightMatrix) and copy.device == device


def makers(matrix: WeightMatrix, *, whole: bool) -> Sequence[Callable[[], Tensor]]:
    """What makes the tensors that a copy holds.

    Of a low-rank product this is its core, which has its spectrum, and if the `whole` is needed the
    product.
    """
    weights = matrix.weights
    if isinstance(weights, Tensor):
        return [lambda: weights]
    if weights.core is None:
        return [weights.load]
    return [weights.core, weights.load][: 1 + whole]


def _copied(matrix: WeightMatrix, *, whole: bool, beside: int) -> WeightMatrix:
    """A layer with weights of its own: on its CUDA device if there is room, else on the CPU.

    Args:
        matrix: The layer.
        whole: See `makers`.
        beside: Bytes of the copies that the device holds already.
    """
    room = _has_room(matrix.device, beside + copy_bytes(matrix, whole))
    if matrix.deferred and not room:
        matrix = matrix.to(CPU)
    parts: list[Tensor] = []
    failure: Exception | None = None
    for make in makers(matrix, whole=whole):  # to the end: other processes may wait in it
        try:
            parts.append(_own(make().detach(), fresh=matrix.deferred, room=room))
        except Exception as error:
            failure = failure or without_frames(error)
    if failure is not None:
        raise failure
    weights = matrix.weights
    if isinstance(weights, Tensor) or weights.core is None:
        return replace(matrix, weights=parts[0], parameter=None)
    product = Deferred(
        weights.shape,
        weights.dtype,
        lambda: parts[1],
        parts[-1].device,
        rank=weights.rank,
        core=lambda: parts[0],
    )
    return replace(matrix, weights=product, parameter=None)


def _own(tensor: Tensor, *, fresh: bool, room: bool) -> Tensor:
    """A tensor that training does not change; `fresh` is one that was made for this."""
    device = tensor.device if tensor.is_cuda and room else CPU
    if fresh and tensor.device == device:
        return tensor
    try:
        return tensor.to(device, copy=True)
    except torch.OutOfMemoryError:
        return tensor.to(CPU)


def _has_room(device: torch.device, copies: int) -> bool:
    """Whether a CUDA device can hold copies, and what measuring them takes, beside training.

    Training will need again what it had at its peak; the rest is free, or PyTorch keeps it for later.
    Measuring takes up to five times what may wait as Gram matrices: these, one matrix of all of
    them, the solver's copy of it and its workspace, and a layer in float64.
    """
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return copies + 5 * BATCH_BYTES <= free
