"""Claim: 300 layers over 50 epochs are one small TensorBoard run, logged in 50 ms an epoch.

A report of 300 layers, whose numbers change from epoch to epoch, goes to a `Board` as the monitor would
send it, without the figures and with them. Printed are run folders and files, size, seconds to write,
and seconds that TensorBoard's own reader takes to load everything. The second line is what the board
spares: every metric of every layer as a scalar.

    python benchmarks/tensorboard_scale.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from claims import skip, verdict
from torch import nn
from tqdm.auto import tqdm

from ww_train import LayerReport, Report, measure
from ww_train.callbacks.tensorboard import Board

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")

MOST_SECONDS = 0.05
"""That logging of one epoch may take, figures aside."""

Epoch = tuple[Report, dict[str, float]]


@dataclass(frozen=True)
class Cost:
    """What logging one training costs.

    Attributes:
        runs: Folders with event files.
        files: Event files.
        megabytes: Their size.
        seconds: To log, by epoch.
        load: Seconds to read all of it.
        tags: Charts of scalars.
    """

    runs: int
    files: int
    megabytes: float
    seconds: Sequence[float]
    load: float
    tags: int

    def line(self, name: str) -> str:
        typical, slowest = statistics.median(self.seconds), max(self.seconds)
        return (
            f"{name:24}{self.runs:5d}{self.files:6d}{self.tags:7d}{self.megabytes:7.1f}"
            f"{1000 * typical:10.1f}{1000 * slowest:10.1f}{self.load:8.1f}"
        )


def training(layers: int, epochs: int) -> Iterator[Epoch]:
    """Reports and scalars as of a training, from a few real spectra that shrink towards criticality."""
    torch.manual_seed(0)
    some = measure(nn.Sequential(*(nn.Linear(48, 48) for _ in range(8))), randomize=True).layers
    names = [f"model.layers.{i // len(KINDS)}.{KINDS[i % len(KINDS)]}" for i in range(layers)]
    for epoch in range(epochs):
        rows = [moved(some[i % 8], i, name, epoch) for i, name in enumerate(names)]
        report = Report(tuple(rows), ())
        yield report, report.scalars() | {"ww/seconds": 1.0, "ww/num_measured": float(layers)}


def moved(layer: LayerReport, i: int, name: str, epoch: int) -> LayerReport:
    fit = layer.fit and replace(
        layer.fit, alpha=2.0 + (layer.fit.alpha - 2.0) * 0.97**epoch + i / 300
    )
    return replace(layer, name=name, layer_id=i, fit=fit)


def cost(board: Board, folder: Path, epochs: Sequence[Epoch], draw: bool) -> Cost:
    """Log a training, and read it again."""
    history: list[dict[str, float]] = []
    seconds = []
    for n, (report, scalars) in enumerate(tqdm(epochs, unit="epoch", leave=False, file=sys.stderr)):
        history.append({"epoch": float(n), "step": 100.0 * n, **scalars})
        started = time.perf_counter()
        board(scalars, 100 * n)
        afford = float("inf") if draw else 0.0
        board.log_report(report, history, n, 100 * n, seconds=afford)
        seconds.append(time.perf_counter() - started)
    board.close()
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    load, tags = loading(folder)
    runs = len({path.parent for path in files})
    return Cost(runs, len(files), size / 1e6, seconds[1:], load, tags)


def loading(folder: Path) -> tuple[float, int]:
    """Seconds until TensorBoard has everything in memory, and the number of scalar tags."""
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    started = time.perf_counter()
    runs = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    seconds = time.perf_counter() - started
    shown = runs.PluginRunToTagToContent("scalars")
    return seconds, sum(len(tags) for tags in shown.values())


class Everything(Board):
    """What would be written without a choice."""

    def __call__(self, scalars: dict[str, float], step: int) -> None:
        self._add_scalars(scalars, step)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=300, help="default: 300")
    parser.add_argument("--epochs", type=int, default=50, help="default: 50")
    args = parser.parse_args()
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as error:
        skip(error)
    epochs = list(training(args.layers, args.epochs))
    print(f"{args.layers} layers, {args.epochs} epochs\n")
    columns = f"{'runs':>5}{'files':>6}{'tags':>7}{'MB':>7}{'ms/epoch':>10}{'slowest':>10}"
    print(f"{'':24}{columns}{'load s':>8}")
    costs = {}
    for name, kind, draw in (
        ("board, no figures", Board, False),
        ("every scalar", Everything, False),
        ("board with figures", Board, True),
    ):
        with tempfile.TemporaryDirectory() as folder:
            costs[name] = cost(kind(folder), Path(folder), epochs, draw)
        print(costs[name].line(name), flush=True)
    board = costs["board, no figures"]
    typical = statistics.median(board.seconds)
    print()
    verdict("one run, one event file", (board.runs, board.files) == (1, 1), f"{board.files} files")
    verdict(
        f"at most {1000 * MOST_SECONDS:.0f} ms an epoch, figures aside",
        typical <= MOST_SECONDS,
        f"{1000 * typical:.1f} ms",
    )


if __name__ == "__main__":
    main()
