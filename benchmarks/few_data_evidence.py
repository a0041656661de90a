"""Few MNIST images and long training, where alpha sinks below 2: does holding it at 2 help?

An MLP 784-512-512-10 learns 1000 images (others for each seed) for 60 epochs of 32 batches with
AdamW, cosine decay to zero, gradients clipped to norm 1: with 30 % of the labels replaced by other
ones, and with clean labels and a learning rate so high that alpha sinks far below 2. Projections come
every 100 steps. If alpha 2 is special, a target of 3 should do less good than one of 2. "Best" is the
best accuracy on the test set in the course of a run, seen every 300 steps: an optimistic early
stopping, for comparison only.

    WW_TRAIN_DATA=FOLDER python benchmarks/few_data_evidence.py
    WW_TRAIN_DATA=FOLDER python benchmarks/few_data_evidence.py --epochs 4 --seeds 0 --log short.jsonl
"""

from __future__ import annotations

import torch
from evidence import (
    Row,
    Wrap,
    accuracy,
    bare,
    by_layer,
    epochs_of,
    fit,
    mean_loss,
    number,
    spectra,
    sweep,
    sweep_arguments,
    table,
)
from mnist_mlp import MLP, Digits, load_mnist
from torch import Tensor
from torch.optim import AdamW, lr_scheduler

from ww_train import WWPGD, LayerReport, ManifoldProjection

IMAGES, BATCH, EVERY = 1000, 32, 100


def below_two(layer: LayerReport) -> bool:
    """Whether a layer is projected by the arm that only holds alpha up."""
    return layer.alpha is not None and layer.alpha < 2.0


ARMS: dict[str, Wrap] = {
    "AdamW": bare,
    "alpha 2": lambda model, base: WWPGD(base, model=model),
    "alpha 2 where below": lambda model, base: WWPGD(base, model=model, when=below_two),
    "alpha 3": lambda model, base: WWPGD(base, model=model, projection=ManifoldProjection(3.0)),
}

SETTINGS = ({"noise": 0.3, "lr": 3e-3}, {"noise": 0.0, "lr": 1e-2})


def few(data: Digits, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Images drawn from the training set, a share of their labels replaced by wrong ones."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train_x), generator=generator)[:IMAGES]
    labels = data.train_y[chosen]
    wrong = torch.rand(IMAGES, generator=generator) < noise
    other = (labels + torch.randint(1, 10, (IMAGES,), generator=generator)) % 10
    return data.train_x[chosen], torch.where(wrong, other, labels)


def run(data: Digits, arm: str, noise: float, lr: float, epochs: int, seed: int) -> Row:
    """One run and what came of it."""
    x, y = few(data, noise, seed)
    model = MLP(seed)
    optimizer = ARMS[arm](model, AdamW(model.parameters(), lr=lr, fused=True))
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-IMAGES // BATCH))
    curve: list[float] = []

    def watch(step: int) -> None:
        if step % (3 * EVERY) == EVERY:
            curve.append(accuracy(model, data.test_x, data.test_y))

    batches = epochs_of(x, y, epochs=epochs, batch=BATCH, seed=seed)
    course = fit(model, optimizer, schedule, batches, every=EVERY, watch=watch)
    return {
        "test": accuracy(model, data.test_x, data.test_y),
        "best": max(curve),
        "train_loss": mean_loss(model, x, y),
        **spectra(model),
        "curve": curve,
        "distances": course.distances,
    }


COLUMNS = {
    "test %": number("test", ".2f"),
    "best %": number("best", ".2f"),
    "train loss": number("train_loss", ".1e"),
    "alpha": by_layer("alpha", ".2f"),
    "ERG gap": by_layer("gap", ".0f"),
}


def main() -> None:
    parser = sweep_arguments(__doc__, "few_data_evidence.jsonl", seeds=8)
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()
    keys = [
        {"arm": arm, **setting, "epochs": args.epochs, "seed": seed}
        for seed in args.seeds
        for setting in SETTINGS
        for arm in args.arms or ARMS
    ]
    rows = sweep(args, lambda: load_mnist(args.data_dir), run, keys)
    for setting in SETTINGS:
        mine = [row for row in rows if {**setting, "epochs": args.epochs}.items() <= row.items()]
        print(
            f"\n{setting['noise']:.0%} wrong labels, lr {setting['lr']:g}, {args.epochs} epochs\n"
        )
        print(table(mine, COLUMNS, {"test": ".2f"}))


if __name__ == "__main__":
    main()
