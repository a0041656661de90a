"""A small convolutional net on 10,000 MNIST images: AdamW, WW_PGD's method, the manifold.

Convolutions of 3x3 with 16, 32 and 64 channels, each followed by a pooling, then linear layers of 128
and 10 outputs; AdamW with lr 1e-3 and cosine decay to zero, batches of 64, gradients clipped to norm
1, 12 epochs. The slices of a convolution have one pooled spectrum, of 144 and 288 eigenvalues; the
nine of conv1 are too few. The same seed gives every arm the same initial weights and order of images.

    WW_TRAIN_DATA=FOLDER python benchmarks/conv_evidence.py
    WW_TRAIN_DATA=FOLDER python benchmarks/conv_evidence.py --epochs 2 --seeds 0 --log short.jsonl
"""

from __future__ import annotations

from dataclasses import replace

import torch
from evidence import Row, sweep, sweep_arguments, table
from mnist_evidence import ARMS, COLUMNS, Shaken, cosine, load_shaken, train
from torch import Tensor, nn

IMAGES, BATCH = 10_000, 64


class ConvNet(nn.Module):
    """Three convolutions and two linear layers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * 3 * 3, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 1, 28, 28)
        for conv in (self.conv1, self.conv2, self.conv3):
            x = nn.functional.max_pool2d(conv(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


def load(data_dir: str | None) -> Shaken:
    """MNIST with the first of its training images only."""
    data = load_shaken(data_dir)
    x, y = data.plain.train_x[:IMAGES], data.plain.train_y[:IMAGES]
    return replace(data, plain=replace(data.plain, train_x=x, train_y=y))


def run(data: Shaken, arm: str, epochs: int, seed: int) -> Row:
    """One run of the net."""
    return train(ConvNet(seed), ARMS[arm], cosine, data, batch=BATCH, epochs=epochs, seed=seed)


def main() -> None:
    parser = sweep_arguments(__doc__, "conv_evidence.jsonl", seeds=3)
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    keys = [
        {"arm": arm, "epochs": args.epochs, "seed": seed}
        for seed in args.seeds
        for arm in args.arms or ARMS
    ]
    rows = sweep(args, lambda: load(args.data_dir), run, keys)
    print(f"\n{args.epochs} epochs\n")
    mine = [row for row in rows if row["epochs"] == args.epochs]
    print(table(mine, COLUMNS, {"test": ".2f", "augmented": ".2f"}))


if __name__ == "__main__":
    main()
