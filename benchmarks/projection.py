"""Claim: one full projection puts a trained network on the manifold, as weightwatcher reads it.

An MLP is trained on MNIST with plain AdamW and projected once with strength 1, for alpha 2 and for
three other targets. weightwatcher then reads the target and an ERG gap of 0 in both hidden layers;
norms and storage are kept and a second projection changes nothing. A hard projection of a finished
network costs accuracy, which is printed too: during training the strength is ramped up instead
(benchmarks/training.py).

    pip install weightwatcher==0.7.7
    WW_TRAIN_DATA=FOLDER python benchmarks/projection.py
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from dataclasses import dataclass

from claims import skip, verdict
from mnist_mlp import HIDDEN, MLP, accuracy, add_data_argument, load_mnist, train_mlp
from peer import peer, peer_analyze
from torch import Tensor
from torch.optim import AdamW

from ww_train import WWPGD, ManifoldProjection, Projected

TARGETS = (2.0, 1.5, 3.0, 4.0)


@dataclass(frozen=True)
class Row:
    """One layer after its projection to one target; alpha, D and ERG_gap by weightwatcher."""

    target: float
    layer: str
    alpha: float
    D: float
    ERG_gap: int
    tail_size: int
    distance: float
    norm_change: float
    second_change: float
    in_place: bool


def project(model: MLP, alpha: float) -> dict[str, Projected]:
    """One epoch boundary at full strength, by a new optimizer that has no memory of another."""
    optimizer = WWPGD(
        AdamW(model.parameters()),
        model=model,
        strength=1.0,
        projection=ManifoldProjection(alpha),
        strict=True,
    )
    return {done.name: done for done in optimizer.end_epoch() if isinstance(done, Projected)}


def rows_of(trained: MLP, target: float) -> tuple[MLP, list[Row]]:
    """Project a copy of the network twice; the copy after the first time and what was found."""
    model = deepcopy(trained)
    weights = {name: model.get_submodule(name).weight for name in HIDDEN}
    addresses = {name: weight.data_ptr() for name, weight in weights.items()}
    done = project(model, target)
    read = peer_analyze(model, detX=True).set_index("longname")
    again = deepcopy(model)
    project(again, target)
    rows = []
    for name in HIDDEN:
        before = trained.get_submodule(name).weight.detach().double()
        once = weights[name].detach().double()
        twice = again.get_submodule(name).weight.detach().double()
        same_tensor = model.get_submodule(name).weight is weights[name]
        rows.append(
            Row(
                target=target,
                layer=name,
                alpha=float(read.alpha[name]),
                D=float(read.D[name]),
                ERG_gap=int(read.ERG_gap[name]),
                tail_size=done[name].tail_size,
                distance=done[name].distance,
                norm_change=float(abs(once.norm() / before.norm() - 1)),
                second_change=relative(twice - once, once),
                in_place=same_tensor and weights[name].data_ptr() == addresses[name],
            )
        )
    return model, rows


def relative(difference: Tensor, of: Tensor) -> float:
    return float(difference.norm() / of.norm())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_argument(parser)
    parser.add_argument("--epochs", type=int, default=4, help="of training (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of training (default 0)")
    args = parser.parse_args()
    try:
        peer()
        data = load_mnist(args.data_dir)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        skip(error)

    trained, _ = train_mlp(data, epochs=args.epochs, seed=args.seed)
    read = peer_analyze(trained, detX=True).set_index("longname")
    finished = accuracy(trained, data)
    print(f"MLP 784-512-512-10, MNIST, {args.epochs} epochs of AdamW, then one projection")
    print("alpha, D and ERG gap as weightwatcher reads them\n")
    print(
        f"{'target':>7} {'layer':6}{'alpha':>8}{'D':>7}{'ERG gap':>9}{'k':>5}{'distance':>10}"
        f"{'norm change':>13}{'2nd change':>12}{'in place':>10}{'accuracy':>10}"
    )
    for name in HIDDEN:
        print(
            f"{'none':>7} {name:6}{read.alpha[name]:8.4f}{read.D[name]:7.3f}"
            f"{read.ERG_gap[name]:9d}{'':50}{finished:10.2f}"
        )
    rows, accuracies = [], {}
    for target in TARGETS:
        model, found = rows_of(trained, target)
        accuracies[target] = accuracy(model, data)
        rows += found
        for row in found:
            print(
                f"{target:7.1f} {row.layer:6}{row.alpha:8.4f}{row.D:7.3f}{row.ERG_gap:9d}"
                f"{row.tail_size:5d}{row.distance:10.3f}{row.norm_change:13.1e}"
                f"{row.second_change:12.1e}{'yes' if row.in_place else 'no':>10}"
                f"{accuracies[target]:10.2f}"
            )

    print(
        f"\ntest accuracy {finished:.2f} % before and {accuracies[2.0]:.2f} % after the projection "
        "to alpha 2: projecting a finished network hard costs accuracy"
    )
    for target in TARGETS:
        mine = [row for row in rows if row.target == target]
        off = max(abs(row.alpha - target) for row in mine)
        verdict(f"alpha within {target:g} ± 0.01", off <= 0.01, f"off by {off:.1e}")
        gaps = [row.ERG_gap for row in mine]
        verdict(f"ERG gap 0 at alpha {target:g}", not any(gaps), str(gaps))
    norm = max(row.norm_change for row in rows)
    verdict("Frobenius norms kept to 1e-5", norm <= 1e-5, f"{norm:.1e}")
    second = max(row.second_change for row in rows)
    verdict("a second projection changes at most 1e-4", second <= 1e-4, f"{second:.1e}")
    verdict("in place", all(row.in_place for row in rows), "same parameter and data_ptr")


if __name__ == "__main__":
    main()
