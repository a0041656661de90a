"""LoRA: what do rank and learning rate do to the validation loss and to alpha of the update B·A?

    python examples/lora.py --data-dir FOLDER       # with tinyshakespeare.txt; or without

The base model of `finetuning.py` is fine-tuned on Python's source text through low-rank adapters of
peft, on all 24 matrices of its blocks. WeightWatcher measures the updates as layers of their own and
calls those with alpha below 2 overfitted. An update of rank r has r eigenvalues: with fewer than 8
there is no alpha, and with fewer than 50 it is uncertain.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from corpus import source
from matplotlib.figure import Figure
from outcome import save
from peft import LoraConfig, get_peft_model
from tiny_gpt import LAYERS, TinyGPT, arguments, pretrained, train, validation_loss
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


def row(rank: int, lr: float, loss: float, updates: Report, merged: Report) -> dict[str, float]:
    """One line of the table."""
    alphas, tails = alphas_of(updates), [u.fit.num_pl_spikes for u in updates if u.fit]
    sizes = [layer.spectrum.norm**0.5 for layer in updates]
    return {
        "rank": rank,
        "rate": lr,
        "loss": loss,
        "updates_with_alpha": len(alphas),
        "alpha_BA": float(np.median(alphas)) if alphas else np.nan,
        "below_2": sum(alpha < 2.0 for alpha in alphas),
        "tail": float(np.median(tails)) if tails else np.nan,
        "norm_BA": float(np.mean(sizes)) if sizes else np.nan,
        "alpha_merged": float(np.median(alphas_of(merged))),
    }


def alphas_of(report: Report) -> list[float]:
    return [layer.alpha for layer in report if layer.alpha is not None]


def said(run: pd.Series) -> str:
    """A run in words."""
    alpha = "no alpha" if np.isnan(run.alpha_BA) else f"median alpha of B·A {run.alpha_BA:.2f}"
    return f"rank {run['rank']:g}, rate {run.rate:g}, {alpha}"


def draw(table: pd.DataFrame, alphas: dict[str, list[float]], base: float) -> Figure:
    """Loss against rank, and the alphas of the updates."""
    figure = Figure(figsize=(10.0, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for rate, rows in table.groupby("rate"):
        left.plot(rows["rank"], rows.loss, "o-", label=f"learning rate {rate:g}")
    left.axhline(base, color="0.5", linestyle="--", label="base model")
    left.set_xscale("log", base=2)
    left.set_xticks(RANKS, map(str, RANKS))
    left.set(xlabel="rank", ylabel="validation loss on the new text", title="loss after LoRA")
    left.legend(frameon=False)
    for i, values in enumerate(alphas.values()):
        spread = i + np.linspace(-0.2, 0.2, len(values))
        right.plot(spread, values, "o", markersize=4, alpha=0.7)
    right.axhline(2.0, color="C2", linestyle="--", linewidth=1.0)
    right.set_xticks(range(len(alphas)), list(alphas))
    right.set(xlabel="rank, learning rate", ylabel="alpha", title="alpha of B·A, a dot a layer")
    return figure


def main() -> None:
    args = arguments(__doc__, steps=200).parse_args()
    base, (old, _) = pretrained(args)
    name, text = source()
    rows, alphas = [], {}
    for rank in RANKS:
        for lr in RATES:
            loss, updates, merged = adapt(base, text, rank, lr, args)
            rows.append(row(rank, lr, loss, updates, merged))
            if found := alphas_of(updates):
                alphas[f"{rank}, {lr:g}"] = found
            else:
                print(f"rank {rank}: no alpha ({updates.skipped[0].reason})")
    table, start = pd.DataFrame(rows), validation_loss(base, text, windows=args.windows)
    best, worst = table.loc[table.loss.idxmin()], table.loc[table.loss.idxmax()]
    sentence = (
        f"The loss on {name} of the model trained on {old} fell from {start:.3f} to "
        f"{best.loss:.3f} at best ({said(best)}) and "
        f"{worst.loss:.3f} at worst ({said(worst)}). {int(table.below_2.sum())} of "
        f"{int(table.updates_with_alpha.sum())} updates with an alpha are below 2, in "
        f"{(table.below_2 > 0).sum()} of the {len(table)} runs."
    )
    out = args.out or Path("runs/lora")
    save(out, draw(table, alphas, start), table, sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
