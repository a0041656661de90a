"""What happens at one boundary: which layers need it, and the projection of them wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor

from ww_train.analysis import measure
from ww_train.ranks import gather
from ww_train.report import LayerReport
from ww_train.steering.momentum import Momentum, change_momentum_, keep, momentum_buffers
from ww_train.steering.projection import Operator, SpectralProjection
from ww_train.steering.replicas import project_replicas_
from ww_train.steering.shards import project_shards_
from ww_train.steering.tasks import Failed, Outcome, Task, Then, project_all_
from ww_train.weights.matrices import Skipped, WeightMatrix
from ww_train.weights.weight_matrix import sharded

Need: TypeAlias = Callable[[LayerReport], bool]
"""Whether a layer needs a projection, such as `lambda layer: layer.alpha < 2 or layer.num_traps`."""


def needed(
    targets: Sequence[Task | Skipped], when: Need, group: dist.ProcessGroup | None = None
) -> list[Task | Skipped]:
    """Measure the targets, traps included, and skip those that need nothing.

    Args:
        targets: The same on every rank of the group.
        when: A predicate on the layer's report. A layer that cannot be measured is skipped, one of
            which it raises is `Failed`, and one that its projection finds too small is not measured.
        group: The ranks that must agree; the first one's answer holds.

    Cost: that of `measure(..., randomize=True)`, shared by the group.
    """
    matrices = [t.matrix for t in targets if isinstance(t, Task) and not _too_small(t)]
    report = measure(matrices, randomize=True, min_evals=1, max_evals=None, group=group)
    left = {layer.name: layer for layer in report.skipped}
    left |= {layer.name: answer for layer in report if (answer := _refused(when, layer))}
    if group is not None:
        left = gather(left, group)[0]
    return [left.get(t.matrix.name, t) if isinstance(t, Task) else t for t in targets]


def _too_small(task: Task) -> bool:
    projection = task.projection
    return (
        isinstance(projection, SpectralProjection) and task.matrix.num_evals < projection.min_evals
    )


def _refused(when: Need, layer: LayerReport) -> Skipped | None:
    try:
        return None if when(layer) else Skipped(layer.name, "when= says no")
    except Exception as error:  # such as a comparison with an alpha that is None
        reason = f"when= failed: {type(error).__name__}: {error}"
        return Failed(layer.name, reason, RuntimeError(reason))  # which can be sent to other ranks


def project_boundary_(
    tasks: Sequence[Task],
    strength: float,
    *,
    momentum: Momentum = keep,
    state: Mapping[Tensor, Any] | None = None,
    replicas: dist.ProcessGroup | None = None,
) -> list[Outcome]:
    """Project every task once: here, dealt to the ranks that hold replicas, or gathered from shards.

    Args:
        tasks: What to project and how.
        strength: 0 (stay) to 1 (arrive).
        momentum: What becomes of the momentum; that of sharded weights is kept.
        state: The optimizer's state, by parameter.
        replicas: The group over which the model is replicated.
    """
    buffers = _Momentum(momentum, state or {})
    then: Then | None = None if momentum is keep else buffers.change_
    whole = [i for i, task in enumerate(tasks) if not sharded(task.matrix)]
    parts = [i for i, task in enumerate(tasks) if sharded(task.matrix)]
    here = [tasks[i] for i in whole]
    if replicas is None:
        done = project_all_(here, strength, then)
    else:
        done = project_replicas_(here, strength, replicas, then, buffers.of)
    results = dict(zip(whole, done, strict=True))
    if parts:
        done = project_shards_([tasks[i] for i in parts], strength)
        results |= dict(zip(parts, done, strict=True))
    return [results[i] for i in range(len(tasks))]


class _Momentum:
    """An optimizer's momentum and what a projection does to it."""

    def __init__(self, policy: Momentum, state: Mapping[Tensor, Any]) -> None:
        self.policy = policy
        self.state = state

    def change_(self, matrix: WeightMatrix, operator: Operator) -> None:
        if matrix.parameter is not None:
            change_momentum_(self.policy, matrix, self.state.get(matrix.parameter, {}), operator)

    def of(self, matrix: WeightMatrix) -> Sequence[Tensor]:
        """The buffers that `change_` writes to."""
        if self.policy is keep or matrix.parameter is None:
            return ()
        return list(momentum_buffers(matrix, self.state.get(matrix.parameter, {})))
