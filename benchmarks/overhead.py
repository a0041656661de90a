"""Claims: watching costs at most 1 % of training by default, 5 % in full; logging 300 layers 50 ms.

Two equal MLPs are trained side by side on MNIST, an epoch of the one and an epoch of the other in
turn, so that whatever else the machine does slows both alike. One is watched, with a SummaryWriter as
logger. The default budget lends a second at the start that is paid back after 200 s of training, so
let the run be that long. Afterwards the weights of both must be equal bit for bit.

    WW_TRAIN_DATA=FOLDER python benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time

import torch
from claims import skip, verdict
from mnist_mlp import MLP, Digits, add_data_argument, load_mnist
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from ww_train.callbacks.monitor import SpectralMonitor
from ww_train.callbacks.survey import Survey, Taken


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Digits, batches: list[Tensor]
) -> float:
    """Seconds that one epoch takes."""
    started = time.perf_counter()
    for batch in batches:
        loss = nn.functional.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return time.perf_counter() - started


def overhead(data: Digits, *, epochs: int, budget: float | None) -> tuple[float, bool]:
    """Overhead of watching as a fraction, and whether both networks ended bitwise equal."""
    models = [MLP(0), MLP(0)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    seconds = [0.0, 0.0]
    order = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        started = time.perf_counter()
        monitor = SpectralMonitor(
            models[1], optimizers[1], log_to=writer, budget=budget, summary=False
        )
        monitor.start()
        seconds[1] += time.perf_counter() - started
        for epoch in tqdm(range(epochs), unit="epoch", file=sys.stderr, leave=False):
            batches = list(torch.randperm(len(data.train_x), generator=order).split(128))
            for which in (0, 1) if epoch % 2 else (1, 0):
                if which == 1:
                    monitor.budget.start()  # not the time in which the other one trained
                seconds[which] += train_epoch(models[which], optimizers[which], data, batches)
                if which == 1:
                    started = time.perf_counter()
                    monitor.epoch_end()
                    seconds[1] += time.perf_counter() - started
    weights = zip(models[0].parameters(), models[1].parameters(), strict=True)
    same = all(torch.equal(bare, watched) for bare, watched in weights)
    measured = sum("ww/alpha_mean" in record for record in monitor.history)
    print(
        f"  {epochs} epochs of {seconds[0] / epochs:.2f} s, {measured} measurements, "
        f"by its own account {100 * (monitor.budget.overhead or 0.0):.2f} %"
    )
    return seconds[1] / seconds[0] - 1.0, same


class Timed(Survey):
    """Knows how long the decompositions took."""

    seconds = 0.0

    def take(self, *args: object, **options: object) -> Taken | None:
        taken = super().take(*args, **options)
        self.seconds = taken.seconds if taken else 0.0
        return taken


def logging_cost(layers: int, *, epochs: int) -> float:
    """Median seconds of a boundary beyond the decompositions.

    The median leaves out the few boundaries at which figures are drawn, which have the budget to pay
    for them.
    """
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(layers)])
    costs = []
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        monitor = SpectralMonitor(model, log_to=writer, budget=None, summary=False)
        monitor.survey = Timed(layers=None, randomize=True, vectors=False, replicates=0, seed=0)
        for _ in range(epochs):
            started = time.perf_counter()
            monitor.epoch_end()
            costs.append(time.perf_counter() - started - monitor.survey.seconds)
    return statistics.median(costs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_argument(parser)
    parser.add_argument("--epochs", type=int, default=60, help="with the budget; default: 60")
    parser.add_argument("--full-epochs", type=int, default=12, help="without; default: 12")
    args = parser.parse_args()
    try:
        data = load_mnist(args.data_dir)
    except FileNotFoundError as error:
        skip(error)
    print(f"MLP 784-512-512-10, MNIST, {torch.get_num_threads()} threads")
    for name, epochs, budget, limit in (
        ("default budget", args.epochs, 0.01, 0.01),
        ("every epoch in full", args.full_epochs, None, 0.05),
    ):
        share, same = overhead(data, epochs=epochs, budget=budget)
        verdict(f"{name}: overhead at most {limit:.0%}", share <= limit, f"{share:.2%}")
        verdict(f"{name}: weights bitwise those without", same, "all parameters compared")
    seconds = logging_cost(300, epochs=20)
    verdict(
        "logging 300 layers, figures apart, at most 50 ms",
        seconds <= 0.05,
        f"{1e3 * seconds:.0f} ms",
    )


if __name__ == "__main__":
    main()
