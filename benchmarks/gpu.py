"""Everything that is claimed of a GPU, in one command: correctness first, then the tables.

Each metric is compared with the CPU's float64; the Gram product and the eigensolve are set against
the limits of the device (peak float64 rate and memory bandwidth, to be given for devices that are not
in `gpu_limits.PEAKS`); then full reports and projections of model-sized sets of layers are timed, and
training is run with the monitor on and off. Every timing ends with a synchronisation. A part that
raises is reported and the others go on; the exit status is 1 then.

    python benchmarks/gpu.py                 # all of it, on cuda
    python benchmarks/gpu.py --part kernels --part reports
    python benchmarks/gpu.py --device cpu --small   # the same code on small shapes, to try it out
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest.mock import patch

import torch
from claims import skip, verdict
from gpu_limits import (
    PEAKS,
    Shapes,
    correctness,
    kernels,
    on_cuda,
    recorded,
    seconds,
    shortage,
    timed,
    ways,
    weights,
)
from gpu_training import overhead
from torch import Tensor, nn

from ww_train import WWPGD, LayerReport, Skipped, measure
from ww_train.measurement import Measurement
from ww_train.planning import Plan
from ww_train.steering.tasks import Task, project_all_

LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
"""The matrices of one of the 32 blocks of a model with 7 billion parameters."""

GPT2 = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
"""The matrices of one of the 12 blocks of GPT-2."""

WAIT = "called a synchronizing CUDA operation"
"""What PyTorch warns of in its debug mode; that the mode is a prototype is another warning."""


def block_of(shapes: Shapes, small: bool) -> Shapes:
    """The matrices of a block; for `--small` their sides are a sixteenth."""
    return [(rows // 16, cols // 16) for rows, cols in shapes] if small else shapes


def reports(device: str, small: bool, blocks: int) -> None:
    """Full reports (ERG, traps) of model-sized sets of layers."""
    report_of_gpt2(device, small)
    block = block_of(LLAMA_7B, small)
    large = weights(block * blocks, torch.bfloat16, device)
    first = dict(list(large.items())[: len(block)])
    name = f"{len(large)} matrices of a 7B model ({blocks} of 32 blocks)"
    report_of(name, large, first, device, limit=30.0 * blocks / 32)


def report_of_gpt2(device: str, small: bool) -> None:
    """A report of all 12 blocks, and on CUDA how often it waits."""
    state = weights(block_of(GPT2, small) * 12, torch.float32, device)
    report_of("GPT-2 124M", state, state, device, limit=1.0)
    if on_cuda(device):
        count = waits(lambda: measure(state, randomize=True))
        print(f"GPT-2 124M: {count} waits for the device, the solver's checks included")


def report_of(
    name: str, state: dict[str, Tensor], warm: dict[str, Tensor], device: str, limit: float
) -> None:
    """Time of one full report, after one of `warm`, and what of it is the host's; on CUDA memory."""
    measure(warm, randomize=True)
    if on_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with host_share() as spent:
        taken = timed(lambda: measure(state, randomize=True), device)
    told = f"{taken:.2f} s, of these {sum(spent):.2f} s fits on the host"
    if on_cuda(device):
        peak = torch.cuda.max_memory_allocated(device) - before
        told += f"; {peak / 2**30:.2f} GiB beyond the weights"
    verdict(f"{name}, full report, at most {limit:.3g} s", taken <= limit, told)


@contextmanager
def host_share() -> Iterator[list[float]]:
    """The seconds of each layer's fits on the host, while the device has nothing to do."""
    spent: list[float] = []
    report = Measurement._report

    def watched(self: Measurement, plan: Plan, evals: Sequence[Tensor]) -> LayerReport | Skipped:
        started = time.perf_counter()
        try:
            return report(self, plan, evals)
        finally:
            spent.append(time.perf_counter() - started)

    with patch.object(Measurement, "_report", watched):
        yield spent


def waits(call: Callable[[], object]) -> int:
    """How often the host waits for the device, for the checks of the eigensolver too."""
    told: list[str] = []
    with recorded(told, WAIT):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return len(told)


def projections(device: str, small: bool, blocks: int) -> None:
    """One boundary of `WWPGD` on the same shapes."""
    for name, shapes, number, of, dtype in (
        ("GPT-2 124M", GPT2, 12, 12, torch.float32),
        ("a 7B model", LLAMA_7B, blocks, 32, torch.bfloat16),
    ):
        taken, layers = projection(block_of(shapes, small), number, dtype, device)
        told = (
            f"{taken:.3f} s, {1e3 * taken / layers:.1f} ms a layer, {taken / number:.4f} s a block"
        )
        if number != of:
            told += f"; all {of} blocks would take {of * taken / number:.2f} s at this rate"
        print(f"projection of {name}, {number} of {of} blocks: {told}")


