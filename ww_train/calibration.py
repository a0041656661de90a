"""Costs of a device, measured in a few seconds and kept on disk.

Which way to eigenvalues is the fastest depends on the size of the matrix, the device and the version
of PyTorch, so it is measured once for each, and kept in a file that can be read.
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ww_train.batching import BATCH_BYTES
from ww_train.costs import Costs, Curve, Machine
from ww_train.exports import write_bytes
from ww_train.linalg import has_float64
from ww_train.operations import (
    Operation,
    eigenvalues,
    eigenvalues_on_host,
    eigenvectors,
    eigenvectors_on_host,
    gram_matrices,
    gram_on_host,
    noise,
    shuffled,
    spread_eigenvalues,
    spread_eigenvectors,
    symmetric,
    to_host,
)

SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""Sizes of matrices that are measured, as far as time and memory allow."""

LIMIT = 1.0
"""Seconds that a call may take by its prediction; larger sizes are left out."""

ENOUGH = 0.25
"""Seconds after which a call is not repeated."""

BATCH = 128
"""Most matrices in a batch: as many as a large model has of one size."""

COPIED = 1 << 26
"""Bytes that are copied to measure the rate of copies."""

Stopwatch: TypeAlias = Callable[[Operation, Tensor], float]
"""Seconds that an operation takes."""


def stopwatch(operation: Operation, stack: Tensor) -> float:
    """The least seconds of up to three calls, waiting for the device before and after each."""
    best, spent = math.inf, 0.0
    for _ in range(3):
        _synchronize(stack.device)
        started = time.perf_counter()
        operation(stack)
        _synchronize(stack.device)
        seconds = time.perf_counter() - started
        best, spent = min(best, seconds), spent + seconds
        if spent >= ENOUGH:
            break
    return best


@torch.no_grad()
def calibrate(device: torch.device | str, *, watch: Stopwatch = stopwatch) -> Costs:
    """Measure the costs of a device.

    A size that is predicted to take longer than `LIMIT`, or that the device refuses, for lack of
    memory say, ends its table. What else the machine does meanwhile is measured too.

    Args:
        device: Any that computes.
        watch: Times an operation on a stack.

    Cost: three to eight seconds, and up to `BATCH_BYTES` a few times over on the device.
    """
    device = torch.device(device)
    on_host = device.type == "cpu"
    real = has_float64(device)
    exact = torch.float64 if real else torch.float32
    workers = torch.get_num_threads() if on_host else 1
    table = partial(_table, watch=watch)
    alone = partial(symmetric, device, exact)
    looped = table(eigenvalues, alone) if real else Curve()

    def batch(n: int) -> Tensor:
        return symmetric(device, exact, n, _batch_size(n, looped(n), workers))

    vectors = eigenvectors if real else eigenvectors_on_host
    product = gram_matrices if real else gram_on_host
    return Costs(
        machine=machine(device),
        looped=looped,
        batched=table(spread_eigenvalues if on_host else eigenvalues, batch) if real else Curve(),
        host=Curve() if on_host else table(eigenvalues_on_host, alone),
        eigh=table(spread_eigenvectors if on_host else vectors, batch if real else alone),
        gram32=table(product, partial(noise, device, torch.float32)),
        gram16=table(product, partial(noise, device, torch.bfloat16)),
        shuffle=_of_entries(table(shuffled, partial(noise, device, torch.float32))),
        copy_rate=_copy_rate(device, watch),
    )


def costs_of(
    device: torch.device | str, *, measure: Callable[[torch.device], Costs] = calibrate
) -> Costs:
    """The costs of a device, from the file of an earlier calibration or by a new one.

    A process looks once. A file that is missing, damaged or of another machine is written anew; where
    that is not possible, or the device's memory is nearly used up, the next process measures again.

    Args:
        device: Any that computes.
        measure: Measures what is not known.
    """
    device = torch.device(device)
    here = machine(device)
    return _remembered(here, device, cache_file(here), measure)


def machine(device: torch.device) -> Machine:
    """What the costs of a device depend on."""
    kind = device.type
    name = _processor() if kind == "cpu" else kind
    if kind not in ("cpu", "mps"):
        with suppress(AttributeError):  # not every kind of device has names
            name = torch.get_device_module(device).get_device_name(device)
    cuda = torch.version.cuda if kind == "cuda" else None
    threads = torch.get_num_threads() if kind == "cpu" else None
    return Machine(name, kind, torch.__version__, cuda, threads)


def cache_file(here: Machine) -> Path | None:
    """Where the costs of a machine are kept; None if the user has no folder for that.

    Below `$XDG_CACHE_HOME`, or `~/.cache`.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():  # as the XDG specification demands
        try:
            folder = Path.home() / ".cache"
        except RuntimeError:
            return None
    threads = f" {here.threads} threads" if here.threads else ""
    name = re.sub(r"[^\w.+-]+", "-", f"{here.device} torch {here.torch}{threads}")
    return folder / "ww_train" / f"{name}.json"


@cache
def _remembered(
    here: Machine,
    device: torch.device,
    path: Path | None,
    measure: Callable[[torch.device], Costs],
) -> Costs:
    if path is not None:
        with suppress(OSError, ValueError):
            found = Costs.from_json(path.read_bytes())
            if found.machine == here:
                return found
    room = _has_room(device)
    costs = measure(device)
    if path is not None and room:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(costs.to_json().encode(), path)
    return costs


def _has_room(device: torch.device) -> bool:
    """Whether what a calibration needs is free; else it says nothing of another time."""
    try:
        torch.empty(4 * BATCH_BYTES, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return False
    return True


def _synchronize(device: torch.device) -> None:
    """Wait for what the device has queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _table(operation: Operation, inputs: Callable[[int], Tensor], watch: Stopwatch) -> Curve:
    """Seconds a matrix of `operation` on the stacks that `inputs` makes."""
    found: dict[int, float] = {}
    for n in SIZES:
        try:
            stack = inputs(n)
            if not len(stack):
                break
            if not found:
                operation(stack[:1])  # loads libraries
            found[n] = watch(operation, stack) / len(stack)
        except RuntimeError:  # no memory for it, or not known to this device
            break
        if 8.0 * found[n] > LIMIT:
            break
    return Curve(tuple(found), tuple(found.values()))


def _batch_size(n: int, seconds: float, workers: int) -> int:
    """How many n x n matrices to decompose at a time; 0 if no two fit into time and memory.

    Args:
        n: Size.
        seconds: Of one alone.
        workers: How many are solved at a time for certain.
    """
    most, least = BATCH_BYTES // (8 * n * n), max(2, workers)
    if most < 2 or math.ceil(least / workers) * seconds > LIMIT:
        return 0
    return min(most, max(least, min(BATCH, workers * int(LIMIT / 8 / seconds))))


def _of_entries(curve: Curve) -> Curve:
    """A curve by the side of a square as one by the number of its entries."""
    return Curve(tuple(n * n for n in curve.sizes), curve.seconds, power=1.0)


def _copy_rate(device: torch.device, watch: Stopwatch) -> float | None:
    try:
        block = torch.zeros(1, COPIED // 4, dtype=torch.float32, device=device)
        return COPIED / watch(to_host, block)
    except RuntimeError:
        return None


def _processor() -> str:
    """Name of the CPU."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
