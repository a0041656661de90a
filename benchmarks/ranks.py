"""Claim: two processes on two cores analyse and project a model 1.8 times faster than one.

One process with one thread measures and projects a model; then two processes, joined by gloo, with one
thread each, do the same with the layers dealt between them. Numbers and weights must be the same.
Needs two idle cores.

    python benchmarks/ranks.py
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from claims import verdict
from torch import nn

from ww_train import WWPGD, measure
from ww_train.steering.replicas import project_replicas_
from ww_train.steering.tasks import Task, project_all_

BLOCK = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
"""The matrices of a block of a transformer of the size of GPT-2 or BERT."""

REPEATS = 3


def network(blocks: int) -> nn.ModuleList:
    """Layers with heavy-tailed weights, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    layers = nn.ModuleList()
    for rows, cols in BLOCK * blocks:
        layer = nn.Linear(cols, rows, bias=False)
        scale = torch.logspace(0, -2, cols)
        layer.weight.data = torch.randn(rows, cols, generator=generator) / cols**0.5 * scale
        layers.append(layer)
    return layers


def seconds(call: Callable[[], Any], before: Callable[[], object] = bool) -> tuple[float, Any]:
    """The least time of a few calls, between barriers if there are several processes."""
    best, result = float("inf"), None
    for _ in range(REPEATS):
        before()
        if dist.is_initialized():
            dist.barrier()
        started = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - started)
    return best, result


def work(rank: int, ranks: int, blocks: int, folder: str) -> None:
    """Measure and project, alone or with another process; the first one saves what came out."""
    torch.set_num_threads(1)
    group = None
    if ranks > 1:
        store = dist.FileStore(os.path.join(folder, "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        group = dist.group.WORLD
    model = network(blocks)
    measure(model[:1])  # loads libraries
    analysed, report = seconds(lambda: measure(model, randomize=True, group=group))

    optimizer = WWPGD(torch.optim.SGD(model.parameters()), model=model)
    tasks = [task for task in optimizer.targets() if isinstance(task, Task)]
    first = [parameter.detach().clone() for parameter in model.parameters()]

    def reset() -> None:
        for parameter, weights in zip(model.parameters(), first, strict=True):
            parameter.data.copy_(weights)

    def project() -> None:
        if group is None:
            project_all_(tasks, 0.5)
        else:
            project_replicas_(tasks, 0.5, group)

    projected, _ = seconds(project, reset)
    if rank == 0:
        numbers = [(layer.alpha, layer.num_traps) for layer in report]
        found = (analysed, projected, numbers, [p.detach() for p in model.parameters()])
        torch.save(found, os.path.join(folder, f"{ranks}.pt"))
    if ranks > 1:
        dist.destroy_process_group()


def run(ranks: int, blocks: int) -> tuple[float, float, list[Any], list[torch.Tensor]]:
    """What `work` saved."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (ranks, blocks, folder), nprocs=ranks)
        found: tuple[float, float, list[Any], list[torch.Tensor]] = torch.load(
            os.path.join(folder, f"{ranks}.pt"), weights_only=True
        )
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=4, help="blocks of six matrices")
    args = parser.parse_args()
    one, two = run(1, args.blocks), run(2, args.blocks)
    for name, alone, shared in zip(("analysis with traps", "projection"), one, two, strict=False):
        verdict(
            f"{name} of {6 * args.blocks} matrices, two processes at least 1.8 times faster",
            alone / shared >= 1.8,
            f"{alone:.2f} s alone, {shared:.2f} s shared, {alone / shared:.2f} times",
        )
    same = all(torch.equal(a, b) for a, b in zip(one[3], two[3], strict=True))
    verdict("the same numbers", one[2] == two[2], f"{len(one[2])} layers")
    verdict("the same weights, bit for bit", same, f"{len(one[3])} layers")


if __name__ == "__main__":
    main()
