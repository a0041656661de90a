"""The processes that train one model: who writes, who decides, and who measures what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ww_train import LayerReport, Report, Skipped
from ww_train.ranks import deal, gather

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model; a single one by default.

    Attributes:
        group: Their process group; None for a single process.
        replicated: Whether each of them holds the whole model, so that layers can be dealt to them.
            Otherwise the weights are sharded and all must read them together.
        main: Without a group, whether this process writes.
    """

    group: dist.ProcessGroup | None = None
    replicated: bool = False
    main: bool = True

    @property
    def first(self) -> bool:
        """Whether this process is the one that decides and writes."""
        return self.main if self.group is None else dist.get_rank(self.group) == 0

    def agree(self, value: T) -> T:
        """The first process's value, on all; a collective."""
        if self.group is None:
            return value
        box = [value]
        source = dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(box, source, group=self.group)
        return box[0]

    def share(
        self,
        measure: Callable[[list[int]], Report],
        layer_ids: Sequence[int],
        costs: Sequence[float],
    ) -> Report:
        """Measure layers, dealt to the processes if each holds the model; the same report on all.

        Raises:
            RuntimeError: On every process, if one of them failed; none waits for ever.
        """
        if self.group is None or not self.replicated:
            return measure(list(layer_ids))
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        owners = deal(costs, size)
        mine = [i for i, owner in zip(layer_ids, owners, strict=True) if owner == rank]
        parts = gather(_attempt(measure, mine), self.group)
        failed = [part for part in parts if isinstance(part, str)]
        if failed:
            raise RuntimeError("; ".join(failed))
        reports = [part for part in parts if isinstance(part, Report)]
        return _joined(reports)


def ranks_of(model: nn.Module) -> Ranks:
    """What can be told from the model itself: DistributedDataParallel, or sharded weights (FSDP2).

    Whether torch.distributed is in use says nothing: pipeline ranks hold different models.
    """
    if not dist.is_available() or not dist.is_initialized():
        return Ranks()
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            return Ranks(module.process_group, replicated=True)
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return Ranks(dist.group.WORLD)
    return Ranks()


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile and DistributedDataParallel."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _attempt(measure: Callable[[list[int]], Report], layer_ids: list[int]) -> Report | str:
    """The report or, as text because it is sent to other processes, what went wrong."""
    try:
        return measure(layer_ids) if layer_ids else Report((), ())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _joined(reports: Sequence[Report]) -> Report:
    layers: list[LayerReport] = [layer for report in reports for layer in report]
    skipped: list[Skipped] = [layer for report in reports for layer in report.skipped]
    return Report(tuple(sorted(layers, key=lambda layer: layer.layer_id)), tuple(skipped))
