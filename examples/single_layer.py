"""What does training do to the spectrum of one layer?

    python examples/single_layer.py                                    # embedded digits
    python examples/single_layer.py --dataset mnist --data-dir FOLDER

A layer is measured before and after training: the eigenvalues of WᵀW, the power law of their tail and
its exponent alpha, the ERG (trace-log) condition, and correlation traps, for which the entries are
shuffled. Martin and Mahoney (JMLR 2021): random weights have a bulk without a tail, trained ones a
heavy tail with alpha between 2 and 6.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from images import NAMES, load
from matplotlib.figure import Figure
from outcome import save
from torch import Tensor, nn
from tqdm import trange

from ww_train import LayerReport, measure, plots

PLOTS = (plots.esd, plots.detX, plots.randomized_esd)


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """AdamW, batches of 32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in trange(epochs, desc="training", unit="epoch"):
        for batch in torch.randperm(len(x)).to(x.device).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def row(name: str, layer: LayerReport, error: float) -> dict[str, object]:
    """One line of the table; test error in percent."""
    fit, missing = layer.fit, float("nan")
    return {
        "layer": name,
        "alpha": fit.alpha if fit else missing,
        "D": fit.D if fit else missing,
        "tail_size": fit.num_pl_spikes if fit else 0,
        "ERG_tail": layer.erg.detX_num,
        "ERG_gap": layer.ERG_gap,
        "traps": layer.num_traps,
        "rand_distance": layer.rand_distance,
        "verdict": layer.verdict,
        "test_error": error,
    }


def draw(layers: dict[str, LayerReport]) -> Figure:
    """A row of figures a state: spectrum with fit, ERG condition, shuffled spectrum."""
    figure = Figure(figsize=(16.0, 8.5), dpi=85, layout="constrained")
    for part, (name, layer) in zip(figure.subfigures(2, 1), layers.items(), strict=True):
        part.suptitle(name, fontsize=14)
        for ax, plot in zip(part.subplots(1, 3), PLOTS, strict=True):
            plot(layer, ax=ax)
    return figure


def finding(before: pd.Series, after: pd.Series) -> str:
    """What the two rows say, in words."""
    farther = "farther from" if after.rand_distance > before.rand_distance else "nearer to"
    return (
        f"Training took the layer from alpha {before.alpha:.2f} (verdict {before.verdict}, "
        f"{before.tail_size} eigenvalues in the tail) to {after.alpha:.2f} ({after.verdict}, "
        f"{after.tail_size}), its ERG gap from {before.ERG_gap} to {after.ERG_gap} and its traps from "
        f"{before.traps} to {after.traps}. Its spectrum moved {farther} that of the shuffled weights: "
        f"rand_distance {before.rand_distance:.3f} to {after.rand_distance:.3f}. One seed."
    )


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dataset", choices=NAMES, default="digits")
    parser.add_argument("--data-dir", help="folder with the IDX files of (fashion-)mnist")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--width", type=int, default=256, help="outputs of the layer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/single_layer"))
    args = parser.parse_args()
    data = [part.tensors for part in load(args.dataset, args.data_dir)]
    (x, y), (test_x, test_y) = ([t.to(args.device) for t in tensors] for tensors in data)
    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(x.shape[1], args.width), nn.ReLU(), nn.Linear(args.width, 10))
    model = model.to(args.device)

    found, rows = {}, []
    for name in ("untrained", "trained"):
        if name == "trained":
            train(model, x, y, args.epochs)
        (found[name],) = measure(model, layers="0", randomize=True)
        wrong = (model(test_x).argmax(1) != test_y).cpu().numpy()
        rows.append(row(name, found[name], 100.0 * float(np.mean(wrong))))
    table = pd.DataFrame(rows)
    sentence = finding(table.iloc[0], table.iloc[1])
    save(args.out, draw(found), table, sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
