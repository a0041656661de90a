"""LoRA: what do rank and learning rate do to the validation loss and to alpha of the update B·A?

    python examples/lora.py --data-dir FOLDER       # with tinyshakespeare.txt; or without

The base model of `finetuning.py` is fine-tuned on Python's source text through low-rank adapters of
peft, on all 24 matrices of its blocks. WeightWatcher measures the updates as layers of their own and
calls those with alpha below 2 over-trained. An update of rank r has r eigenvalues: fewer than 8 have no
alpha, and what alpha random factors of the same rank have is measured too.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from corpus import source
from matplotlib.figure import Figure
from outcome import save
from peft import LoraConfig, get_peft_model
from tiny_gpt import LAYERS, WIDTH, TinyGPT, arguments, pretrained, train, validation_loss
from torch import Tensor

from ww_train import Report, measure

RANKS = (2, 8, 32)
RATES = (1e-3, 1e-2)
TARGETS = ["q", "k", "v", "o", "up", "down"]


def adapt(
    base: TinyGPT, text: Tensor, rank: int, lr: float, args: argparse.Namespace
) -> tuple[float, Report, Report]:
    """Train an adapter; validation loss, its updates, and the layers with the updates added."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*config.*")  # the model is no Hugging Face one
        model = get_peft_model(copy.deepcopy(base), config)
        train(
            model,
            text,
            steps=args.steps,
            lr=lr,
            seed=args.seed,
            title=f"LoRA rank {rank}, rate {lr:g}",
        )
        updates = measure(model, layers="*.lora")
        loss = validation_loss(model, text, windows=args.windows)
        return loss, updates, measure(model.merge_and_unload(), layers=LAYERS)


def random_update(rank: int, seed: int) -> Tensor:
    """A product of two factors of independent normal entries."""
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(2, WIDTH, rank, generator=generator, dtype=torch.float64)
    return b @ a.mT


def row(rank: int, update: str, loss: float, updates: Report, merged: float) -> dict[str, object]:
    """One line of the table."""
    found = alphas(updates)
    return {
        "rank": rank,
        "update": update,
        "loss": loss,
        "updates": len(updates),
        "alpha_BA": float(np.median(found)) if found else np.nan,
        "below_2": sum(alpha < 2.0 for alpha in found),
        "norm_BA": float(np.mean([u.spectrum.norm**0.5 for u in updates])) if found else np.nan,
        "alpha_merged": merged,
    }


def alphas(report: Report) -> list[float]:
    return [layer.alpha for layer in report if layer.alpha is not None]


def draw(table: pd.DataFrame, updates: dict[str, Report], base: float) -> Figure:
    """Loss against rank, and the alphas of the updates."""
    figure = Figure(figsize=(11.0, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    for update, rows in table.dropna(subset="loss").groupby("update"):
        left.plot(rows["rank"], rows.loss, "o-", label=update)
    left.set_xscale("log", base=2)
    left.set_xticks(RANKS, map(str, RANKS))
    left.set(xlabel="rank", ylabel="validation loss", title=f"on the new text; before: {base:.2f}")
    left.legend(frameon=False)
    shown = {name: found for name, report in updates.items() if (found := alphas(report))}
    for i, found in enumerate(shown.values()):
        right.plot(i + np.linspace(-0.2, 0.2, len(found)), found, "o", markersize=4, alpha=0.7)
    right.axhline(2.0, color="C2", linestyle="--", linewidth=1.0)
    right.set_xticks(range(len(shown)), list(shown))
    right.set(ylabel="alpha", title="alpha of B·A, a dot a layer")
    return figure


def main() -> None:
    args = arguments(__doc__, steps=150).parse_args()
    base, (old, _) = pretrained(args)
    name, text = source()
    start, rows, measured = validation_loss(base, text, windows=args.windows), [], {}
    for rank in RANKS:
        for lr in RATES:
            loss, updates, merged = adapt(base, text, rank, lr, args)
            rows.append(row(rank, f"rate {lr:g}", loss, updates, float(np.median(alphas(merged)))))
            measured[f"rank {rank}\nrate {lr:g}"] = updates
        if not updates.layers:
            print(f"rank {rank}: no alpha ({updates.skipped[0].reason})")
        else:
            noise = measure({str(i): random_update(rank, i) for i in range(len(updates))})
            rows.append(row(rank, "random", np.nan, noise, np.nan))
            measured[f"rank {rank}\nrandom"] = noise
    table = pd.DataFrame(rows)
    best, worst = table.loc[table.loss.idxmin()], table.loc[table.loss.idxmax()]
    below = [
        f"{update}: {part.below_2.sum()} of {part.updates.sum()}"
        for update, part in table.groupby("update")
    ]
    sentence = (
        f"The loss on {name} of the model trained on {old} fell from {start:.3f} to "
        f"{best.loss:.3f} at best (rank {best['rank']}, {best['update']}) and {worst.loss:.3f} at "
        f"worst (rank {worst['rank']}, {worst['update']}). Updates with an alpha below 2: "
        f"{', '.join(below)}."
    )
    figure = draw(table, measured, start)
    save(args.out or Path("runs/lora"), figure, table, sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
