"""What does steering a small transformer to alpha 2 cost or gain? AdamW against WWPGD(AdamW).

    python examples/wwpgd_tiny_transformer.py --data-dir FOLDER  # with tinyshakespeare.txt; or without

The same transformer is trained twice on the same windows of text. WWPGD projects the 24 matrices of
its blocks after every so many steps, ever more strongly over the first six times. By SETOL (Martin and
Hinrichs, 2025) layers at alpha 2 generalise best. The stored output of WW_PGD's notebook of this name
shows no gain: a validation loss of 1.562 with AdamW and of 1.613 with WW_PGD, in one run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from corpus import shakespeare, split
from matplotlib.figure import Figure
from outcome import save
from tiny_gpt import BATCH, CONTEXT, LAYERS, TinyGPT, loss, rate, validation_loss
from torch import Tensor, nn
from tqdm import trange

from ww_train import WWPGD
from ww_train.callbacks.monitor import SpectralMonitor

NAMES = ("AdamW", "WWPGD(AdamW)")
RATE = 2e-3


def train(name: str, text: Tensor, args: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train one model; its validation losses, and the alphas of its layers, by step."""
    torch.manual_seed(args.seed)
    model = TinyGPT().to(args.device)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.1
    )
    if name != "AdamW":
        # projects by itself after every so many steps; no end_epoch() is needed
        optimizer = WWPGD(optimizer, model=model, include=LAYERS, every_n_steps=args.every)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step / args.steps))
    monitor = SpectralMonitor(
        model, layers=LAYERS, randomize=False, every_n_steps=args.every, budget=None, summary=False
    )
    monitor.start()
    losses = [{"step": 0, "loss": validation_loss(model, text, windows=args.windows)}]
    known, _ = split(text)
    generator = torch.Generator().manual_seed(args.seed)
    for step in (bar := trange(1, args.steps + 1, desc=name, unit="step")):
        starts = torch.randint(len(known) - CONTEXT, (BATCH, 1), generator=generator)
        value = loss(model, known[starts + torch.arange(CONTEXT + 1)].to(args.device))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if monitor.step():  # not empty: the spectra were measured
            found = validation_loss(model, text, windows=args.windows)
            losses.append({"step": step, "loss": found})
            bar.set_postfix(validation=f"{found:.3f}")
    return pd.DataFrame(losses).set_index("step"), alphas(monitor.history)


def alphas(history: list[dict[str, float]]) -> pd.DataFrame:
    """A row a measurement, a column a layer."""
    frame = pd.DataFrame(history).set_index("step")
    return frame[[column for column in frame if column.startswith("ww_alpha/")]]


def row(name: str, losses: pd.DataFrame, found: pd.DataFrame) -> dict[str, object]:
    """One line of the table."""
    end = found.iloc[-1]
    return {
        "optimizer": name,
        "validation_loss": losses.loss.iloc[-1],
        "best": losses.loss.min(),
        "alpha_min": end.min(),
        "alpha_median": end.median(),
        "alpha_max": end.max(),
        "within_0.1_of_2": int(((end - 2.0).abs() < 0.1).sum()),
        "layers": len(end),
    }


def draw(runs: dict[str, tuple[pd.DataFrame, pd.DataFrame]]) -> Figure:
    """Validation loss, and the alpha of every layer."""
    figure = Figure(figsize=(11.0, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (name, (losses, found)) in zip(("C0", "C3"), runs.items(), strict=True):
        left.plot(losses.index, losses.loss, "o-", color=color, markersize=3, label=name)
        right.plot(found.index, found, color=color, linewidth=0.5, alpha=0.5)
        right.plot(found.index, found.median(axis=1), color=color, linewidth=2.5, label=name)
    right.axhline(2.0, color="C2", linestyle="--", linewidth=1.0)
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    left.set(xlabel="step", ylabel="validation loss", title="validation loss, nats a character")
    right.set(xlabel="step", ylabel="alpha", title="alpha of the layers (thin) and median (thick)")
    for ax in (left, right):
        ax.legend(frameon=False)
    return figure


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--steps", type=int, default=250, help="of each training (250)")
    parser.add_argument("--every", type=int, default=25, help="steps between projections (25)")
    parser.add_argument("--windows", type=int, default=128, help="of the validation loss (128)")
    parser.add_argument("--data-dir", help="folder with tinyshakespeare.txt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/wwpgd_tiny_transformer"))
    args = parser.parse_args()
    corpus, text = shakespeare(args.data_dir)
    runs = {name: train(name, text, args) for name in NAMES}
    table = pd.DataFrame([row(name, *run) for name, run in runs.items()])
    plain, steered = table.itertuples(index=False)
    better = "lower" if steered.validation_loss < plain.validation_loss else "higher"
    sentence = (
        f"On {corpus} the validation loss after {args.steps} steps is {plain.validation_loss:.3f} with "
        f"AdamW (alphas {plain.alpha_min:.1f} to {plain.alpha_max:.1f}, median "
        f"{plain.alpha_median:.1f}) and {steered.validation_loss:.3f}, {better}, with WWPGD, which "
        f"ends with {steered[-2]} of {steered.layers} layers within 0.1 of alpha 2. One seed."
    )
    save(args.out, draw(runs), table, sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
