"""Everything that is claimed of a GPU, in one command: correctness first, then the tables.

Each metric is compared with the CPU's float64; then full reports and projections of model-sized sets
of layers are timed, training is run with the monitor on and off, and the Gram product and the
eigensolve are set against the limits of the device (peak float64 rate and memory bandwidth, to be
given for devices that are not in `PEAKS`). Every timing ends with a synchronisation.

    python benchmarks/gpu.py                 # all of it, on cuda
    python benchmarks/gpu.py --device cpu --small   # the same code on small shapes, to try it out
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from claims import skip, verdict
from torch import Tensor, nn

from ww_train import WWPGD, LayerReport, Report, Skipped, measure, project_
from ww_train.calibration import calibrate
from ww_train.callbacks.monitor import SpectralMonitor
from ww_train.linalg import gram, symmetric_eigenvalues
from ww_train.measurement import Measurement
from ww_train.planning import Plan
from ww_train.steering.tasks import Task, project_all_

PEAKS = {"H100": (67e12, 3.35e12), "H200": (67e12, 4.8e12), "A100": (19.5e12, 2.0e12)}
"""Float64 operations (tensor cores) and bytes a second, by the vendor's data sheets."""

LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
"""The matrices of one of the 32 blocks of a model with 7 billion parameters."""

GPT2 = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
"""The matrices of one of the 12 blocks of GPT-2."""


