"""What do batch size and learning rate do to the spectra of an MLP, and to its test error?

    python examples/mlp_sweeps.py                                      # embedded digits
    python examples/mlp_sweeps.py --dataset mnist --data-dir FOLDER --samples 2000

A network with two hidden layers (an MLP3) is trained by plain SGD with many batch sizes at one learning
rate, then with many learning rates at one batch size, always for the same number of epochs. Martin and
Mahoney (JMLR 2021) found that smaller batches give heavier tails: a lower alpha. SETOL (Martin and
Hinrichs, 2025) finds the least test error of an MLP3 where alpha is 2, and traps or an alpha below 2
where batches are too small or steps too large.
"""

from __future__ import annotations

import argparse

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
    mlp,
    rank_correlation,
    read,
    state,
    train,
)

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
RATES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
BATCH_SIZE, RATE = 16, 0.04
"""The value that a sweep leaves alone."""

SWEEPS = {"batch size": [(b, RATE) for b in BATCH_SIZES], "rate": [(BATCH_SIZE, r) for r in RATES]}

PANELS = {"alpha": "alpha", "ERG_gap": "ERG gap", "traps": "traps"}


def run(data: Data, batch_size: int, rate: float, epochs: int, seed: int) -> dict[str, float]:
    """Train one network; what it became."""
    model = mlp(data, (256, 128), seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    title = f"batch size {batch_size}, rate {rate}, seed {seed}"
    how = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "title": title}
    for _ in train(model, [optimizer], data, **how):
        pass
    return {"batch size": batch_size, "rate": rate, **state(model, data)}


def finding(means: pd.DataFrame, name: str) -> str:
    """What one sweep shows; the means over the seeds, by the swept value."""
    best = means.test_error.idxmin()
    said = [
        f"alpha of {layer} goes from {means[f'alpha_{layer}'].iloc[0]:.2f} at {name} {means.index[0]:g} "
        f"to {means[f'alpha_{layer}'].iloc[-1]:.2f} at {means.index[-1]:g} "
        f"({rank_correlation(means[f'alpha_{layer}'], means.index.to_series())})"
        for layer in HIDDEN
    ]
    at_best = " and ".join(f"{means[f'alpha_{layer}'][best]:.2f}" for layer in HIDDEN)
    traps = means[[f"traps_{layer}" for layer in HIDDEN]].sum(axis=1)
    return (
        f"{'; '.join(said)}; the test error is least ({means.test_error[best]:.1f} %) at {best:g}, "
        f"where the alphas are {at_best}; there are most traps ({traps.max():.1f} a network) at "
        f"{traps.idxmax():g} and fewest ({traps.min():.1f}) at {traps.idxmin():g}."
    )


def figure(sweeps: dict[str, pd.DataFrame]) -> Figure:
    """A column of panels a sweep."""
    drawn = Figure(figsize=(9.0, 9.0), dpi=110, layout="constrained")
    axes = drawn.subplots(4, len(sweeps), sharex="col", sharey="row")
    for column, (name, rows) in zip(axes.T, sweeps.items(), strict=True):
        for ax, (metric, label) in zip(column, PANELS.items(), strict=False):
            draw_layers(ax, rows, name, metric, label)
        draw_errors(column[3], rows, name)
        column[3].set_xscale("log", base=2)
        column[3].set_xticks(sorted(set(rows[name])), [f"{x:g}" for x in sorted(set(rows[name]))])
        column[3].minorticks_off()
        column[3].set_xlabel({"rate": "learning rate"}.get(name, name))
    for ax in axes[:, 1]:
        ax.set_ylabel("")
    axes[0, 0].set_title(f"SGD, learning rate {RATE:g}")
    axes[0, 1].set_title(f"SGD, batch size {BATCH_SIZE}")
    return drawn


def main() -> None:
    parser = arguments(__doc__, "mlp_sweeps")
    parser.add_argument("--epochs", type=int, default=10, help="of each network (10)")
    args: argparse.Namespace = parser.parse_args()
    data, seeds = read(args), range(args.seed, args.seed + args.seeds)
    sweeps = {
        name: pd.DataFrame(
            [run(data, *settings, args.epochs, seed) for settings in points for seed in seeds]
        )
        for name, points in SWEEPS.items()
    }
    means = {name: rows.groupby(name).mean() for name, rows in sweeps.items()}
    said = " ".join(f"By {name}: {finding(found, name)}" for name, found in means.items())
    tables = [found.reset_index().assign(sweep=name) for name, found in means.items()]
    table = pd.concat(tables).drop(columns=["D_fc1", "D_fc2"])
    table.insert(0, "sweep", table.pop("sweep"))
    sentence = f"{args.dataset}, {args.epochs} epochs, means of {count(args.seeds)}. {said}"
    save(args.out, figure(sweeps), table, sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
