"""Projecting weights that are sharded over processes (FSDP2, tensor parallel): gathered, one each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ww_train.ranks import NO_ROOM, gather, gathered, on_device, shared_room
from ww_train.steering.projection import Projected
from ww_train.steering.replicas import portable
from ww_train.steering.tasks import Failed, Outcome, Task, project_all_
from ww_train.weights.matrices import Deferred, Skipped


@torch.no_grad()
def project_shards_(tasks: Sequence[Task], strength: float) -> list[Outcome]:
    """Project sharded matrices, as many parameters at a time as there are ranks.

    Each parameter is gathered by all ranks of its mesh, projected by one of them, sent to the others
    and written into everybody's shard. A rank holds at most two whole parameters at a time, and needs
    room for a third. One that any rank has no memory for is `Failed` on all, and left as it is.

    Args:
        tasks: The same on every rank, of `sharded` matrices.
        strength: The same on every rank.

    Returns:
        The results of all, on every rank.
    """
    results: dict[int, Outcome] = {}
    meshes: dict[Any, list[list[int]]] = {}
    for unit in _units(tasks):
        mesh = tasks[unit[0]].matrix.parameter.device_mesh  # type: ignore[union-attr]
        meshes.setdefault(mesh, []).append(unit)
    for mesh, units in meshes.items():
        group = _group(mesh)
        if group is None:
            reason = f"sharded over a mesh {tuple(mesh.shape)} that does not span all processes"
            results |= {i: Skipped(tasks[i].matrix.name, reason) for unit in units for i in unit}
            continue
        ranks = dist.get_world_size(group)
        with on_device(tasks[unit[0]].matrix.device for unit in units):
            for start in range(0, len(units), ranks):
                results |= _round(tasks, units[start : start + ranks], strength, group)
    return [results[i] for i in range(len(tasks))]


def _units(tasks: Sequence[Task]) -> list[list[int]]:
    """The tasks of each parameter, the heaviest first, so that those of a round are alike."""
    units: dict[int, list[int]] = {}
    for i, task in enumerate(tasks):
        units.setdefault(id(task.matrix.parameter), []).append(i)
    return sorted(units.values(), key=lambda unit: -sum(tasks[i].cost for i in unit))


def _group(mesh: Any) -> dist.ProcessGroup | None:
    if mesh.ndim == 1:
        group: dist.ProcessGroup = mesh.get_group()
        return group
    return dist.group.WORLD if mesh.size() == dist.get_world_size() else None


def _round(
    tasks: Sequence[Task], units: Sequence[list[int]], strength: float, group: dist.ProcessGroup
) -> dict[int, Outcome]:
    """One parameter for each rank."""
    rank = dist.get_rank(group)
    results: dict[int, Outcome] = {}
    mine: Tensor | None = None
    for turn, unit in enumerate(units):
        whole = gathered(_parameter(tasks[unit[0]]))
        if whole is None:
            results |= _left(tasks, unit)
        elif turn == rank:
            mine = whole
        del whole
    own: dict[int, Outcome] = {}
    if mine is not None:
        unit = units[rank]
        done = project_all_([_part(tasks[i], mine) for i in unit], strength)
        own = {i: portable(outcome) for i, outcome in zip(unit, done, strict=True)}
    results |= {i: outcome for share in gather(own, group) for i, outcome in share.items()}
    for turn, unit in enumerate(units):
        if any(isinstance(results[i], Projected) for i in unit):
            parameter, projected = _parameter(tasks[unit[0]]), mine if turn == rank else None
            if not _spread_(parameter, projected, dist.get_global_rank(group, turn), group):
                results |= _left(tasks, unit)
    return results


def _left(tasks: Sequence[Task], unit: Sequence[int]) -> dict[int, Outcome]:
    """The results of a parameter that some rank has no memory for."""
    error = torch.OutOfMemoryError(NO_ROOM)
    return {i: Failed(tasks[i].matrix.name, NO_ROOM, error) for i in unit}


def _spread_(
    parameter: Any, projected: Tensor | None, source: int, group: dist.ProcessGroup
) -> bool:
    """Send what one rank has to all and write it into the shards, if all have room to receive it."""
    received = shared_room(parameter)
    if received is None:
        return False
    whole = received if projected is None else projected
    del received
    dist.broadcast(whole, source, group=group)
    _write_(parameter, whole)
    return True


def _parameter(task: Task) -> Any:
    return task.matrix.parameter


def _part(task: Task, whole: Tensor) -> Task:
    """The same task on the whole parameter, in this process's memory."""
    weights = task.matrix.weights
    assert isinstance(weights, Deferred)
    assert weights.view is not None
    view = weights.view
    offset = whole.storage_offset() + view.storage_offset()
    stack = whole.as_strided(view.shape, view.stride(), offset)
    matrix = replace(task.matrix, weights=stack, read_only=None, parameter=whole)
    return replace(task, matrix=matrix)


def _write_(parameter: Any, whole: Tensor) -> None:
    """Each rank takes its shard of a tensor that all have; no communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    parameter.copy_(everywhere.redistribute(placements=parameter.placements))
