r"""MNIST, MLP 784-512-512-10: AdamW, WW_PGD's method and the projection onto the manifold.

AdamW with lr 1e-3 (constant, or cosine to zero), batches of 128, gradients clipped to norm 1. The
same seed gives every arm the same initial weights and order of images. "Augmented" is the accuracy
on test images that are turned by up to 5 degrees and shifted by up to 3 % of the side, drawn once
with a fixed seed (what WW_PGD's notebooks do, without their jitter of brightness and their blur).

    WW_TRAIN_DATA=FOLDER python benchmarks/mnist_evidence.py
    WW_TRAIN_DATA=FOLDER python benchmarks/mnist_evidence.py --epochs 12 --seeds 0 1 2 --lr cosine \
        --log momentum.jsonl --arms ManifoldProjection "momentum projected" "momentum reset"
    WW_TRAIN_DATA=FOLDER python benchmarks/mnist_evidence.py --epochs 2 --seeds 0 --log short.jsonl
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from evidence import (
    Row,
    Wrap,
    accuracy,
    bare,
    by_layer,
    epochs_of,
    fit,
    late_distance,
    mean_loss,
    number,
    spectra,
    sweep,
    sweep_arguments,
    table,
)
from mnist_mlp import MLP, Digits, load_mnist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, lr_scheduler

from ww_train import WWPGD, Ramp, TailProjection
from ww_train.steering.momentum import project, reset

Decay = Callable[[Optimizer, int], lr_scheduler.LRScheduler]
"""Makes the schedule of the learning rate over so many steps."""

ARMS: dict[str, Wrap] = {
    "AdamW": bare,
    "TailProjection": lambda model, base: WWPGD(
        base, model=model, strength=Ramp(5), projection=TailProjection()
    ),
    "ManifoldProjection": lambda model, base: WWPGD(base, model=model),
}

MOMENTA: dict[str, Wrap] = {
    "momentum projected": lambda model, base: WWPGD(base, model=model, momentum=project),
    "momentum reset": lambda model, base: WWPGD(base, model=model, momentum=reset),
}
"""With the default projection, which keeps the momentum; run only by `--arms`."""


def constant(optimizer: Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)


def cosine(optimizer: Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    return lr_scheduler.CosineAnnealingLR(optimizer, steps)


DECAYS: dict[str, Decay] = {"cosine": cosine, "constant": constant}


@dataclass(frozen=True, eq=False)
class Shaken:
    """MNIST, and its test images each turned and shifted a little."""

    plain: Digits
    test_x: Tensor


def load_shaken(data_dir: str | None) -> Shaken:
    """Read MNIST and shake its test images; raises FileNotFoundError without it."""
    plain = load_mnist(data_dir)
    return Shaken(plain, shaken(plain.test_x))


def shaken(images: Tensor, *, degrees: float = 5.0, shift: float = 0.03, seed: int = 0) -> Tensor:
    """Square images, flat, each turned and shifted at random (bilinear, background around)."""
    generator = torch.Generator().manual_seed(seed)
    turn, right, down = torch.rand(3, len(images), generator=generator) * 2 - 1
    angle = turn * math.radians(degrees)
    rows = [
        angle.cos(),
        -angle.sin(),
        2 * shift * right,
        angle.sin(),
        angle.cos(),
        2 * shift * down,
    ]
    background = images.min()
    square = (images - background).view(len(images), 1, math.isqrt(images.shape[1]), -1)
    grid = nn.functional.affine_grid(
        torch.stack(rows, 1).view(-1, 2, 3), list(square.shape), align_corners=False
    )
    return nn.functional.grid_sample(square, grid, align_corners=False).flatten(1) + background


def train(
    model: nn.Module, wrap: Wrap, decay: Decay, data: Shaken, *, batch: int, epochs: int, seed: int
) -> Row:
    """Train on images and say what came of it."""
    x, y = data.plain.train_x, data.plain.train_y
    optimizer = wrap(model, AdamW(model.parameters(), lr=1e-3, fused=True))
    an_epoch = -(-len(x) // batch)
    last = {}

    def watch(step: int) -> None:
        if step == epochs * an_epoch:
            last["before"] = accuracy(model, data.plain.test_x, data.plain.test_y)

    batches = epochs_of(x, y, epochs=epochs, batch=batch, seed=seed)
    schedule = decay(optimizer, epochs * an_epoch)
    course = fit(model, optimizer, schedule, batches, every=an_epoch, watch=watch)
    return {
        **last,
        "test": accuracy(model, data.plain.test_x, data.plain.test_y),
        "augmented": accuracy(model, data.test_x, data.plain.test_y),
        "train_loss": mean_loss(model, x, y),
        **spectra(model),
        "distances": course.distances,
        "cpu_epoch": (course.cpu + course.cpu_projection) / epochs,
        "cpu_projection": course.cpu_projection / epochs,
    }


def run(data: Shaken, arm: str, lr: str, epochs: int, seed: int) -> Row:
    """One run of the MLP."""
    wrap, decay = (ARMS | MOMENTA)[arm], DECAYS[lr]
    return train(MLP(seed), wrap, decay, data, batch=128, epochs=epochs, seed=seed)


COLUMNS = {
    "test %": number("test", ".2f"),
    "augmented %": number("augmented", ".2f"),
    "before last projection": number("before", ".2f"),
    "train loss": number("train_loss", ".1e"),
    "alpha": by_layer("alpha", ".3f"),
    "ERG gap": by_layer("gap", ".1f"),
    "distance": by_layer("distance", ".3f"),
    "before projections": late_distance,
    "CPU s/epoch": number("cpu_epoch", ".2f"),
}


def main() -> None:
    parser = sweep_arguments(__doc__, "mnist_evidence.jsonl", seeds=5)
    parser.add_argument("--epochs", type=int, default=35)
    parser.add_argument("--lr", choices=DECAYS, nargs="+", default=list(DECAYS))
    args = parser.parse_args()
    keys = [
        {"arm": arm, "lr": lr, "epochs": args.epochs, "seed": seed}
        for seed in args.seeds
        for lr in args.lr
        for arm in args.arms or ARMS
    ]
    rows = sweep(args, lambda: load_shaken(args.data_dir), run, keys)
    for lr in args.lr:
        mine = [row for row in rows if row["lr"] == lr and row["epochs"] == args.epochs]
        print(f"\n{lr} learning rate, {args.epochs} epochs\n")
        print(table(mine, COLUMNS, {"test": ".2f", "augmented": ".2f"}))


if __name__ == "__main__":
    main()
