"""What `gpu.py` asks of the device alone: costs, numbers, rates against its limits, little memory.

Beside these parts here is what all of them share: matrices of the shapes of models, and a clock that
waits for the device.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import torch
from claims import verdict
from torch import Tensor, nn

from ww_train import Report, measure, project_
from ww_train.calibration import cache_file, costs_of
from ww_train.linalg import gram, symmetric_eigenvalues

Shapes: TypeAlias = "list[tuple[int, int]]"
Peak: TypeAlias = "tuple[float, float]"
"""Float64 operations and bytes a second."""

PEAKS: dict[str, Peak] = {
    "H100 PCIe": (51e12, 2.0e12),
    "H100": (67e12, 3.35e12),
    "H200": (67e12, 4.8e12),
    "A100": (19.5e12, 2.0e12),
}
"""Of tensor cores and memory by the vendor's data sheets; the first that the name contains holds."""

ROOM = (8, 64, 256)
"""MiB that are left free. The allocator takes at least 20 at a time, so the first forces the host."""


def on_cuda(device: str) -> bool:
    return device.startswith("cuda")


def weights(shapes: Shapes, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Heavy-tailed matrices: Gaussian, with singular values spread over two decades."""
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for i, (rows, cols) in enumerate(shapes):
        scale = torch.logspace(0, -2, cols, device=device)
        noise = torch.randn(rows, cols, generator=generator, device=device) / cols**0.5
        state[f"layer{i}.weight"] = (noise * scale).to(dtype)
    return state


def synchronize(device: str) -> None:
    if on_cuda(device):
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, until the device is through with it."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def seconds(call: Callable[[], object], device: str) -> float:
    """Median time of three calls after one to warm up."""
    call()
    return statistics.median(timed(call, device) for _ in range(3))


def ways(device: str, small: bool) -> None:
    """What the calibration that `measure` uses has found and chooses, and where it is kept."""
    costs = costs_of(device)
    print(f"{costs.machine}, kept in {cache_file(costs.machine)}")
    print(f"{'M':>6}{'alone ms':>10}{'in batch':>10}{'on host':>10}  chosen for 32")
    curves = (costs.looped, costs.batched, costs.host)
    for n in (64, 128, 256, 512) if small else (64, 128, 256, 512, 1024, 2048, 4096):
        times = "".join(f"{1e3 * curve(n):10.2f}" for curve in curves)
        print(f"{n:6d}{times}  {costs.fastest(n, 32)}")


def correctness(device: str, small: bool) -> None:
    """Every metric on the device against the CPU, without traps: generators differ by device.

    The smallest singular value is told apart: it is the root of an eigenvalue that is all rounding,
    and already two ways to it on the CPU differ by 7e-7.
    """
    sizes = [(64, 64), (300, 100), (100, 300), (512, 512), (1024, 768)]
    sizes += [] if small else [(2048, 2048), (4096, 4096)]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        state = weights(sizes, dtype, device)
        there = measure({name: weight.cpu() for name, weight in state.items()}, mp_fit=True)
        found = differences(measure(state, mp_fit=True), there)
        worst, where = largest(found)
        verdict(
            f"every metric within 1e-6 of the CPU, {dtype}",
            worst < 1e-6,
            f"{worst:.1e} {where} (sv_min {found['sv_min'][0]:.1e})",
        )


def differences(a: Report, b: Report) -> dict[str, tuple[float, str]]:
    """Largest relative difference of each column of two reports, and of which layer it is."""
    found: dict[str, tuple[float, str]] = {}
    for x, y in zip(a, b, strict=True):
        row, other = x.to_dict(), y.to_dict()
        for column in {**row, **other}:
            off = relative(row.get(column, "missing"), other.get(column, "missing"))
            worst, where = found.get(column, (0.0, ""))
            found[column] = (off, x.name) if off > worst else (worst, where)
    return found


def relative(x: object, y: object) -> float:
    """Relative difference of two floats; of anything else, NaN included, 0 if equal, or infinity."""
    if x == y:
        return 0.0
    if not (isinstance(x, float) and isinstance(y, float)):
        return math.inf
    if math.isnan(x) and math.isnan(y):
        return 0.0
    off = abs(x - y) / max(abs(x), abs(y))
    return math.inf if math.isnan(off) else off


def largest(found: dict[str, tuple[float, str]]) -> tuple[float, str]:
    """The largest of these differences without that of `sv_min`, and where it is."""
    worst, where = 0.0, "anywhere"
    for column, (off, layer) in found.items():
        if off > worst and column != "sv_min":
            worst, where = off, f"in {column} of {layer}"
    return worst, where


def kernels(device: str, small: bool, peak: Peak | None) -> None:
    """Achieved rates of the Gram product and the eigensolve, as fractions of the limits.

    The product takes 2 M³ operations. The eigensolve takes (4/3) M³, half of them in products of a
    matrix and a vector: the reduction to tridiagonal form reads what is left of the matrix, 8 k²
    bytes for k = M, ..., 1, once a column, which is 8 M³ / 3 bytes in all. A solver that reads one
    triangle only, reduces in two stages or finds the matrix in a cache can do with fewer, and show
    more than 100 % of the bandwidth.
    """
    print(
        f"{'M':>6}{'batch':>7}{'Gram TFLOP/s':>14}{'of peak':>9}"
        f"{'eigh ms each':>14}{'GFLOP/s':>9}{'of bandwidth':>14}"
    )
    flops, bandwidth = peak or (math.nan, math.nan)
    sizes = ((256, 16), (512, 8)) if small else ((512, 64), (1024, 32), (2048, 8), (4096, 4))
    for M, batch in sizes:
        stack = torch.randn(batch, M, M, device=device)
        grams = gram(stack)
        product = seconds(partial(gram, stack), device) / batch
        solve = seconds(partial(symmetric_eigenvalues, grams), device) / batch
        rate, read = 2.0 * M**3 / product, 8.0 / 3.0 * M**3 / solve
        print(
            f"{M:6d}{batch:7d}{rate / 1e12:14.2f}{share(rate / flops):>9}"
            f"{1e3 * solve:14.2f}{4 / 3 * M**3 / solve / 1e9:9.0f}{share(read / bandwidth):>14}"
        )


def share(fraction: float) -> str:
    return "-" if math.isnan(fraction) else f"{fraction:.1%}"


def shortage(device: str, small: bool) -> None:
    """Too little memory: smaller batches, then the host, one warning, the same numbers."""
    if not on_cuda(device):
        print("SKIP  what happens without memory can be tried on a CUDA device only")
        return
    state = weights([(1024, 1024)] * (4 if small else 24), torch.float32, device)
    expected = measure(state)
    for mib in ROOM:
        with little_memory(device, mib) as warned:
            short = measure(state)
        worst, where = largest(differences(expected, short))
        same_in_little("numbers", mib, worst, f"{worst:.1e} {where}", len(warned))
        off, warned = projected_in_little(device, mib)
        same_in_little("projection", mib, off, f"{off:.1e}", len(warned))


def same_in_little(what: str, mib: int, off: float, told: str, warned: int) -> None:
    """The verdict; with the least memory it must have been short, with more it may suffice."""
    holds = off < 1e-6 and warned <= 1 and (warned == 1 or mib > min(ROOM))
    verdict(
        f"{mib} MiB free: the same {what}, one warning if short",
        holds,
        f"{told}, {warned} warnings",
    )


def projected_in_little(device: str, mib: int) -> tuple[float, list[str]]:
    """How far a projection with little memory is from that on the CPU, and what was warned of."""
    there = nn.Linear(1024, 1024, bias=False, device=device)
    here = nn.Linear(1024, 1024, bias=False)
    here.load_state_dict(there.state_dict())
    project_(here, 0.1)
    with little_memory(device, mib) as warned:
        project_(there, 0.1)
    return float((there.weight.detach().cpu() - here.weight.detach()).abs().max()), warned


@contextmanager
def little_memory(device: str, mib: int) -> Iterator[list[str]]:
    """Leave so much memory free within; the list holds the warnings of it afterwards."""
    told: list[str] = []
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved(device) + (mib << 20)
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(used / total, device)
    try:
        with recorded(told, "does not suffice"):
            yield told
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def recorded(told: list[str], text: str) -> Iterator[None]:
    """Add the warnings within whose message contains a text; all others are dropped."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    told += [message for w in caught if text in (message := str(w.message))]
