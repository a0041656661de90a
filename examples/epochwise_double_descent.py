"""Does the test error of a wide network fall, rise and fall again, and what does alpha do meanwhile?

    python examples/epochwise_double_descent.py                        # embedded digits
    python examples/epochwise_double_descent.py --dataset mnist --data-dir FOLDER --samples 4000

A fifth of the training labels is random. Nakkiran et al. (ICLR 2020) saw the test error of large
networks fall, rise while they begin to fit the wrong labels, and fall again. WeightWatcher's reading:
alpha falls as a layer learns, and traps, or an alpha below 2, come with over-fitting.
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
    plain,
    read,
    state,
    train,
)


def run(data: Data, widths: tuple[int, int], how: dict, noise: float) -> list[dict[str, float]]:
    """Train one network; a row for each epoch at which it was measured."""
    seed, epochs = how["seed"], how["epochs"]
    noisy = data.with_noise(noise, seed)
    model = mlp(data, widths, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    return [
        {"epoch": epoch, "seed": seed, **state(model, noisy)}
        for epoch in train(model, [optimizer], noisy, **how, title=f"seed {seed}")
        if due(epoch, epochs)
    ]


def finding(means: pd.DataFrame) -> str:
    """Where the mean test error turns, and what the spectra are there."""
    errors, end = means.test_error, means.index[-1]
    dip = errors.idxmin()
    peak = errors.loc[dip:].idxmax()
    said = []
    for name in HIDDEN:
        alpha, traps = means[f"alpha_{name}"], means[f"traps_{name}"]
        shown = ", ".join(f"{alpha[epoch]:.2f}" for epoch in (dip, peak, end))
        below = f"from epoch {alpha.index[alpha < 2.0][0]}" if any(alpha < 2.0) else "never"
        said.append(
            f"alpha of {name} is {shown} (below 2: {below}), its traps {traps.max():.1f} at most"
        )
    again = (
        "a second descent" if errors[peak] - errors[end] >= 1.0 else "no second descent by a point"
    )
    return (
        f"The mean test error is least in epoch {dip} ({errors[dip]:.1f} %), {errors[peak]:.1f} % in "
        f"epoch {peak} and {errors[end]:.1f} % in epoch {end}: {again}. In these epochs "
        f"{'; '.join(said)}."
    )


def figure(rows: pd.DataFrame) -> Figure:
    """Errors, alpha and traps by epoch; dotted where the mean test error is least."""
    dip = rows.groupby("epoch").test_error.mean().idxmin()
    drawn = Figure(figsize=(7.0, 8.0), dpi=110, layout="constrained")
    axes = drawn.subplots(3, 1, sharex=True)
    draw_errors(axes[0], rows, "epoch")
    draw_layers(axes[1], rows, "epoch", "alpha", "alpha")
    draw_layers(axes[2], rows, "epoch", "traps", "traps")
    axes[0].set_title("training error: of the labels trained on, the wrong ones included")
    axes[2].set(xlabel="epoch", xscale="log")
    plain(axes[2].xaxis)
    for ax in axes:
        ax.axvline(dip, color="0.5", linewidth=0.8, linestyle=":")
    return drawn


def main() -> None:
    parser = arguments(__doc__, "epochwise_double_descent")
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--noise", type=float, default=0.2, help="share of random labels (0.2)")
    parser.add_argument("--width", type=int, default=256, help="of both hidden layers (256)")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    data, rows, widths = read(args), [], (args.width, args.width)
    for seed in range(args.seed, args.seed + args.seeds):
        how = {"epochs": args.epochs, "batch_size": args.batch_size, "seed": seed}
        rows += run(data, widths, how, args.noise)
    frame = pd.DataFrame(rows)
    table = frame.drop(columns="seed").groupby("epoch").mean()
    what = f"{args.dataset}, {100 * args.noise:g} % random labels, {count(args.seeds)}"
    shown = table.iloc[:: max(len(table) // 12, 1)].reset_index()
    save(
        args.out,
        figure(frame),
        shown,
        f"{what}. {finding(table)}",
        seed=args.seed,
        device=args.device,
    )


if __name__ == "__main__":
    main()
