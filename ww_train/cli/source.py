"""From the arguments of `ww-train` to the model, and to what is measured of it."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ww_train.analysis import measure
from ww_train.report import Report
from ww_train.weights.matrices import (
    Deferred,
    Skipped,
    Source,
    WeightMatrix,
    merge,
    reasons,
    weight_matrices,
)

if TYPE_CHECKING:
    import pandas as pd


def first_process() -> bool:
    """Whether this process is the one that prints and writes, of those that torchrun starts."""
    return os.environ.get("RANK", "0") == "0"


def source(path: str, device: torch.device | None, adapter: str | None = None) -> Source:
    """A model as `measure` takes it.

    Args:
        path: A file or folder.
        device: Where to compute; None for the CPU.
        adapter: A LoRA adapter to merge into it.
    """
    found = merge(path, adapter) if adapter else weight_matrices(path)
    return list(_on_device(found, device or torch.device("cpu")))


def measured(args: Namespace) -> Report:
    """The report of the model that the arguments name; ValueError if it has no layer to measure."""
    report = measure(
        source(args.path, args.device, args.adapter),
        layers=args.layers,
        types=tuple(args.types),
        base_model=source(args.base, args.device) if args.base else None,
        mp_fit=args.mp_fit,
        randomize=args.randomize,
        progress=args.progress and first_process(),
    )
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


def _on_device(
    found: Iterable[WeightMatrix | Skipped], device: torch.device
) -> Iterator[WeightMatrix | Skipped]:
    """The same layers; each moves to the device when its turn comes."""
    for matrix in found:
        if isinstance(matrix, Skipped) or matrix.device == device:
            yield matrix
        else:
            yield replace(matrix, weights=_moved(matrix.weights, device), parameter=None)


def _moved(weights: Tensor | Deferred, device: torch.device) -> Tensor | Deferred:
    if isinstance(weights, Tensor):
        return weights.to(device)
    load, core = weights.load, weights.core
    return replace(
        weights,
        device=device,
        load=lambda: load().to(device),
        core=None if core is None else lambda: core().to(device),
    )
