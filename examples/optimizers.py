"""Which spectra do AdamW, SGD with momentum and Muon prefer, when all of them fit the training data?

    python examples/optimizers.py                                      # embedded digits
    python examples/optimizers.py --dataset mnist --data-dir FOLDER --samples 2000

Muon (`torch.optim.Muon`, PyTorch 2.9) makes the singular values of each update equal; as is usual it
trains the hidden matrices, and AdamW the biases and the head. So one expects flatter spectra of it: a
higher stable rank and entropy. Whether its alpha is larger is looked at here. No weight decay.
"""

from __future__ import annotations

import itertools

import pandas as pd
import torch
from matplotlib.figure import Figure
from outcome import save
from small_mlp import HIDDEN, Data, arguments, count, due, errors, mlp, plain, read, train
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from ww_train import Report, measure

COLORS = {"AdamW": "C0", "SGD": "C1", "Muon": "C2"}
COLUMNS = ["alpha", "D", "ERG_gap", "num_traps", "stable_rank", "entropy"]


def optimizers(name: str, model: nn.Sequential) -> list[Optimizer]:
    """One optimizer, or for Muon two."""
    if name == "AdamW":
        return [AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)]
    if name == "SGD":
        return [SGD(model.parameters(), lr=0.05, momentum=0.9)]
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit(f"torch.optim.Muon came with PyTorch 2.9; this is {torch.__version__}")
    hidden = [model.get_submodule(layer).weight for layer in HIDDEN]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]
    muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.0)
    return [muon, AdamW(rest, lr=1e-3, weight_decay=0.0)]


def run(data: Data, name: str, epochs: int, batch_size: int, seed: int) -> tuple[list, Report]:
    """Train one network; a row a layer for each epoch at which it was measured, and the last report."""
    model, rows = mlp(data, (256, 256), seed), []
    how = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    for epoch in train(model, optimizers(name, model), data, **how, title=f"{name}, seed {seed}"):
        if due(epoch, epochs):
            report = measure(model, layers=list(HIDDEN), randomize=True)
            common = {"optimizer": name, "seed": seed, "epoch": epoch, **errors(model, data)}
            for layer in report:
                known = layer.to_dict()
                rows.append({"layer": layer.name, **common, **{key: known[key] for key in COLUMNS}})
    return rows, report


def finding(ends: pd.DataFrame) -> str:
    """What distinguishes the optimizers, and whether the seeds agree on it."""
    said = []
    for layer, column in itertools.product(HIDDEN, ("alpha", "stable_rank", "entropy")):
        part = ends[ends.layer == layer].pivot(index="seed", columns="optimizer", values=column)
        means = part.mean().sort_values()
        same = int((part[means.index].diff(axis=1).iloc[:, 1:] > 0).all(axis=1).sum())
        said.append(f"{column} of {layer}: {listed(means)} (in this order with {count(same)})")
    means = ends.groupby("optimizer", sort=False)[["test_error", "num_traps"]].mean()
    return (
        f"Test error in percent: {listed(means.test_error)}, at a training error of at most "
        f"{ends.train_error.max():.2f}. {'; '.join(said)}; traps a layer: {listed(means.num_traps)}."
    )


def listed(values: pd.Series) -> str:
    """A value for each optimizer, in words."""
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def figure(rows: pd.DataFrame, reports: dict[str, Report]) -> Figure:
    """Alpha and stable rank by epoch, and the spectra at the end."""
    drawn = Figure(figsize=(11.0, 7.0), dpi=110, layout="constrained")
    axes = drawn.subplots(2, 3)
    for line, layer in zip(axes, HIDDEN, strict=True):
        for name, report in reports.items():
            part, color = rows[(rows.layer == layer) & (rows.optimizer == name)], COLORS[name]
            for ax, column in zip(line, ("alpha", "stable_rank"), strict=False):
                ax.plot(part.epoch, part[column], ".", color=color, markersize=4, alpha=0.5)
                ax.plot(part.groupby("epoch")[column].mean(), color=color, label=name)
                ax.set(xscale="log", xlabel="epoch", ylabel=f"{layer}: {column.replace('_', ' ')}")
                plain(ax.xaxis)
            evals = report[layer].spectrum.evals[::-1]
            line[2].plot(range(1, len(evals) + 1), evals / evals.mean(), color=color)
        line[0].axhline(2.0, color="0.5", linestyle="--", linewidth=1.0)
        line[0].set_yscale("log")
        plain(line[0].yaxis, minor=True)
        line[2].set(ylabel=f"{layer}: eigenvalue / mean", yscale="log", ylim=1e-3)
        line[2].set_xlabel("place of the eigenvalue, first seed")
    axes[0, 0].legend(frameon=False)
    return drawn


def main() -> None:
    parser = arguments(__doc__, "optimizers")
    parser.add_argument("--epochs", type=int, default=40, help="of each network (40)")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    data, rows, reports = read(args), [], {}
    for seed in range(args.seed, args.seed + args.seeds):
        for name in COLORS:
            found, report = run(data, name, args.epochs, args.batch_size, seed)
            rows += found
            reports.setdefault(name, report)
    frame = pd.DataFrame(rows)
    ends = frame[frame.epoch == args.epochs]
    table = ends.drop(columns=["seed", "epoch"]).groupby(["layer", "optimizer"], sort=False)
    sentence = f"{args.dataset}, {args.epochs} epochs, {count(args.seeds)}. {finding(ends)}"
    table = table.mean().reset_index()
    save(args.out, figure(frame, reports), table, sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
