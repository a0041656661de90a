"""Does alpha of the inverse spectrum tell where double descent has its minimum and its peak?

    python examples/double_descent_1989.py

The experiment of Vallet, Cailton and Refregier (Europhysics Letters 9, 1989): linear regression by the
pseudo-inverse on P corners of the N-cube, labelled by the majority of their signs. Its solution
applies the inverse of the data's spectrum, of which alpha and the ERG gap are measured at each load
P/N. To be checked: alpha is 2 near the minimum of the test error and 1.5 in the over-parametrised
limit. For N to infinity the inverse of the Marchenko-Pastur law is a power law only
at load 1, with alpha 1.5: at any other load its largest eigenvalue is bounded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from outcome import save
from torch import Tensor
from tqdm import tqdm

from ww_train import measure

LOADS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0]
LOADS += [1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0]
PANELS = {"test_error": "test error", "alpha": "alpha of the inverse", "ERG_gap": "ERG gap"}


def sample(number: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Corners of the cube as rows and their majorities; half pluses and half minuses counts as plus."""
    x = 2.0 * torch.randint(2, (number, n), generator=generator, dtype=torch.float64) - 1.0
    return x, 2.0 * (x.sum(1) >= 0.0).double() - 1.0


def experiment(load: float, n: int, seed: int, device: str) -> dict[str, float]:
    """One draw of training and test data."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (t.to(device) for t in sample(round(load * n), n, generator))
    test_x, test_y = (t.to(device) for t in sample(2000, n, generator))
    weights = torch.linalg.pinv(x) @ y
    row = {"load": load, "test_error": float(((test_x @ weights) * test_y <= 0.0).double().mean())}
    for layer in measure(x, inverse=True):  # one layer, or none if it has too few eigenvalues
        row["ERG_gap"] = np.nan if layer.ERG_gap is None else layer.ERG_gap
        if layer.fit:
            row |= {"alpha": layer.fit.alpha, "D": layer.fit.D, "tail": layer.fit.num_pl_spikes}
    return row


def finding(table: pd.DataFrame) -> str:
    """What the curves say, in words."""
    below, above = table[table.load < 1.0], table[table.load > 1.0]
    peak, dip = table.loc[table.test_error.idxmax()], below.loc[below.test_error.idxmin()]
    lowest, first, last = table.loc[table.alpha.idxmin()], below.iloc[0], above.iloc[-1]
    near = [part.loc[(part.alpha - 2.0).abs().idxmin()] for part in (below, above)]
    sides = table[table.ERG_gap != 0.0]
    turns = np.flatnonzero(np.diff(np.sign(sides.ERG_gap)))
    signs = [f"{sides.load.iloc[i]:g} and {sides.load.iloc[i + 1]:g}" for i in turns]
    return (
        f"The test error peaks at load {peak.load:g} ({peak.test_error:.3f}), where alpha is "
        f"{peak.alpha:.2f}; alpha is lowest at load {lowest.load:g} ({lowest.alpha:.2f}). Below load 1 "
        f"the error has its minimum at load {dip.load:g} ({dip.test_error:.3f}), where alpha is "
        f"{dip.alpha:.2f}; above, it is least at the largest load {last.load:g} "
        f"({last.test_error:.3f}), where alpha is {last.alpha:.2f}. Alpha comes nearest to 2 at loads "
        f"{near[0].load:g} ({near[0].alpha:.2f}) and {near[1].load:g} ({near[1].alpha:.2f}), where "
        f"the error is {near[0].test_error:.3f} and {near[1].test_error:.3f}; the ERG gap "
        f"changes its sign between loads {', '.join(signs) or '(nowhere)'}. At the smallest load "
        f"{first.load:g}, the most over-parametrised, alpha is {first.alpha:.2f}."
    )


def draw(rows: pd.DataFrame) -> Figure:
    """Medians and quartiles over the repeats against the load; the minimum below load 1 dotted."""
    dip = rows[rows.load < 1.0].groupby("load").test_error.mean().idxmin()
    figure = Figure(figsize=(7.0, 8.0), dpi=110, layout="constrained")
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    for ax, (column, name) in zip(axes, PANELS.items(), strict=True):
        q1, median, q3 = (rows.groupby("load")[column].quantile(q) for q in (0.25, 0.5, 0.75))
        ax.fill_between(median.index, q1, q3, color="C0", alpha=0.25, label="middle half")
        ax.plot(median.index, median, "C0.-", label="median of the repeats")
        ax.axvline(1.0, color="0.5", linewidth=0.8)
        ax.axvline(dip, color="0.5", linewidth=0.8, linestyle=":")
        ax.set_ylabel(name)
    for alpha, color in ((2.0, "C2"), (1.5, "C3")):
        axes[1].axhline(alpha, color=color, linestyle="--", linewidth=1.0, label=f"alpha {alpha}")
    axes[1].legend(frameon=False)
    axes[2].axhline(0.0, color="C2", linestyle="--", linewidth=1.0)
    axes[2].set_xlabel("load P/N")
    axes[0].set_title("pseudo-inverse regression of the majority: test error and inverse spectrum")
    return figure


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--repeats", type=int, default=100, help="draws of the data at each load")
    parser.add_argument("--n", type=int, default=100, help="inputs N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/double_descent_1989"))
    args = parser.parse_args()
    jobs = [(load, args.seed + i) for load in LOADS for i in range(args.repeats)]
    bar = tqdm(jobs, unit="regression")
    rows = pd.DataFrame([experiment(load, args.n, seed, args.device) for load, seed in bar])
    table = rows.groupby("load", as_index=False).median()
    table["test_error"] = rows.groupby("load").test_error.mean().to_numpy()
    save(args.out, draw(rows), table, finding(table), seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
