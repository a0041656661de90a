"""Few data, very long training: do alpha below 2 and traps announce that the test accuracy will fall?

    python examples/overtraining.py                                    # embedded digits
    python examples/overtraining.py --dataset mnist --data-dir FOLDER --steps 100000

The setting in which networks "grok" (Liu et al., ICLR 2023): few images, squared error, initial weights
several times too large; a step sees all images. Prakash and Martin (2025) train on, without weight
decay, for up to ten million steps and see a third phase, "anti-grokking": the test accuracy falls again,
which an alpha below 2 and correlation traps give away. Here with and without weight decay.
"""

from __future__ import annotations

import pandas as pd
import torch
from matplotlib.figure import Figure
from outcome import save
from small_mlp import HIDDEN, Data, arguments, draw, draw_alpha, due, mlp, read, state, train
from torch import Tensor
from torch.nn.functional import mse_loss, one_hot


def squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance to the one-hot labels."""
    return mse_loss(output, one_hot(y, 10).float())


def run(data: Data, decay: float, scale: float, steps: int, seed: int) -> list[dict[str, float]]:
    """Train one network; a row for each step at which it was measured."""
    model = mlp(data, (200, 200), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=decay, fused=True)
    how = {"epochs": steps, "batch_size": len(data.y), "seed": seed, "loss": squared_error}
    return [
        {"decay": decay, "seed": seed, "step": step, **state(model, data)}
        for step in train(model, [optimizer], data, **how, title=f"decay {decay:g}, seed {seed}")
        if due(step, steps, per_decade=8)
    ]
