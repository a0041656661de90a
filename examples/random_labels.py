"""Can one see from the weights alone, without test data, that a network memorises wrong labels?

    python examples/random_labels.py                                   # embedded digits
    python examples/random_labels.py --dataset mnist --data-dir FOLDER --samples 2000

A share of the training labels, from none to all, is drawn at random before training, as by Zhang et al.
(ICLR 2017). Networks memorise them all the same. By WeightWatcher's theory there is less to learn that
is correlated: the tails should be less heavy, so that alpha is larger, and there may be traps.
"""

from __future__ import annotations

import itertools

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
METRICS = {"alpha": "alpha", "ERG_gap": "ERG gap", "traps": "traps"}


def run(data: Data, share: float, epochs: int, batch_size: int, seed: int) -> dict[str, float]:
    """Train on the labels of which this share is random; errors in the labels trained on."""
    noisy = data.with_noise(share, seed)
    model = mlp(data, (256, 256), seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    how = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    for _ in train(model, [optimizer], noisy, **how, title=f"noise {share:.0%}, seed {seed}"):
        pass
    return {"noise": 100.0 * share, **state(model, noisy)}


def finding(rows: pd.DataFrame) -> str:
    """How the spectra follow the noise, and how well a single network's give it away."""
    means = rows.groupby("noise").mean()
    said = []
    for metric, layer in itertools.product(METRICS, HIDDEN):
        values = means[f"{metric}_{layer}"]
        shown = ", ".join(f"{value:.2f}" for value in values)
        tied = rank_correlation(rows[values.name], rows.noise)
        said.append(f"{METRICS[metric]} of {layer}: {shown} ({tied})")
    errors = means.test_error
    return (
        f"From no to only random labels the test error goes from {errors.iloc[0]:.1f} to "
        f"{errors.iloc[-1]:.1f} %, with a training error of at most {means.train_error.max():.1f} %. "
        f"Means at {', '.join(f'{noise:g}' for noise in means.index)} % random labels: "
        f"{'; '.join(said)}. The rank correlations are with the noise, over {len(rows)} networks."
    )


def figure(rows: pd.DataFrame) -> Figure:
    """The metrics and the errors by noise."""
    drawn = Figure(figsize=(9.0, 7.0), dpi=110, layout="constrained")
    axes = drawn.subplots(2, 2).flat
    for ax, (metric, label) in zip(axes, METRICS.items(), strict=False):
        draw_layers(ax, rows, "noise", metric, label)
        ax.set_xlabel("random labels, %")
    draw_errors(axes[3], rows, "noise")
    axes[3].set_xlabel("random labels, %")
    return drawn


def main() -> None:
    parser = arguments(__doc__, "random_labels")
    parser.add_argument("--epochs", type=int, default=60, help="of each network (60)")
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
