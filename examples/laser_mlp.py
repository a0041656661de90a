"""Is the tail of the spectrum all that an MLP with alpha 2 needs?

    python examples/laser_mlp.py                                       # embedded digits
    python examples/laser_mlp.py --dataset mnist --data-dir FOLDER

An MLP is trained with AdamW and with WWPGD(AdamW), which steers both hidden layers to alpha 2 and
ERG gap 0. Then all singular values but those of the tail are deleted, or those of the tail only. SETOL
(Martin and Hinrichs, 2025) claims that at alpha 2 the tail, its effective correlation space,
generalises alone: the test error stays as it is.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from images import NAMES, load
from matplotlib.figure import Figure
from outcome import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import trange

from ww_train import WWPGD, measure
from ww_train.editing.rules import DetXTail, Kept, PowerLawTail, Rule, Top
from ww_train.editing.smoothing import svd_smoothing_
from ww_train.spectrum import Spectrum

HIDDEN = ["0", "2"]
TICKS = [1, 2, 5, 10, 20, 50, 100]


def without_tail(spectrum: Spectrum) -> Kept:
    """A rule of one's own: keep what `PowerLawTail` deletes."""
    return ~PowerLawTail()(spectrum)


RULES: dict[str, Rule | None] = {
    "whole": None,
    "ERG tail alone": DetXTail(),
    "power-law tail alone": PowerLawTail(),
    "largest fifth alone": Top(0.2),
    "without the power-law tail": without_tail,
}


def train(x: Tensor, y: Tensor, name: str, epochs: int, seed: int) -> nn.Module:
    """Two hidden layers; WWPGD, if that is the name, projects at the end of each epoch."""
    torch.manual_seed(seed)
    layers = [nn.Linear(x.shape[1], 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(100, 10)).to(x.device)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if name != "AdamW":
        optimizer = WWPGD(optimizer, model=model)
    for _ in trange(epochs, desc=f"{name}, seed {seed}", unit="epoch"):
        for batch in torch.randperm(len(x)).to(x.device).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        if isinstance(optimizer, WWPGD):
            optimizer.end_epoch()
    return model


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Test error in percent."""
    return 100.0 * float((model(x).argmax(1) != y).float().mean())


def rows(model: nn.Module, x: Tensor, y: Tensor, trained: dict) -> list[dict]:
    """Test error of the model and of what each rule leaves of it."""
    found, alphas = [], [layer.alpha or np.nan for layer in measure(model, layers=HIDDEN)]
    for name, rule in RULES.items():
        part, rank, energy = copy.deepcopy(model), 1.0, 1.0
        if rule:
            done = svd_smoothing_(part, rule=rule, layers=HIDDEN).layers
            rank = np.mean([layer.rank_after / layer.rank_before for layer in done])
            energy = np.mean([layer.energy_kept for layer in done])
        kept = {"rank_kept": rank, "energy_kept": energy}
        alpha = float(np.mean(alphas))
        found.append({**trained, "alpha": alpha, "kept": name, **kept, "error": error(part, x, y)})
    return found


def draw(runs: pd.DataFrame) -> Figure:
    """The test error of every run."""
    figure = Figure(figsize=(7.5, 4.2), dpi=110, layout="constrained")
    ax = figure.subplots()
    for offset, (name, group) in zip((-0.12, 0.12), runs.groupby("optimizer"), strict=True):
        where = [list(RULES).index(kept) + offset for kept in group.kept]
        ax.plot(where, group.error, "o", label=f"{name}, alpha {group.alpha.mean():.2f}", alpha=0.8)
    ax.set_xticks(range(len(RULES)), [name.replace(" ", "\n", 1) for name in RULES])
    ax.set_yscale("log")
    ax.set_ylim(1.0, 100.0)
    ax.set_yticks(TICKS, map(str, TICKS))
    ax.yaxis.set_minor_formatter("")
    ax.set(
        ylabel="test error, %", title="singular values kept in both hidden layers (a dot a seed)"
    )
    ax.legend(frameon=False)
    return figure


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dataset", choices=NAMES, default="digits")
    parser.add_argument("--data-dir", help="folder with the IDX files of (fashion-)mnist")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/laser_mlp"))
    args = parser.parse_args()
    data = [part.tensors for part in load(args.dataset, args.data_dir)]
    (x, y), test = ([t.to(args.device) for t in tensors] for tensors in data)
    found = []
    for seed in range(args.seed, args.seed + args.seeds):
        for name in ("AdamW", "WWPGD(AdamW)"):
            model = train(x, y, name, args.epochs, seed)
            found += rows(model, *test, {"optimizer": name, "seed": seed})
    runs = pd.DataFrame(found)
    table = runs.drop(columns="seed").groupby(["optimizer", "kept"], sort=False).mean()
    said = [
        f"{name} (alpha {group.alpha.mean():.2f}): "
        + ", ".join(f"{row.kept} {row.error:.2f} %" for row in group.itertuples())
        for name, group in table.reset_index().groupby("optimizer")
    ]
    sentence = f"Mean test error on {args.dataset} over {args.seeds} seeds. {'. '.join(said)}."
    save(args.out, draw(runs), table.reset_index(), sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
