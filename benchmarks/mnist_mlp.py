"""The network of the benchmarks, 784-512-512-10 on MNIST, and its training loop."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ww_train import WWPGD, Projected

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from images import load

HIDDEN = ("fc1", "fc2")
"""The layers with 512 eigenvalues each; the ten of fc3 are too few for a tail."""


class MLP(nn.Module):
    """Two hidden layers of 512 units."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = nn.Linear(784, 512)
        self.fc2 = nn.Linear(512, 512)
        self.fc3 = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


@dataclass(frozen=True, eq=False)
class Digits:
    """MNIST in memory: flat normalised images and labels."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Boundary:
    """The end of one epoch of a run with WWPGD.

    Attributes:
        accuracy: Test accuracy in percent before the projection.
        distance: Relative distance to the manifold of each layer before the projection.
    """

    accuracy: float
    distance: dict[str, float]


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir",
        default=os.environ.get("WW_TRAIN_DATA"),
        help="folder with MNIST's IDX files; default: the environment variable WW_TRAIN_DATA",
    )


def load_mnist(data_dir: str | None) -> Digits:
    """Read MNIST; nothing is downloaded.

    Raises:
        FileNotFoundError: If there is no folder or no MNIST in it.
    """
    if data_dir is None:
        raise FileNotFoundError("no MNIST: give --data-dir or WW_TRAIN_DATA, a folder of IDX files")
    try:
        train, test = load("mnist", data_dir)
    except SystemExit as error:
        raise FileNotFoundError(str(error)) from None
    return Digits(*train.tensors, *test.tensors)


def train_mlp(data: Digits, *, epochs: int, seed: int, wwpgd: bool = False) -> tuple[MLP, list]:
    """Train with AdamW, lr 1e-3, batches of 128, gradients clipped to norm 1, cosine decay a step.

    The seed fixes the initial weights and the order of the images, with and without WWPGD alike.

    Args:
        data: MNIST.
        epochs: Passes over the training set; the learning rate ends at zero.
        seed: Any integer.
        wwpgd: Wrap AdamW in WWPGD with its defaults and project at the end of every epoch.

    Returns:
        The network, and one `Boundary` an epoch (none without WWPGD).
    """
    model = MLP(seed)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if wwpgd:
        optimizer = WWPGD(optimizer, model=model)
    boundaries = []
    for epoch_ended in steps(model, optimizer, data, epochs=epochs, seed=seed):
        if epoch_ended and isinstance(optimizer, WWPGD):
            before = accuracy(model, data)
            done = [layer for layer in optimizer.end_epoch() if isinstance(layer, Projected)]
            distance = {layer.name: layer.distance for layer in done}
            boundaries.append(Boundary(before, distance))
    return model, boundaries


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Digits, *, epochs: int, seed: int
) -> Iterator[bool]:
    """The training steps of `train_mlp`; after each, whether it was the last one of its epoch."""
    order = torch.Generator().manual_seed(seed)
    number = epochs * -(-len(data.train_x) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, number)
    for _ in range(epochs):
        batches = torch.randperm(len(data.train_x), generator=order).split(128)
        for i, batch in enumerate(batches, start=1):
            loss = nn.functional.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            yield i == len(batches)


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Test accuracy in percent."""
    return 100.0 * float((model(data.test_x).argmax(1) == data.test_y).double().mean())
