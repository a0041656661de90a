"""Can one see from the weights alone, without test data, that a network memorises wrong labels?

    python examples/random_labels.py                                   # embedded digits
    python examples/random_labels.py --dataset mnist --data-dir FOLDER --samples 2000

A share of the training labels, from none to all, is drawn at random before training, as by Zhang et al.
(ICLR 2017). Martin and Mahoney (JMLR 2021) trained on such labels too and saw tails that are less
heavy: a larger alpha, in particular in the layer before the head. Traps are counted as well.
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
    mlp,
    rank_correlation,
    read,
    state,
    train,
)

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
READ = [f"{metric}_{name}" for metric in ("alpha", "traps") for name in HIDDEN]


def run(data: Data, share: float, epochs: int, batch_size: int, seed: int) -> dict[str, float]:
    """Train on the labels of which this share is random; errors in the labels trained on."""
    noisy = data.with_noise(share, seed)
    model = mlp(data, (256, 256), seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    how = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    for _ in train(model, [optimizer], noisy, **how, title=f"noise {share:.0%}, seed {seed}"):
        pass
    return {"noise": 100.0 * share, **state(model, noisy)}


def finding(rows: pd.DataFrame) -> str:
    """How the spectra follow the noise, and how well a single network's give it away."""
    means = rows.groupby("noise").mean()
    said = [
        f"{column.replace('_', ' of ')} {means[column].iloc[0]:.2f} to {means[column].iloc[-1]:.2f} "
        f"({rank_correlation(rows[column], rows.noise)})"
        for column in READ
    ]
    return (
        f"From no to only random labels the test error goes from {means.test_error.iloc[0]:.1f} to "
        f"{means.test_error.iloc[-1]:.1f} % at a training error of at most "
        f"{means.train_error.max():.1f} %; {'; '.join(said)}. The rank correlations are those with the noise "
        f"over all {len(rows)} networks."
    )


def figure(rows: pd.DataFrame) -> Figure:
    """Alpha, traps and errors by noise."""
    drawn = Figure(figsize=(11.0, 3.8), dpi=110, layout="constrained")
    axes = drawn.subplots(1, 3)
    draw_layers(axes[0], rows, "noise", "alpha", "alpha")
    draw_layers(axes[1], rows, "noise", "traps", "traps")
    draw_errors(axes[2], rows, "noise")
    for ax in axes:
        ax.set_xlabel("random labels, %")
    return drawn


def main() -> None:
    parser = arguments(__doc__, "random_labels")
    parser.add_argument("--epochs", type=int, default=100, help="of each network (100)")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    data, seeds = read(args), range(args.seed, args.seed + args.seeds)
    jobs = [(share, args.epochs, args.batch_size, seed) for share in SHARES for seed in seeds]
    rows = pd.DataFrame([run(data, *job) for job in jobs])
    table = rows.groupby("noise", as_index=False).mean()
    sentence = f"{args.dataset}, {args.epochs} epochs, {count(args.seeds)}. {finding(rows)}"
    save(args.out, figure(rows), table, sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
