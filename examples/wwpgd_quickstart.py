"""WW_PGD's QuickStart, a model that is one linear layer, in a version that does something.

    python examples/wwpgd_quickstart.py

The notebook trains nn.Linear(784, 10). WW_PGD 0.1.0 does not find a layer that is the model itself:
the weights are those of plain AdamW, bit for bit (benchmarks/ww_pgd.py, P1), and ten eigenvalues would
be too few for an alpha that means something. Here the one layer removes noise from digits, so that it
has 64, and it is trained twice from the same start. Do the weights change, does alpha become 2, and
what does it cost?
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from images import load
from matplotlib.figure import Figure
from outcome import save
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import trange

from ww_train import WWPGD, measure

NOISE = 1.0
NAMES = ("AdamW", "WWPGD(AdamW)")


def train(name: str, x: Tensor, test: Tensor, args: argparse.Namespace) -> tuple[nn.Linear, list]:
    """One layer that maps noisy images to clean ones; it, and a record an epoch."""
    torch.manual_seed(args.seed)  # the same start, batches and noise for both
    model = nn.Linear(64, 64).to(args.device)
    optimizer: Optimizer = AdamW(model.parameters(), lr=3e-3)
    if name != "AdamW":
        optimizer = WWPGD(optimizer, model=model)  # 1: wrap the optimizer
    records = []
    noisy = test + NOISE * torch.randn_like(test)
    for epoch in trange(args.epochs, desc=name, unit="epoch"):
        for batch in x[torch.randperm(len(x)).to(x.device)].split(64):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(batch + NOISE * torch.randn_like(batch)), batch)
            loss.backward()
            optimizer.step()
        if isinstance(optimizer, WWPGD):
            optimizer.end_epoch()  # 2: project
        (layer,) = measure(model)
        with torch.no_grad():
            error = float(nn.functional.mse_loss(model(noisy), test))
        found = {"alpha": layer.alpha, "ERG_gap": layer.ERG_gap, "trace_log": layer.trace_log}
        records.append({"optimizer": name, "epoch": epoch + 1, **found, "test_error": error})
    return model, records


def draw(runs: pd.DataFrame) -> Figure:
    """Alpha, ERG gap and test error by epoch."""
    figure = Figure(figsize=(13.0, 4.0), dpi=100, layout="constrained")
    titles = {"alpha": "alpha", "ERG_gap": "ERG gap", "test_error": "squared error a pixel, test"}
    for ax, (column, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for color, (name, run) in zip(("C0", "C3"), runs.groupby("optimizer"), strict=True):
            ax.plot(run.epoch, run[column], "o-", color=color, markersize=3, label=name)
        ax.set(xlabel="epoch", title=title)
        if column != "test_error":
            critical = 2.0 if column == "alpha" else 0.0
            ax.axhline(critical, color="C2", linestyle="--", linewidth=1.0, label="critical")
        ax.legend(frameon=False)
    return figure


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/wwpgd_quickstart"))
    args = parser.parse_args()
    x, test = (part.tensors[0].to(args.device) for part in load("digits"))
    models, records = zip(*(train(name, x, test, args) for name in NAMES), strict=True)
    runs = pd.DataFrame([record for run in records for record in run])
    plain, steered = (model.weight.detach() for model in models)
    apart = float((steered - plain).norm() / plain.norm())
    table = runs[runs.epoch == args.epochs]
    a, b = table.itertuples(index=False)
    sentence = (
        f"The weights with and without WWPGD are {100 * apart:.0f} % of their norm apart after "
        f"{args.epochs} epochs. Alpha is {a.alpha:.4f} with AdamW and {b.alpha:.4f} with WWPGD, the "
        f"ERG gap {a.ERG_gap} and {b.ERG_gap}, the squared error on test images {a.test_error:.4f} and "
        f"{b.test_error:.4f} ({100 * (b.test_error / a.test_error - 1):+.1f} %). One seed."
    )
    save(args.out, draw(runs), table, sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
