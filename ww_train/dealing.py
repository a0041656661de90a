"""Reading the layers of one model with several processes: each reads a part, all know the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch.distributed as dist

from ww_train.planning import Plan
from ww_train.ranks import deal, gather, on_device

T = TypeVar("T")


def read_dealt(
    plans: Sequence[Plan],
    costs: Sequence[float],
    read: Callable[[Sequence[Plan]], list[T]],
    group: dist.ProcessGroup | None,
) -> list[T]:
    """What `read` gives for each layer, in their order; a collective, with the same result on all.

    Layers that every process has are dealt by cost. Sharded ones are read in turns of one for each
    process: all gather the layers of a turn, one after another, and each keeps its own. One that has
    no memory for a layer goes on with it on the CPU, and the others wait: a time limit of the group,
    ten minutes with NCCL by default, must allow for that.

    Args:
        plans: The same layers on every process.
        costs: What reading each of them costs, in any unit.
        read: Reads some of the layers; must hold no collective but the loading of the layers.
        group: The processes; None if this one is alone.

    Raises:
        RuntimeError: On every process, if one of them failed or they hold different layers.
    """
    if group is None:
        return read(plans)
    with on_device(plan.matrix.device for plan in plans):
        parts = _parts(plans, costs, read, group)
    failed = [part for part in parts if isinstance(part, str)]
    if failed:
        raise RuntimeError("; ".join(dict.fromkeys(failed)))
    whole = {i: result for part in parts if isinstance(part, dict) for i, result in part.items()}
    return [whole[i] for i in range(len(plans))]


def _parts(
    plans: Sequence[Plan],
    costs: Sequence[float],
    read: Callable[[Sequence[Plan]], list[T]],
    group: dist.ProcessGroup,
) -> list[dict[int, T] | str]:
    """What each process read, by position, or what went wrong there."""
    layers = [(plan.matrix.name, plan.matrix.shape, plan.collective) for plan in plans]
    if any(theirs != layers for theirs in gather(layers, group)):
        raise RuntimeError("the processes that are to share the layers hold different ones")
    mine = _mine(plans, costs, dist.get_rank(group), dist.get_world_size(group))
    own = _attempt(read, [plans[i] for i in mine])
    return gather(own if isinstance(own, str) else dict(zip(mine, own, strict=True)), group)


def _mine(plans: Sequence[Plan], costs: Sequence[float], rank: int, size: int) -> list[int]:
    """Positions of the layers that a process reads, those that are sharded first."""
    mine = []
    for turn in _turns(plans, costs, size):
        own = turn[rank % len(turn)]  # in a short turn two processes read the same
        plans[own].turn = tuple(plans[i] for i in turn)
        mine.append(own)
    here = [i for i, plan in enumerate(plans) if not plan.collective]
    owners = deal([costs[i] for i in here], size)
    return mine + [i for i, owner in zip(here, owners, strict=True) if owner == rank]


def _turns(plans: Sequence[Plan], costs: Sequence[float], size: int) -> list[list[int]]:
    """Sharded layers as many at a time as there are processes.

    Those of a turn have one size, and small ones come first, as in `decompose`: so all processes
    gather them in the same order.
    """
    by_size: dict[int, list[int]] = {}
    for i in sorted(range(len(plans)), key=lambda i: (plans[i].matrix.M, -costs[i])):
        if plans[i].collective:
            by_size.setdefault(plans[i].matrix.M, []).append(i)
    return [
        indices[start : start + size]
        for indices in by_size.values()
        for start in range(0, len(indices), size)
    ]


def _attempt(read: Callable[[Sequence[Plan]], list[T]], plans: Sequence[Plan]) -> list[T] | str:
    """What was read or, as text because it is sent to other processes, what went wrong.

    A process that failed still takes part in gathering what is sharded.
    """
    try:
        return read(plans)
    except Exception as error:
        for plan in plans:
            with suppress(Exception):
                plan.attend()
        return f"{type(error).__name__}: {error}"
