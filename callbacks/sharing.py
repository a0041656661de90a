"""The processes that train one model: who writes and who decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ww_train.ranks import gather, on_device

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model; a single one by default.

    Attributes:
        group: Their process group; None for a single process.
        replicated: Whether each of them holds the whole model; otherwise the weights are sharded.
        main: Without a group, whether this process writes.
        device: The model's CUDA device, through which NCCL sends objects; by default the current one.
    """

    group: dist.ProcessGroup | None = None
    replicated: bool = False
    main: bool = True
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that decides and writes."""
        return self.main if self.group is None else self.rank == 0

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def collect(self, own: T) -> list[T]:
        """What every process has, in their order; a collective."""
        if self.group is None:
            return [own]
        with on_device([self.device]):
            return gather(own, self.group)

    def agree(self, value: T) -> T:
        """The first process's value, on all; a collective."""
        if self.group is None:
            return value
        box = [value]
        source = dist.get_global_rank(self.group, 0)
        with on_device([self.device]):
            dist.broadcast_object_list(box, source, group=self.group)
        return box[0]

    def decide(self, make: Callable[[], T]) -> T:
        """What the first process makes, on all; a collective.

        Raises:
            RuntimeError: On all, if it failed: one that raised alone would leave the others waiting.
        """
        if self.group is None:
            return make()
        made: T | None = None
        failure = ""
        try:
            made = make() if self.first else None
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        made, failure = self.agree((made, failure))
        if failure:
            raise RuntimeError(failure)
        return made  # type: ignore[return-value]


def ranks_of(model: nn.Module) -> Ranks:
    """What can be told from the model itself: DistributedDataParallel, or sharded weights (FSDP2).

    Whether torch.distributed is in use says nothing: pipeline ranks hold different models.
    """
    if not dist.is_available() or not dist.is_initialized():
        return Ranks()
    device = next((p.device for p in model.parameters() if p.is_cuda), None)
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            return Ranks(module.process_group, replicated=True, device=device)
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return Ranks(dist.group.WORLD, device=device)
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