def weights(shapes: list[tuple[int, int]], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Heavy-tailed matrices: Gaussian, with singular values spread over two decades."""
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for i, (rows, cols) in enumerate(shapes):
        scale = torch.logspace(0, -2, cols, device=device)
        noise = torch.randn(rows, cols, generator=generator, device=device) / cols**0.5
        state[f"layer{i}.weight"] = (noise * scale).to(dtype)
    return state


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Median time of a call after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def largest_difference(a: Report, b: Report) -> tuple[float, str]:
    """Largest relative difference of any number in two reports, and where it is."""
    worst, where = 0.0, ""
    for x, y in zip(a, b, strict=True):
        other = y.to_dict()
        for column, value in x.to_dict().items():
            if isinstance(value, float) and isinstance(other[column], float):
                off = abs(value - other[column]) / max(abs(value), abs(other[column]), 1e-300)
                if off > worst:
                    worst, where = off, f"{column} of {x.name}"
    return worst, where


def correctness(device: str, small: bool) -> None:
    """Every metric on the device against the CPU, without traps: generators differ by device."""
    sizes = [(64, 64), (300, 100), (100, 300), (512, 512), (1024, 768)]
    sizes += [] if small else [(2048, 2048), (4096, 4096)]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        state = weights(sizes, dtype, device)
        here = measure(state, mp_fit=True)
        there = measure({k: v.cpu() for k, v in state.items()}, mp_fit=True)
        worst, where = largest_difference(here, there)
        verdict(
            f"every metric within 1e-6 of the CPU, {dtype}", worst < 1e-6, f"{worst:.1e} {where}"
        )


def host_share(call: Callable[[], object]) -> float:
    """Seconds of a measurement that the host spends on fits, while the device has nothing to do."""
    spent = [0.0]
    report = Measurement._report

    def timed(self: Measurement, plan: Plan, evals: Sequence[Tensor]) -> LayerReport | Skipped:
        started = time.perf_counter()
        try:
            return report(self, plan, evals)
        finally:
            spent[0] += time.perf_counter() - started

    with patch.object(Measurement, "_report", timed):
        call()
    return spent[0]


def waits(call: Callable[[], object]) -> int:
    """How often the host waits for the device, apart from the checks of the eigensolver."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def reports(device: str, small: bool) -> None:
    """Full reports (ERG, traps) of model-sized sets of layers."""
    gpt2 = weights(GPT2 * (1 if small else 12), torch.float32, device)
    report_of("GPT-2 124M", gpt2, device, limit=1.0)
    if not small:
        report_of(
            "224 matrices of a 7B model",
            weights(LLAMA_7B * 32, torch.bfloat16, device),
            device,
            30.0,
        )


def report_of(name: str, state: dict[str, Tensor], device: str, limit: float) -> None:
    """Time of a full report, and what of it is the host's; on CUDA memory and waits too."""

    def call() -> object:
        return measure(state, randomize=True)

    taken = seconds(call, device, repeats=1)
    told = f"{taken:.2f} s, of these {host_share(call):.2f} s fits on the host"
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peak = torch.cuda.max_memory_allocated() - before
        told += f"; {peak / 2**30:.2f} GiB beyond the weights, {waits(call)} copies to the host"
    verdict(f"{name}, full report, at most {limit:g} s", taken <= limit, told)


def projections(device: str, small: bool) -> None:
    """One boundary of `WWPGD` on the same shapes."""
    for name, shapes, dtype in (
        ("GPT-2 124M", GPT2 * (1 if small else 12), torch.float32),
        ("a 7B model", [] if small else LLAMA_7B * 32, torch.bfloat16),
    ):
        model = nn.ModuleList(
            nn.Linear(cols, rows, bias=False, device=device, dtype=dtype) for rows, cols in shapes
        )
        if not len(model):
            continue
        optimizer = WWPGD(torch.optim.SGD(model.parameters()), model=model, strict=True)
        tasks = [task for task in optimizer.targets() if isinstance(task, Task)]
        taken = seconds(lambda tasks=tasks: project_all_(tasks, 0.5), device, repeats=1)
        print(f"projection of {name}: {taken:.2f} s for {len(tasks)} layers")


def overhead(device: str, small: bool) -> None:
    """Steps of a transformer without a monitor, with the default one, and in the background."""
    width, blocks, steps = (128, 2, 60) if small else (1024, 12, 600)

    def run(**options: Any) -> tuple[float, list[Tensor], int]:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True, dropout=0.0)
        model = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        monitor = SpectralMonitor(model, optimizer, summary=False, **options) if options else None
        x = torch.randn(16, 128, width, device=device)
        synchronize(device)
        started = time.perf_counter()
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if monitor:
                monitor.step()
            if monitor and step % (steps // 6) == 0:
                monitor.epoch_end()
        synchronize(device)
        taken = time.perf_counter() - started
        measured = len(monitor.history) if monitor else 0
        if monitor:
            monitor.abort()
        return taken, [p.detach().cpu() for p in model.parameters()], measured

    run()
    bare, weights_without, _ = run()
    for name, options in (
        ("monitor with the default budget", {"budget": 0.01}),
        (
            "monitor in the background, everything at six epochs",
            {"background": True, "budget": None},
        ),
    ):
        taken, weights_with, measured = run(**options)
        share = taken / bare - 1
        verdict(f"{name}: overhead at most 1 %", share <= 0.01, f"{share:.1%}, {measured} records")
        same = all(torch.equal(a, b) for a, b in zip(weights_without, weights_with, strict=True))
        verdict(f"{name}: the same weights, bit for bit", same, f"{len(weights_with)} parameters")


def shortage(device: str, small: bool) -> None:
    """Too little memory: smaller batches, then the host, one warning, the same numbers."""
    if not device.startswith("cuda"):
        print("SKIP  what happens without memory can be tried on a CUDA device only")
        return
    state = weights([(1024, 1024)] * (4 if small else 24), torch.float32, device)
    expected = measure(state)
    short, warned = with_little_memory(lambda: measure(state))
    worst, where = largest_difference(expected, short)
    verdict(
        "short of memory: the same numbers, one warning",
        worst < 1e-6 and warned == 1,
        f"{worst:.1e} {where}, {warned} warnings",
    )
    there = nn.Linear(1024, 1024, bias=False, device=device)
    here = nn.Linear(1024, 1024, bias=False)
    here.load_state_dict(there.state_dict())
    project_(here, 0.1)
    _, warned = with_little_memory(lambda: project_(there, 0.1))
    off = float((there.weight.detach().cpu() - here.weight.detach()).abs().max())
    verdict(
        "short of memory: the same projection, one warning",
        off < 1e-6 and warned == 1,
        f"{off:.1e}, {warned} warnings",
    )


def with_little_memory(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives while 8 MiB are free, and how many warnings."""
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved() + (8 << 20)
    torch.cuda.set_per_process_memory_fraction(used / torch.cuda.mem_get_info()[1])
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            return call(), len(caught)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def ways(device: str, small: bool) -> None:
    """What the calibration measured and chooses; a peek at what is cached on disk."""
    costs = calibrate(device)
    print(
        f"{costs.machine}\n{'M':>6}{'alone ms':>10}{'in batch':>10}{'on host':>10}  chosen for 32"
    )
    for n in (64, 128, 256, 512) if small else (64, 128, 256, 512, 1024, 2048, 4096):
        times = "".join(
            f"{1e3 * curve(n):10.2f}" for curve in (costs.looped, costs.batched, costs.host)
        )
        print(f"{n:6d}{times}  {costs.fastest(n, 32)}")


def kernels(device: str, small: bool, peak: tuple[float, float] | None) -> None:
    """Achieved rates of the Gram product and the eigensolve, as fractions of the limits."""
    print(
        f"{'M':>6}{'batch':>7}{'Gram TFLOP/s':>14}{'of peak':>9}{'eigh ms each':>14}{'GFLOP/s':>9}"
    )
    for M, batch in (
        ((256, 16), (512, 8)) if small else ((512, 64), (1024, 32), (2048, 8), (4096, 4))
    ):
        stack = torch.randn(batch, M, M, device=device)
        product = seconds(lambda s=stack: gram(s), device)
        grams = gram(stack)
        solve = seconds(lambda g=grams: symmetric_eigenvalues(g), device)
        rate = 2.0 * batch * M**3 / product
        share = f"{rate / peak[0]:9.0%}" if peak else f"{'-':>9}"
        print(
            f"{M:6d}{batch:7d}{rate / 1e12:14.2f}{share}{1e3 * solve / batch:14.2f}"
            f"{4 / 3 * batch * M**3 / solve / 1e9:9.0f}"
        )


def peer_seconds(blocks: int, cuda: bool) -> float:
    """Time of weightwatcher on GPT-2's layers, in a process that has not imported it yet."""
    from peer import peer_analyze

    state = weights(GPT2 * blocks, torch.float32, "cpu")
    return seconds(lambda: peer_analyze(state, cuda=cuda), "cuda" if cuda else "cpu", repeats=1)


def peer_ratio(device: str, small: bool) -> None:
    """The same layers by weightwatcher on this machine's CPU, and as it uses CUDA (in float16)."""
    try:
        from peer import peer

        peer()
    except ModuleNotFoundError as error:
        print(f"SKIP  {error}")
        return
    blocks = 1 if small else 12
    state = weights(GPT2 * blocks, torch.float32, device)
    ours = seconds(lambda: measure(state), device)
    for cuda in (False, True) if device.startswith("cuda") else (False,):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            theirs = pool.apply(peer_seconds, (blocks, cuda))
        told = f"{ours:.2f} s, weightwatcher {theirs:.1f} s, {theirs / ours:.0f} times faster"
        print(f"GPT-2 124M, default, against its {'CUDA' if cuda else 'CPU'} path: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes, a minute on a laptop")
    parser.add_argument("--peak-flops", type=float, help="float64 operations a second")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        skip("no CUDA device; --device cpu --small tries the code")
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    known = next((limits for key, limits in PEAKS.items() if key in name), None)
    peak = (args.peak_flops, 0.0) if args.peak_flops else known
    print(f"{name}, torch {torch.__version__}\n")
    for part in (ways, correctness, shortage, reports, projections, overhead, peer_ratio):
        part(args.device, args.small)
    kernels(args.device, args.small, peak)


if __name__ == "__main__":
    main()
