"""Projecting weights that are sharded over processes (FSDP2, tensor parallel): gathered, one each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ww_train.ranks import gather
from ww_train.steering.projection import Projected
from ww_train.steering.replicas import portable
from ww_train.steering.tasks import Outcome, Task, project_all_
from ww_train.weights.matrices import Deferred, Skipped


@torch.no_grad()
def project_shards_(tasks: Sequence[Task], strength: float) -> list[Outcome]:
    """Project sharded matrices, as many parameters at a time as there are ranks.

    Each parameter is gathered by all ranks of its mesh, projected by one of them, sent to the others
    and written into everybody's shard. A rank holds at most two whole parameters at a time.

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
    mine: Tensor | None = None
    for turn, unit in enumerate(units):
        whole = _parameter(tasks[unit[0]]).full_tensor()
        if turn == rank:
            mine = whole.detach()
    own: dict[int, Outcome] = {}
    if mine is not None:
        unit = units[rank]
        done = project_all_([_gathered(tasks[i], mine) for i in unit], strength)
        own = {i: portable(outcome) for i, outcome in zip(unit, done, strict=True)}
    results = {i: outcome for share in gather(own, group) for i, outcome in share.items()}
    for turn, unit in enumerate(units):
        if any(isinstance(results[i], Projected) for i in unit):
            parameter = _parameter(tasks[unit[0]])
            whole = mine if turn == rank else None
            if whole is None:
                whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            dist.broadcast(whole, dist.get_global_rank(group, turn), group=group)
            _write_(parameter, whole)
    return results


def _parameter(task: Task) -> Any:
    return task.matrix.parameter


def _gathered(task: Task, whole: Tensor) -> Task:
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
