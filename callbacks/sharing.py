"""The processes that train one model: who writes and who decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model; a single one by default.

    Attributes:
        group: Their process group; None for a single process.
        replicated: Whether each of them holds the whole model; otherwise the weights are sharded.
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
