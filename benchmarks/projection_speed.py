"""Wall time of one projection of a whole model: ww_train against WW_PGD, side by side.

What a training pays at the end of an epoch. `WWPGD.end_epoch` decomposes each layer once;
WW_PGD 0.1.0, re-implemented in benchmarks/ww_pgd.py, has weightwatcher analyse the model and then
decomposes each layer again. Both start from the same float32 weights, take turns in this process with
the same number of threads, and run once to warm up; the median of --repeats is printed. ww_train works
in float64, WW_PGD's own decomposition in float32. With --device cuda both work on the GPU, except for
weightwatcher's analysis, which is done on the CPU.

Measure on an idle machine: waiting threads spin, so that others' load inflates both columns.

    pip install weightwatcher==0.7.7
    python benchmarks/projection_speed.py
"""

from __future__ import annotations

import argparse
import os
import statistics
from copy import deepcopy

import torch
from claims import skip, verdict
from mnist_mlp import MLP
from peer import VERSION, peer
from speed import Seconds, line, timed
from torch import nn
from torch.optim import SGD
from ww_pgd import ww_pgd_

from ww_train import WWPGD
from ww_train.steering.manifold_projection import ManifoldProjection
from ww_train.steering.projection import Projection
from ww_train.steering.tail_projection import TailProjection

MLP_NAME, LARGE_NAME = "MLP 784-512-512-10", "2048 x 2048"

CLAIMS = {MLP_NAME: 5, LARGE_NAME: 10}
"""Least ratios of wall time, of ManifoldProjection."""

STRENGTH = 0.5
"""Of both; it does not change what is computed."""


def large(layers: int) -> nn.Sequential:
    """Linear layers of 2048 x 2048 as torch initialises them."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(layers)])


def ours(model: nn.Module, projection: Projection) -> Seconds:
    """Time of one boundary of a new optimizer on a copy of the model."""
    model = deepcopy(model)
    base = SGD(model.parameters(), lr=0.1)
    optimizer = WWPGD(base, model=model, strength=STRENGTH, projection=projection, strict=True)
    return timed(lambda: finished(optimizer.end_epoch()))


def theirs(model: nn.Module) -> Seconds:
    """Time of one projection by WW_PGD on a copy of the model."""
    model = deepcopy(model)
    return timed(lambda: finished(ww_pgd_(model, STRENGTH)))


def finished(_: object) -> None:
    """Wait for the GPU, if there is work on it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(name: str, model: nn.Module, repeats: int) -> float:
    """Print one line for each of our projections; the ratio of wall times of the first."""
    projections = (ManifoldProjection(), TailProjection())
    mine: dict[Projection, list[Seconds]] = {projection: [] for projection in projections}
    peers = []
    for repeat in range(repeats + 1):
        times = [ours(model, projection) for projection in projections]
        peer_time = theirs(model)
        if repeat > 0:
            peers.append(peer_time)
            for projection, seconds in zip(projections, times, strict=True):
                mine[projection].append(seconds)
    for projection, seconds in mine.items():
        label = type(projection).__name__.removesuffix("Projection").lower()
        print(line(f"{name}, {label}", seconds, peers), flush=True)
    a, b = (statistics.median(t.wall for t in times) for times in (mine[projections[0]], peers))
    return b / a


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both")
    parser.add_argument("--device", default="cpu", help="of the weights (default cpu)")
    parser.add_argument("--layers", type=int, default=2, help="of 2048 x 2048 (default 2)")
    args = parser.parse_args()
    try:
        peer()
    except ModuleNotFoundError as error:
        skip(error)
    from threadpoolctl import threadpool_limits  # comes with the peer

    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    torch.set_num_threads(args.threads)
    print(
        f"{args.device}, {args.threads} threads of {os.cpu_count()} cores, torch {torch.__version__}, "
        f"median of {args.repeats}, load before {load}\n"
    )
    print(
        f"{'':30}{'wall: ours':>10}{'WW_PGD':>15}{'ratio':>7}"
        f"{'CPU: ours':>12}{'WW_PGD':>15}{'ratio':>7}"
    )
    with threadpool_limits(args.threads):
        ratios = {
            MLP_NAME: compare(MLP_NAME, MLP(seed=0).to(args.device), args.repeats),
            LARGE_NAME: compare(LARGE_NAME, large(args.layers).to(args.device), args.repeats),
        }
    print(
        f"\nseconds a projection; WW_PGD analyses with weightwatcher {VERSION}; "
        "a ratio above 1 means ww_train is faster"
    )
    for name, least in CLAIMS.items():
        verdict(
            f"{name}: at least {least} times faster", ratios[name] >= least, f"{ratios[name]:.1f}"
        )


if __name__ == "__main__":
    main()
