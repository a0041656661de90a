"""Few data, very long training: do alpha below 2 and traps announce that the test accuracy will fall?

    python examples/overtraining.py                                    # embedded digits
    python examples/overtraining.py --dataset mnist --data-dir FOLDER --steps 100000

The setting in which networks "grok" (Liu et al., ICLR 2023): few images, squared error, initial weights
several times too large; a step sees all images. Prakash and Martin (arXiv 2506.04434) train on without
weight decay, for ten million steps, and see a third phase, "anti-grokking": the test accuracy falls
again, heralded by an alpha below 2 and correlation traps. Here: fewer steps, with and without decay.
"""

from __future__ import annotations

import pandas as pd
import torch
from matplotlib.figure import Figure
from outcome import save
from small_mlp import (
    HIDDEN,
    Data,
    arguments,
    count,
    draw_errors,
    draw_layers,
    due,
    mlp,
    read,
    state,
    train,
)
from torch import Tensor
from torch.nn.functional import mse_loss, one_hot

DECAYS = (0.0, 0.1)


def squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance to the one-hot labels."""
    return mse_loss(output, one_hot(y, 10).float())


def run(data: Data, decay: float, scale: float, steps: int, seed: int) -> list[dict[str, float]]:
    """Train one network; a row for each step at which it was measured."""
    model = mlp(data, (128, 128), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=decay, fused=True)
    how = {"epochs": steps, "batch_size": len(data.y), "seed": seed, "loss": squared_error}
    return [
        {"decay": decay, "seed": seed, "step": step, **state(model, data)}
        for step in train(model, [optimizer], data, **how, title=f"decay {decay:g}, seed {seed}")
        if due(step, steps)
    ]


def first(true: pd.Series) -> str:
    """The first step at which this holds."""
    return f"from step {true.idxmax()}" if true.any() else "never"


def finding(means: pd.DataFrame, decay: float) -> str:
    """What happened with this weight decay; the means over the seeds by step."""
    error = means.test_error
    best, last = error.idxmin(), error.index[-1]
    alarms = []
    for name in HIDDEN:
        alpha, traps = means[f"alpha_{name}"], means[f"traps_{name}"]
        alarms.append(
            f"alpha of {name} below 2: {first(alpha < 2.0)} ({alpha[last]:.2f} in the end), "
            f"a trap or more in {name}: {first(traps >= 1.0)}"
        )
    return (
        f"Weight decay {decay:g}: no training error: {first(means.train_error == 0.0)}; least test "
        f"error: {error[best]:.1f} % at step {best}, in the end {error[last]:.1f} %; "
        f"{'; '.join(alarms)}."
    )


def figure(rows: pd.DataFrame) -> Figure:
    """Errors, alpha and traps by step; a column of panels for each weight decay."""
    drawn = Figure(figsize=(9.0, 8.0), dpi=110, layout="constrained")
    axes = drawn.subplots(3, len(DECAYS), sharex=True, sharey="row")
    for column, (decay, part) in zip(axes.T, rows.groupby("decay"), strict=True):
        draw_errors(column[0], part, "step")
        draw_layers(column[1], part, "step", "alpha", "alpha")
        draw_layers(column[2], part, "step", "traps", "traps")
        column[0].set_title(f"weight decay {decay:g}")
        column[2].set(xlabel="step", xscale="log")
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    return drawn


def main() -> None:
    parser = arguments(__doc__, "overtraining")
    parser.add_argument("--steps", type=int, default=10000, help="of each network (10000)")
    parser.add_argument("--scale", type=float, default=3.0, help="of the initial weights (3)")
    parser.set_defaults(samples=100, seeds=2)
    args = parser.parse_args()
    data, rows = read(args), []
    for seed in range(args.seed, args.seed + args.seeds):
        for decay in DECAYS:
            rows += run(data, decay, args.scale, args.steps, seed)
    frame = pd.DataFrame(rows)
    means = {decay: part.groupby("step").mean() for decay, part in frame.groupby("decay")}
    said = " ".join(finding(found, decay) for decay, found in means.items())
    shown = [found.iloc[:: -max(len(found) // 8, 1)][::-1] for found in means.values()]
    table = pd.concat(shown).reset_index().drop(columns=["seed", "ERG_gap_fc1", "ERG_gap_fc2"])
    sentence = f"{args.samples} images of {args.dataset}, means of {count(args.seeds)}. {said}"
    save(args.out, figure(frame), table, sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