def projection(block: Shapes, blocks: int, dtype: torch.dtype, device: str) -> tuple[float, int]:
    """Time of one projection of so many blocks, after one of a single block, and how many layers."""
    model = nn.ModuleList(
        nn.Linear(cols, rows, bias=False, device=device, dtype=dtype)
        for rows, cols in block * blocks
    )
    optimizer = WWPGD(torch.optim.SGD(model.parameters()), model=model, strict=True)
    tasks = [task for task in optimizer.targets() if isinstance(task, Task)]
    project_all_(tasks[: len(block)], 0.5)
    return timed(lambda: project_all_(tasks, 0.5), device), len(tasks)


def peer_seconds(shapes: Shapes, blocks: int, device: str) -> float:
    """Time of weightwatcher on so many blocks, in a process that has not imported it yet."""
    from peer import peer_analyze

    cuda = on_cuda(device)
    state = weights(shapes * blocks, torch.float32, "cpu")
    with torch.cuda.device(device) if cuda else nullcontext():
        peer_analyze(dict(list(state.items())[: len(shapes)]), cuda=cuda)
        return timed(lambda: peer_analyze(state, cuda=cuda), device)


def peer_ratio(device: str, small: bool) -> None:
    """The same layers by weightwatcher on this machine's CPU, and as it uses CUDA (in float16)."""
    block = block_of(GPT2, small)
    state = weights(block * 12, torch.float32, device)
    ours = seconds(lambda: measure(state), device)
    for theirs_on in dict.fromkeys(("cpu", device)):
        claim = f"GPT-2 124M, default, against its {theirs_on.upper()} path"
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                theirs = pool.submit(peer_seconds, block, 12, theirs_on).result()
            except Exception as error:
                print(f"SKIP  {claim}: {type(error).__name__}: {error}")
                continue
        told = f"{ours:.2f} s, weightwatcher {theirs:.1f} s, {theirs / ours:.0f} times faster"
        print(f"{claim}: {told}")


def succeeds(name: str, part: Callable[[], None]) -> bool:
    """Run a part; if it raises, say so."""
    print(f"\n{name}")
    started = time.perf_counter()
    try:
        part()
    except Exception as error:
        print(f"FAIL  {name}: {type(error).__name__}: {error}")
        traceback.print_exc(file=sys.stdout)
        return False
    print(f"({time.perf_counter() - started:.0f} s)")
    return True


def parts_of(args: argparse.Namespace, device: str, name: str) -> dict[str, Callable[[], None]]:
    """The parts by name, what is worth most first."""
    known = next((peak for key, peak in PEAKS.items() if key in name), None)
    peak = tuple(args.peak) if args.peak else known
    common = (device, args.small)
    return {
        "ways": partial(ways, *common),
        "correctness": partial(correctness, *common),
        "kernels": partial(kernels, *common, peak),
        "shortage": partial(shortage, *common),
        "reports": partial(reports, *common, args.blocks),
        "projections": partial(projections, *common, args.projected_blocks),
        "overhead": partial(overhead, *common),
        "peer_ratio": partial(peer_ratio, *common),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes, a minute on a laptop")
    parser.add_argument("--part", action="append", help="one part only; can be repeated")
    parser.add_argument("--blocks", type=int, default=32, help="of a 7B model to report on")
    parser.add_argument("--projected-blocks", type=int, default=4, help="of these to project")
    parser.add_argument(
        "--peak",
        type=float,
        nargs=2,
        metavar=("FLOPS", "BYTES"),
        help="float64 operations and bytes a second of a device that is not known",
    )
    return parser.parse_args()


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # a run that is cut short keeps what it printed
    args = parse()
    cuda = on_cuda(args.device)
    if cuda and not torch.cuda.is_available():
        skip("no CUDA device; --device cpu --small tries the code")
    with torch.cuda.device(args.device) if cuda else nullcontext():
        device = f"cuda:{torch.cuda.current_device()}" if cuda else args.device
        name = torch.cuda.get_device_name(device) if cuda else "CPU"
        parts = parts_of(args, device, name)
        chosen = [part for part in parts if part in (args.part or parts)]
        if unknown := set(args.part or ()) - set(parts):
            raise SystemExit(f"no part {', '.join(sorted(unknown))}: there are {', '.join(parts)}")
        print(f"{name}, torch {torch.__version__}{', small shapes' if args.small else ''}")
        done = [succeeds(part, parts[part]) for part in chosen]
    raise SystemExit(not all(done))


if __name__ == "__main__":
    main()
