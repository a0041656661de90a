"""WW_PGD's Muon notebook: does WWPGD help Muon on an MLP with three layers?

    python examples/wwpgd_muon_mlp3.py                                 # embedded digits
    python examples/wwpgd_muon_mlp3.py --dataset mnist --data-dir FOLDER --epochs 8

Muon takes the matrices of the two hidden layers and AdamW the head and the biases; only Muon is wrapped
in WWPGD, because only its layers are projected. Muon makes all directions of a step equally large: it
leaves flatter spectra, farther from alpha 2, so that there is more to steer. The stored outputs of the
notebook (FashionMNIST, 3 runs) show no clear gain: 89.65 % with Muon, 89.33 and 89.87 % with WW_PGD.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from images import NAMES, load
from matplotlib.figure import Figure
from outcome import save
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from ww_train import WWPGD
from ww_train.callbacks.monitor import SpectralMonitor

OPTIMIZERS = ("AdamW", "WWPGD(AdamW)", "Muon", "WWPGD(Muon)")
HIDDEN = ["0", "2"]

MUON_RATE = 3e-3
"""Of 1, 3, 10 and 30 thousandths the best for Muon alone, on the digits with seed 0."""


def optimizers(name: str, model: nn.Sequential) -> list[Optimizer]:
    """For the hidden matrices, and for the rest."""
    matrices = [model[0].weight, model[2].weight]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    first: Optimizer
    if "Muon" in name:
        first = torch.optim.Muon(matrices, lr=MUON_RATE, adjust_lr_fn="match_rms_adamw")
    else:
        first = AdamW(matrices, lr=1e-3)
    return [WWPGD(first, model=model) if "WWPGD" in name else first, AdamW(rest, lr=1e-3)]


def train(name: str, data: list[list[Tensor]], args: argparse.Namespace, seed: int) -> list[dict]:
    """Train once; a record an epoch."""
    (x, y), (test_x, test_y) = data
    torch.manual_seed(seed)
    layers = [nn.Linear(x.shape[1], 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(100, 10)).to(args.device)
    both = optimizers(name, model)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, args.epochs) for each in both]
    monitor = SpectralMonitor(model, both, layers=HIDDEN, budget=None, summary=False)
    records = []
    for epoch in range(1, args.epochs + 1):
        for batch in torch.randperm(len(x)).to(x.device).split(128):
            model.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            for each in both:
                each.step()
        for schedule in schedules:
            schedule.step()
        seen = monitor.epoch_end()  # projects with every WWPGD that is among the optimizers
        with torch.no_grad():
            wrong = 100.0 * float((model(test_x).argmax(1) != test_y).float().mean())
        alphas = {f"alpha_{layer}": seen.get(f"ww_alpha/{layer}") for layer in HIDDEN}
        records.append({"optimizer": name, "seed": seed, "epoch": epoch, "error": wrong, **alphas})
    return records


def draw(runs: pd.DataFrame) -> Figure:
    """Alpha of both hidden layers and test error by epoch, means over the seeds."""
    figure = Figure(figsize=(13.0, 4.0), dpi=100, layout="constrained")
    mean = runs.groupby(["optimizer", "epoch"]).mean().reset_index()
    titles = ["alpha of the first layer", "alpha of the second layer", "test error, %"]
    columns = ["alpha_0", "alpha_2", "error"]
    for ax, column, title in zip(figure.subplots(1, 3), columns, titles, strict=True):
        for name in OPTIMIZERS:
            run, style = mean[mean.optimizer == name], "-" if "WWPGD" in name else "--"
            color = "C1" if "Muon" in name else "C0"
            ax.plot(run.epoch, run[column], style, color=color, label=name)
        ax.set(xlabel="epoch", title=title)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
    ax.legend(frameon=False)
    return figure


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dataset", choices=NAMES, default="digits")
    parser.add_argument("--data-dir", help="folder with the IDX files of (fashion-)mnist")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--out", type=Path, default=Path("runs/wwpgd_muon_mlp3"))
    args = parser.parse_args()
    if not hasattr(torch.optim, "Muon"):
        print(f"skipped: torch {torch.__version__} has no torch.optim.Muon (2.9 has)")
        return
    data = [part.tensors for part in load(args.dataset, args.data_dir)]
    data = [[t.to(args.device) for t in tensors] for tensors in data]
    seeds = range(args.seed, args.seed + args.seeds)
    jobs = tqdm([(name, seed) for name in OPTIMIZERS for seed in seeds], unit="training")
    runs = pd.DataFrame([record for name, seed in jobs for record in train(name, data, args, seed)])
    last = runs[runs.epoch == args.epochs].drop(columns=["epoch", "seed"])
    table = last.groupby("optimizer").agg(["mean", "std"]).loc[list(OPTIMIZERS)]
    table.columns = ["_".join(names) for names in table.columns]
    said = "; ".join(
        f"{name} {row.error_mean:.2f} % (alphas {row.alpha_0_mean:.2f}, {row.alpha_2_mean:.2f})"
        for name, row in table.iterrows()
    )
    sentence = f"Test error on {args.dataset}, mean of {args.seeds} seeds: {said}."
    save(args.out, draw(runs), table.reset_index(), sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
