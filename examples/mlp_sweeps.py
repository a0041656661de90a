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


def finding(rows: pd.DataFrame, name: str) -> str:
    """What the means over the seeds show in one sweep."""
    means = rows.groupby(name).mean()
    first, last, best = means.index[0], means.index[-1], means.test_error.idxmin()
    alphas = means[[f"alpha_{layer}" for layer in HIDDEN]]
    said = [
        f"alpha of {layer} goes from {alpha[first]:.2f} at {first:g} to {alpha[last]:.2f} at {last:g} "
        f"({rank_correlation(alpha, means.index.to_series())})"
        for layer, (_, alpha) in zip(HIDDEN, alphas.items(), strict=True)
    ]
    over = means[(alphas < 2.0).any(axis=1)]
    below = ", ".join(f"at {x:g} (error {error:.1f} %)" for x, error in over.test_error.items())
    traps = means[[f"traps_{layer}" for layer in HIDDEN]].sum(axis=1)
    most = f"traps are at most {traps.max():.1f} a network, at {traps.idxmax():g}"
    lost = int(rows.alpha_fc1.isna().sum())
    diverged = f" {lost} of {len(rows)} networks diverged and have no spectra." if lost else ""
    at_best = " and ".join(f"{alpha:.2f}" for alpha in alphas.loc[best])
    return (
        f"By {name}: {', '.join(said)}; the test error is least at {best:g} "
        f"({means.test_error[best]:.1f} %, alphas {at_best}); "
        f"an alpha is below 2 {below or 'nowhere'}; {most}.{diverged}"
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
    parser.add_argument("--epochs", type=int, default=6, help="of each network (6)")
    args: argparse.Namespace = parser.parse_args()
    data, seeds = read(args), range(args.seed, args.seed + args.seeds)
    sweeps = {
        name: pd.DataFrame(
            [run(data, *settings, args.epochs, seed) for settings in points for seed in seeds]
        )
        for name, points in SWEEPS.items()
    }
    said = " ".join(finding(rows, name) for name, rows in sweeps.items())
    means = {name: rows.groupby(name, as_index=False).mean() for name, rows in sweeps.items()}
    table = pd.concat(means, names=["sweep"]).reset_index("sweep")
    sentence = f"{args.dataset}, {args.epochs} epochs, means of {count(args.seeds)}. {said}"
    save(args.out, figure(sweeps), table, sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
