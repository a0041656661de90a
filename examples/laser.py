"""LASER: how many singular values does each layer of a transformer need?

    python examples/laser.py --data-dir FOLDER       # with tinyshakespeare.txt; or without

Each matrix of a small trained transformer is cut to its largest singular values, one matrix at a time,
and the validation loss is measured; then all of them at once by the rules of `svd_smoothing_`. Sharma,
Ash and Misra (LASER, 2023) found that large models answer better after the small singular values of
some layers are deleted, mostly of late perceptron layers.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from outcome import save
from tiny_gpt import LAYERS, TinyGPT, arguments, pretrained, validation_loss
from torch import Tensor
from tqdm import tqdm

from ww_train import measure
from ww_train.editing.rules import AboveBulk, DetXTail, PowerLawTail, Rule, Top
from ww_train.editing.smoothing import svd_smoothing_

SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
RULES: dict[str, Rule] = {
    "ERG tail": DetXTail(),
    "power-law tail": PowerLawTail(),
    "above the random bulk": AboveBulk(),
    "half of the values": Top(0.5),
}
KINDS = {"q": "C0", "k": "C1", "v": "C2", "o": "C3", "up": "C4", "down": "C5"}


def smoothed_loss(
    model: TinyGPT, text: Tensor, rule: Rule, layers: str, windows: int
) -> tuple[float, float, float]:
    """Validation loss after smoothing a copy, and the mean shares of rank and energy that stayed."""
    smaller = copy.deepcopy(model)
    done = svd_smoothing_(smaller, rule=rule, layers=layers)
    whole = [1.0] * len(done.skipped)  # what a rule has no answer for stays as it is
    rank = np.mean([layer.rank_after / layer.rank_before for layer in done.layers] + whole)
    energy = np.mean([layer.energy_kept for layer in done.layers] + whole)
    return validation_loss(smaller, text, windows=windows), float(rank), float(energy)


def by_layer(model: TinyGPT, text: Tensor, base: float, windows: int) -> pd.DataFrame:
    """Change of the loss for every layer and share kept, with the layer's alpha."""
    rows = []
    for layer in tqdm(measure(model, layers=LAYERS), unit="layer"):
        row = {"layer": layer.name, "alpha": layer.alpha}
        for share in SHARES:
            loss, _, _ = smoothed_loss(model, text, Top(share), layer.name, windows)
            row[f"keep {share:g}"] = loss - base
        rows.append(row)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, whole: pd.DataFrame, base: float) -> Figure:
    """Loss against the share kept, a curve a layer; and the loss after cutting all of them."""
    figure = Figure(figsize=(12.0, 4.6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for _, row in table.iterrows():
        kind = row.layer.rpartition(".")[2]
        losses = [row[f"keep {share:g}"] for share in SHARES]
        first = row.layer == f"blocks.0.{kind}"
        left.plot(SHARES, losses, ".-", color=KINDS[kind], label=kind if first else None)
    left.axhline(0.0, color="0.5", linewidth=0.8)
    left.set_yscale("symlog", linthresh=0.001)
    left.set_ylim(-0.002, 1.0)
    left.set(xlabel="share of the singular values kept, the largest", ylabel="change of the loss")
    left.set_title("one layer cut at a time")
    left.legend(frameon=False, ncols=3)
    right.plot(whole.loss, range(len(whole)), "o", markersize=9)
    right.axvline(base, color="0.3", linestyle="--", label="nothing cut")
    right.set_yticks(range(len(whole)), whole.label)
    right.set(xlabel="validation loss", title="all layers cut at once")
    right.set_ylim(-0.7, len(whole) - 0.3)
    right.legend(frameon=False, loc="lower right")
    return figure


def main() -> None:
    args = arguments(__doc__, windows=256).parse_args()
    model, (name, text) = pretrained(args)
    base = validation_loss(model, text, windows=args.windows)
    table = by_layer(model, text, base, args.windows)
    results = {n: smoothed_loss(model, text, r, LAYERS, args.windows) for n, r in RULES.items()}
    labels = [f"{n}\n{r:.0%} of rank, {e:.0%} of energy" for n, (_, r, e) in results.items()]
    whole = pd.DataFrame({"label": labels, "loss": [loss for loss, _, _ in results.values()]})
    changes = table.set_index("layer")[[f"keep {share:g}" for share in SHARES]]
    best, where = changes.min(axis=None), changes.stack().idxmin()
    safe = {c: int((changes[c] < 0.01).sum()) for c in changes}
    rank = table[["alpha", f"keep {SHARES[1]:g}"]].corr("spearman").iloc[0, 1]
    sentence = (
        f"The loss on {name} is {base:.3f}. The best single cut changes it by {best:+.4f} ({where[0]}, "
        f"{where[1]}). Layers whose cut costs less than 0.01: "
        + ", ".join(f"{count} of {len(changes)} at {c}" for c, count in safe.items())
        + f". Rank correlation of alpha with the cost at keep {SHARES[1]:g}: {rank:.2f}. All layers at "
        + "once: "
        + ", ".join(f"{rule} {loss:.3f} ({r:.0%})" for rule, (loss, r, _) in results.items())
        + " (share of the rank kept)."
    )
    out = args.out or Path("runs/laser")
    save(out, draw(table, whole, base), table, sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
