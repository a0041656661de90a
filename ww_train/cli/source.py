"""From the arguments of `ww-train` to the model, and to what is measured of it."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ww_train.analysis import measure
from ww_train.report import Report
from ww_train.weights.matrices import (
    Skipped,
    Source,
    merge,
    reasons,
    weight_matrices,
)

if TYPE_CHECKING:
    import pandas as pd


def first_process() -> bool:
    """Whether this process is the one that prints and writes, of those that torchrun starts."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def processes() -> Iterator[dist.ProcessGroup | None]:
    """Join the processes that torchrun started; None if this one is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    # only reports are sent, and torchrun ends the others if one dies
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device | None) -> torch.device:
    """The device that is meant: the CPU if none; of several accelerators each process takes its own."""
    if device is None:
        return torch.device("cpu")
    if device.type == "cpu" or device.index is not None:
        return device
    number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    return torch.device(device.type, number)


def source(path: str, device: torch.device | None, adapter: str | None = None) -> Source:
    """A model as `measure` takes it.

    Args:
        path: A file or folder.
        device: Where to compute: see `own_device`.
        adapter: A LoRA adapter to merge into it.
    """
    found = merge(path, adapter) if adapter else weight_matrices(path)
    home = own_device(device)
    return [layer if isinstance(layer, Skipped) else layer.to(home) for layer in found]


def is_adapter(path: str) -> bool:
    """Whether this is the folder or the weights of a LoRA adapter, and not of a whole model."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    named = folder == path or os.path.basename(path).startswith("adapter_model.")
    return named and os.path.isfile(os.path.join(folder, "adapter_config.json"))


def measured(args: Namespace) -> Report:
    """The report of the model that the arguments name; torchrun's processes share the layers.

    Raises:
        ValueError: If it has no layer to measure, or another process failed.
    """
    with processes() as group:
        try:
            report = measure(
                source(args.path, args.device, args.adapter),
                layers=args.layers,
                types=tuple(args.types),
                base_model=source(args.base, args.device) if args.base else None,
                mp_fit=args.mp_fit,
                randomize=args.randomize,
                progress=args.progress and first_process(),
                group=group,
            )
        except RuntimeError as error:
            if group is None:
                raise
            raise ValueError(str(error)) from error
    if not report.layers:
        raise ValueError(f"{args.path}: no layer could be analysed ({reasons(report.skipped)})")
    return report


def check_conditions(args: Namespace) -> None:
    """Raise ValueError for a column that these options do not give, before any time is spent."""
    for condition in args.fail_if:
        given = _sample(mp_fit=args.mp_fit, randomize=args.randomize)
        for flag, more in (
            ("--mp-fit", _sample(mp_fit=True)),
            ("--randomize", _sample(randomize=True)),
        ):
            if condition.column in set(more) - set(given):
                raise ValueError(f"condition {condition}: {condition.column} needs {flag}")
        condition.check(given)


def _sample(*, mp_fit: bool = False, randomize: bool = False) -> pd.DataFrame:
    """What the table of any model looks like that is measured with these options."""
    noise = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    return measure(noise, mp_fit=mp_fit, randomize=randomize).to_dataframe()
