"""Sharing layers between the processes of a torch.distributed group."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

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


def gather(own: T, group: dist.ProcessGroup | None) -> list[T]:
    """What every rank of a group has, in the order of the ranks; a collective."""
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
