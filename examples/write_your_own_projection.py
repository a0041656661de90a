"""Two projections of one's own, a cap on singular values and one on row norms, given to WWPGD.

python examples/write_your_own_projection.py               # embedded digits, a few seconds
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from images import load
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ww_train import WWPGD, Projected, Skipped, WeightMatrix, measure
from ww_train.spectrum import Spectrum
from ww_train.steering.projection import Move, Projection, SpectralProjection


class SingularValueCap(SpectralProjection):
    """No singular value above 2: say where the eigenvalues go, the base class does the rest."""

    min_evals = 1  # of a layer: nothing is fitted here

    def move(self, spectrum: Spectrum, strength: float) -> Move | str:
        old = spectrum.evals[::-1]  # descending
        target = np.minimum(old, 2.0**2)
        distance = np.linalg.norm(np.sqrt(target) - np.sqrt(old)) / spectrum.norm**0.5
        return Move(old + strength * (target - old), distance, int((old > target).sum()))


class RowNormCap:
    """No row longer than 0.8: any object with `project_` will do, it need not decompose anything."""

    def project_(self, matrix: WeightMatrix, strength: float) -> Projected | Skipped:
        norms = matrix.stack.norm(dim=-1, keepdim=True)
        if matrix.read_only or not norms.isfinite().all():
            return Skipped(matrix.name, matrix.read_only or "NaN or infinite weights")
        excess = (norms - 0.8).clamp_min(0.0)
        matrix.stack.mul_(1.0 - strength * excess / norms.clamp_min(0.8))
        return Projected(matrix.name, strength, float(excess.norm() / norms.norm()))


def train(
    projection: Projection | None, data: TensorDataset, epochs: int, seed: int
) -> nn.Sequential:
    """AdamW on two hidden layers; projected at the end of each epoch, if there is a projection."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if projection:
        optimizer = WWPGD(optimizer, model=model, projection=projection, strength=1.0)
    for _ in range(epochs):
        for x, y in DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if isinstance(optimizer, WWPGD):
            optimizer.end_epoch()
    return model


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train_set, test_set = load("digits")
    test_x, test_y = test_set.tensors
    print(f"{'projection':18}{'accuracy':>8}" + "   singular   row" * 3)
    for projection in (None, SingularValueCap(), RowNormCap()):
        model = train(projection, train_set, args.epochs, args.seed)
        accuracy = 100 * float((model(test_x).argmax(1) == test_y).float().mean())
        name = type(projection).__name__ if projection else "none"
        layers = [
            f"{layer.spectrum.sv_max:11.2f}{model[int(layer.name)].weight.norm(dim=1).max():6.2f}"
            for layer in measure(model)
        ]
        print(f"{name:18}{accuracy:8.1f}{''.join(layers)}")


if __name__ == "__main__":
    main()
