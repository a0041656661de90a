"""Shared by the *_evidence benchmarks: training, a log of finished runs, tables with paired tests.

A sweep appends one JSON line for each finished run, so that it may be stopped and started again;
all tables are made from that log.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from claims import skip
from peer import peer, peer_analyze
from scipy.stats import ttest_rel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from ww_train import WWPGD, Projected

Row = dict[str, Any]
"""Settings and results of one run."""

Wrap = Callable[[nn.Module, Optimizer], Optimizer]
"""What an arm does to the base optimizer."""


def bare(model: nn.Module, base: Optimizer) -> Optimizer:
    """The base optimizer as it is: the arm that the others are compared with."""
    return base


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over the last dimension of the logits."""
    return nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())


@dataclass
class Course:
    """How a run went.

    Attributes:
        distances: Relative distance of the farthest layer to the projection's target, before each
            projection.
        cpu: Processor seconds spent on the steps.
        cpu_projection: Processor seconds spent on projections.
    """

    distances: list[float] = field(default_factory=list)
    cpu: float = 0.0
    cpu_projection: float = 0.0


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    every: int,
    watch: Callable[[int], None] = lambda step: None,
) -> Course:
    """Train with gradients clipped to norm 1; after `every` steps call `watch`, then project."""
    course = Course()
    for step, (x, y) in enumerate(batches, start=1):
        start = time.process_time()
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        course.cpu += time.process_time() - start
        if step % every == 0:
            watch(step)
            start = time.process_time()
            done = optimizer.end_epoch() if isinstance(optimizer, WWPGD) else ()
            course.cpu_projection += time.process_time() - start
            course.distances += _farthest(done)
    return course


def _farthest(done: Iterable[object]) -> list[float]:
    distances = [layer.distance for layer in done if isinstance(layer, Projected)]
    return [max(distances)] if distances else []


def epochs_of(
    x: Tensor, y: Tensor, *, epochs: int, batch: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of every epoch, in an order fixed by the seed."""
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=order).split(batch):
            yield x[chosen], y[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Accuracy in percent."""
    hits = [
        (model(a).argmax(1) == b).sum() for a, b in zip(x.split(2000), y.split(2000), strict=True)
    ]
    return 100.0 * float(sum(hits)) / len(y)


@torch.no_grad()
def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean loss over a set."""
    parts = zip(x.split(2000), y.split(2000), strict=True)
    return sum(float(loss_of(model, a, b)) * len(a) for a, b in parts) / len(x)


def spectra(model: nn.Module) -> Row:
    """Alpha and ERG gap by weightwatcher, and the distance to the manifold of alpha 2, by layer.

    Only of the layers that WWPGD would project; the model is left as it is.
    """
    copy = deepcopy(model)
    probe = WWPGD(torch.optim.SGD(copy.parameters()), model=copy, strength=0.0)
    done = {layer.name: layer for layer in probe.end_epoch() if isinstance(layer, Projected)}
    read = peer_analyze(model, detX=True).set_index("longname")
    return {
        "alpha": {name: float(read.alpha[name]) for name in done},
        "gap": {name: int(read.ERG_gap[name]) for name in done},
        "distance": {name: layer.distance for name, layer in done.items()},
    }


def finished(log: Path) -> list[Row]:
    """The rows of a log; none if there is no log yet."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def sweep(
    args: argparse.Namespace, load: Callable[[], Any], run: Callable[..., Row], keys: Sequence[Row]
) -> list[Row]:
    """Call `run(data, **key)` for each key that is not yet in the log, and append what it returns.

    Nothing is run with `--report`, nor if weightwatcher or the data are missing: that is said.

    Returns:
        All rows of the log.
    """
    if not args.report:
        try:
            peer()
            data = load()
        except (ModuleNotFoundError, FileNotFoundError) as error:
            skip(error)
        rows = finished(args.log)
        missing = [key for key in keys if not any(key.items() <= row.items() for row in rows)]
        for key in tqdm(missing, unit="run", file=sys.stderr):
            row = {**key, **run(data, **key)}
            with args.log.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return finished(args.log)


def mean_sd(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation of the runs, the latter if there are two or more."""
    text = format(statistics.fmean(values), form)
    return (
        text
        if len(values) < 2
        else f"{text} ± {format(statistics.stdev(values), form.lstrip('+'))}"
    )


def paired(first: Sequence[Row], second: Sequence[Row], name: str, form: str) -> str:
    """Mean difference ± deviation over common seeds, with the p of a paired t-test."""
    before = {row["seed"]: row[name] for row in first}
    pairs = [(before[row["seed"]], row[name]) for row in second if row["seed"] in before]
    if not pairs:
        return ""
    text = mean_sd([b - a for a, b in pairs], "+" + form)
    if len(pairs) < 3:
        return text
    return f"{text} (p {ttest_rel(*zip(*pairs, strict=True)).pvalue:.2f})"


def table(
    rows: Sequence[Row],
    columns: Mapping[str, Callable[[list[Row]], str]],
    differences: Mapping[str, str],
) -> str:
    """A Markdown table, one line for each arm in the order of the log.

    Args:
        rows: Runs that differ by arm and seed only.
        columns: What to print of an arm's runs, by title.
        differences: Results whose difference to the first arm is printed, with their format.
    """
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    head = ["arm", "seeds", *columns, *(f"{name}, difference" for name in differences)]
    lines = [head, ["---"] * len(head)]
    baseline = next(iter(arms), None)
    for arm, mine in arms.items():
        cells = [column(mine) for column in columns.values()]
        for name, form in differences.items():
            cells.append("" if arm == baseline else paired(arms[baseline], mine, name, form))
        lines.append([arm, str(len(mine)), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(name: str, form: str) -> Callable[[list[Row]], str]:
    """A column of mean ± deviation of one result."""
    return lambda rows: mean_sd([row[name] for row in rows], form)


def late_distance(rows: list[Row]) -> str:
    """A column of the mean distance to the target before the projections of the last third."""
    lists = [row["distances"] for row in rows]
    if not all(lists):
        return ""
    return format(
        statistics.fmean(statistics.fmean(d[-(-len(d) * 2 // 3) :]) for d in lists), ".3f"
    )


def by_layer(name: str, form: str) -> Callable[[list[Row]], str]:
    """A column of the mean over seeds for each layer, in order; their range if more than three."""

    def cell(rows: list[Row]) -> str:
        layers = rows[0][name]
        means = [statistics.fmean(row[name][layer] for row in rows) for layer in layers]
        if len(means) <= 3:
            return " ".join(format(mean, form) for mean in means)
        return f"{format(min(means), form)} … {format(max(means), form)}"

    return cell


def sweep_arguments(description: str | None, log: str, seeds: int) -> argparse.ArgumentParser:
    """A parser with the options that every sweep has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir",
        default=os.environ.get("WW_TRAIN_DATA"),
        help="folder with mnist/*-ubyte.gz and tinyshakespeare.txt; default: WW_TRAIN_DATA",
    )
    parser.add_argument("--log", type=Path, default=Path(log), help=f"JSON lines; default: {log}")
    parser.add_argument("--arms", nargs="+", help="only these arms; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)))
    parser.add_argument("--report", action="store_true", help="only print the tables of the log")
    return parser
