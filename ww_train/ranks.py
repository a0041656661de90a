"""Sharing layers between the processes of a torch.distributed group."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """Which rank gets which piece of work: the heaviest first, each to the least loaded rank.

    The longest rank is at most 4/3 of the best possible (Graham, SIAM J. Applied Math. 17 (1969)
    416). Equal pieces are dealt forth and back: in a model kinds of layers alternate, and those of a
    kind would all go to one rank. The same on every rank.

    Args:
        costs: Cost of each piece, in any unit.
        ranks: Number of ranks.
    """
    loads = [(0.0, 0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for turn, i in enumerate(sorted(range(len(costs)), key=lambda i: -costs[i])):
        load, _, owners[i] = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[i], -turn, owners[i]))
    return owners


def on_device(devices: Iterable[torch.device | None]) -> AbstractContextManager[object]:
    """The first CUDA device among some is the current one: through it NCCL sends Python objects.

    A training loop that moves its model with `to(rank)` need not have called
    `torch.cuda.set_device`: without this all ranks would meet on the first device.

    Args:
        devices: Those of the layers; without a CUDA device among them nothing changes.
    """
    cuda = next((device for device in devices if device and device.type == "cuda"), None)
    return nullcontext() if cuda is None else torch.cuda.device(cuda)


def gather(own: T, group: dist.ProcessGroup | None) -> list[T]:
    """What every rank of a group has, in the order of the ranks; a collective.

    With NCCL it is sent through the current CUDA device, see `on_device`.
    """
    everything: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everything, own, group)
    return everything  # type: ignore[return-value]


def together(step: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """What a step returns on this rank; a collective, but the step itself must hold none.

    If it raises on any rank it raises on all, so that nobody waits for one that has given up.

    Args:
        step: What to do.
        group: The ranks that do it; None if this process is alone.

    Raises:
        RuntimeError: If another rank failed, with its reason.
    """
    if group is None:
        return step()
    try:
        result = step()
    except Exception as error:
        gather(f"rank {dist.get_rank(group)}: {error}", group)
        raise
    for reason in gather("", group):
        if reason:
            raise RuntimeError(reason)
    return result


NO_ROOM = "no memory to gather it on every process"
"""Why a sharded layer is skipped, on all processes alike."""


def gathered(sharded: Any) -> Tensor | None:
    """A DTensor as a whole; a collective of its mesh.

    Returns:
        The same values on every process, or None on all if one has no memory for them.
    """
    if shared_room(sharded) is None:
        return None
    whole: Tensor = sharded.full_tensor()
    return whole.detach()


def shared_room(sharded: Any) -> Tensor | None:
    """Memory for a DTensor as a whole, if every process has it; a collective of its mesh.

    A process that failed between two collectives would leave the others in the second, or meet them
    there with something else. Waits for the device.

    Returns:
        A tensor of its shape, not filled, or None on all processes if one has no memory for it.
    """
    there = torch.ones((), dtype=torch.int32, device=sharded.device)
    whole: Tensor | None = None
    try:
        whole = room(sharded)
    except (RuntimeError, MemoryError):  # on the CPU a lack of memory has no type of its own
        there.zero_()
    mesh = sharded.device_mesh
    for dim in range(mesh.ndim):
        dist.all_reduce(there, dist.ReduceOp.MIN, mesh.get_group(dim))
    return whole if there.item() else None


def room(sharded: Any) -> Tensor:
    """Memory for a DTensor as a whole, while there is as much again to gather or to shard it with.

    The other half goes back to the allocator, which has it ready for what follows.
    """
    size, shape = sharded.device_mesh.size(), list(sharded.shape)
    for dim in {p.dim for p in sharded.placements if hasattr(p, "dim")}:
        shape[dim] = -(-shape[dim] // size) * size  # shards are padded while they are sent
    one, _ = (torch.empty(shape, dtype=sharded.dtype, device=sharded.device) for _ in range(2))
    return one.flatten()[: sharded.numel()].view(sharded.shape)
