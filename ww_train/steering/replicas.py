"""Projecting a model that several processes hold: each layer by one of them, the same on all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ww_train.ranks import deal, gather, on_device
from ww_train.steering.projection import Projected
from ww_train.steering.tasks import Failed, Outcome, Task, Then, project_all_
from ww_train.weights.matrices import WeightMatrix


@torch.no_grad()
def project_replicas_(
    tasks: Sequence[Task],
    strength: float,
    group: dist.ProcessGroup,
    then: Then | None = None,
    buffers: Callable[[WeightMatrix], Sequence[Tensor]] = lambda matrix: (),
) -> list[Outcome]:
    """Project a model that is replicated over a group: each layer by one rank, sent to the others.

    Every rank must call it with the same layers. The replicas are bitwise equal afterwards, and all
    ranks return the results of all.

    A rank that has no memory for a layer projects it on the CPU, and the others wait: a time limit of
    the group, ten minutes with NCCL by default, must allow for that.

    Args:
        tasks: The same on every rank.
        strength: The same on every rank.
        group: The processes that hold a replica each.
        then: See `project_all_`.
        buffers: Whatever else `then` changes of a matrix, to be sent as well.

    Raises:
        RuntimeError: On every rank, if the ranks hold different layers or come with different
            strengths; nothing is changed then.
    """
    owners = _owners(tasks, dist.get_world_size(group))
    mine = [i for i, owner in enumerate(owners) if owner == dist.get_rank(group)]
    with on_device(task.matrix.device for task in tasks):
        _agree([(t.matrix.name, _shapes(t, buffers)) for t in tasks], strength, group)
        own = project_all_([tasks[i] for i in mine], strength, then)
        done = {i: portable(outcome) for i, outcome in zip(mine, own, strict=True)}
        results = {i: outcome for share in gather(done, group) for i, outcome in share.items()}
    for i, task in enumerate(tasks):
        if isinstance(results[i], Projected):
            source = dist.get_global_rank(group, owners[i])
            for tensor in (task.matrix.stack, *buffers(task.matrix)):
                _broadcast_(tensor, source, group)
    return [results[i] for i in range(len(tasks))]


def _agree(layers: object, strength: float, group: dist.ProcessGroup) -> None:
    """Raise on every rank, before anything is changed, unless all are about to do the same."""
    everywhere = gather((layers, strength), group)
    if any(theirs != everywhere[0][0] for theirs, _ in everywhere):
        raise RuntimeError(
            "the ranks hold different layers: replicas= is for a model that every process of the "
            "group holds in full, as DistributedDataParallel does"
        )
    if any(theirs != strength for _, theirs in everywhere):
        strengths = ", ".join(f"{theirs:g}" for _, theirs in everywhere)
        raise RuntimeError(
            f"the ranks project with different strengths ({strengths}): make the schedule depend on "
            "what is the same on all ranks"
        )


def _shapes(
    task: Task, buffers: Callable[[WeightMatrix], Sequence[Tensor]]
) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in (task.matrix.stack, *buffers(task.matrix))]


def _owners(tasks: Sequence[Task], ranks: int) -> list[int]:
    """The rank of each task; all matrices of one parameter go to one rank."""
    units: dict[int, list[int]] = {}
    for i, task in enumerate(tasks):
        units.setdefault(id(task.matrix.parameter), []).append(i)
    dealt = deal([sum(tasks[i].cost for i in unit) for unit in units.values()], ranks)
    owner = {i: rank for unit, rank in zip(units.values(), dealt, strict=True) for i in unit}
    return [owner[i] for i in range(len(tasks))]


def _broadcast_(tensor: Tensor, source: int, group: dist.ProcessGroup) -> None:
    tensor = tensor.detach()
    whole = tensor.contiguous()
    dist.broadcast(whole, source, group=group)
    if whole.data_ptr() != tensor.data_ptr():
        tensor.copy_(whole)


def portable(outcome: Outcome) -> Outcome:
    """Without an exception that may not be picklable: the other ranks would wait for ever."""
    if isinstance(outcome, Failed):
        return Failed(outcome.name, outcome.reason, RuntimeError(outcome.reason))
    return outcome
