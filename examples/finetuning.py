"""What does fine-tuning change in the spectra? The evaluation of a fine-tuned model, from start to end.

    python examples/finetuning.py --data-dir FOLDER     # with tinyshakespeare.txt; or without

A small transformer is trained on Shakespeare (or Python's reference manual) and fine-tuned on Python's
source text. Base, fine-tuned model and their difference are measured and drawn, and the means of the
metrics are written to metrics_summary.json. To be checked: fine-tuning moves alpha towards 2, and the
difference has a heavy tail of its own.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pandas as pd
from corpus import source
from matplotlib.figure import Figure
from outcome import save
from tiny_gpt import LAYERS, arguments, pretrained, train, validation_loss

from ww_train import plots
from ww_train.comparing.comparison import Comparison, compare
from ww_train.comparing.distances import distances


def draw(comparison: Comparison) -> Figure:
    """Alpha before and after, along the depth, and of the difference."""
    figure = Figure(figsize=(13.0, 9.5), dpi=90, layout="constrained")
    axes = figure.subplots(2, 2)
    plots.alpha_vs_alpha(comparison.base, comparison.finetuned, ax=axes[0, 0])
    panels = {
        "base model": (comparison.base, axes[0, 1]),
        "fine-tuned": (comparison.finetuned, axes[1, 0]),
        "difference": (comparison.delta, axes[1, 1]),
    }
    for name, (report, ax) in panels.items():
        plots.correlation_flow(report, ax=ax)
        ax.get_legend().remove()  # all layers are of one type
        ax.set_title(f"{name}: {ax.get_title(loc='left')}", loc="left", fontsize=9)
    return figure


def finding(frame: pd.DataFrame, losses: dict[str, tuple[float, ...]]) -> str:
    """What happened, in words."""
    changed = ", ".join(f"on {n} from {b:.3f} to {a:.3f}" for n, (b, a) in losses.items())
    nearer = (frame.alpha_finetuned - 2.0).abs() < (frame.alpha_base - 2.0).abs()
    rank = frame[["relative_delta", "alpha_change"]].corr("spearman").iloc[0, 1]
    return (
        f"Validation loss went {changed}. Alpha fell in {(frame.alpha_change < 0).sum()} of "
        f"{len(frame)} layers and came nearer to 2 in {nearer.sum()}; its median went from "
        f"{frame.alpha_base.median():.2f} to {frame.alpha_finetuned.median():.2f}, and "
        f"{(frame.alpha_finetuned < 2).sum()} layers lie below 2. The difference has a median alpha "
        f"of {frame.alpha_of_delta.median():.2f} ({(frame.alpha_of_delta < 2).sum()} layers below 2) "
        f"and a median size of {frame.relative_delta.median():.2f} of the weights. Rank correlation of "
        f"that size with the change of alpha: {rank:.2f}."
    )


def main() -> None:
    args = arguments(__doc__, steps=400).parse_args()
    out = args.out or Path("runs/finetuning")
    base, (name, text) = pretrained(args)
    new_name, new_text = source()
    tuned = copy.deepcopy(base)
    title = f"fine-tuning on {new_name}"
    train(tuned, new_text, steps=args.steps, lr=1e-3, seed=args.seed, title=title)

    comparison = compare(base, tuned, layers=LAYERS, randomize=True)
    out.mkdir(parents=True, exist_ok=True)
    comparison.write_metrics_summary(out / "metrics_summary.json")
    print(comparison)
    frame = comparison.to_dataframe()
    apart = distances(base, tuned, layers=LAYERS).to_dataframe()
    columns = ["longname", "relative_delta", "alpha_base", "alpha_finetuned", "alpha_of_delta"]
    frame = frame.merge(apart, left_on="longname", right_on="name")
    table = frame[[*columns, "cka", "left_overlap", "right_overlap"]]
    losses = {
        title: tuple(validation_loss(m, t, windows=args.windows) for m in (base, tuned))
        for title, t in ((name, text), (new_name, new_text))
    }
    save(out, draw(comparison), table, finding(frame, losses), seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
