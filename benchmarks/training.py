"""Claim: training with WWPGD's defaults ends at criticality, within 0.3 points of accuracy.

For each seed an MLP is trained twice on MNIST, with AdamW and with WWPGD(AdamW), otherwise alike:
the same initial weights, order of images, learning rates and clipping. weightwatcher then reads
alpha 2 and an ERG gap of 0 (or one off) in both hidden layers. The last projection alone would
guarantee that, so the accuracy just before it and the distance to the manifold before each one are
printed as well: whether the network learns near the manifold or is thrown onto it at the end. (The
learning rate decays to zero, so the very last distances are small in any case.)

    pip install weightwatcher==0.7.7
    WW_TRAIN_DATA=FOLDER python benchmarks/training.py
"""

from __future__ import annotations

import argparse
import statistics
import sys

from claims import skip, verdict
from mnist_mlp import HIDDEN, MLP, accuracy, add_data_argument, load_mnist, train_mlp
from peer import peer, peer_analyze
from tqdm.auto import tqdm


def read_hidden(model: MLP) -> tuple[list[float], list[int]]:
    """Alpha and ERG gap of the hidden layers, by weightwatcher."""
    read = peer_analyze(model, detX=True).set_index("longname").loc[list(HIDDEN)]
    return read.alpha.tolist(), read.ERG_gap.tolist()


def numbers(values: list[float], form: str) -> str:
    return " ".join(format(value, form) for value in values)


def mean_std(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_argument(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--epochs", type=int, default=12, help="default: 12")
    args = parser.parse_args()
    try:
        peer()
        data = load_mnist(args.data_dir)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        skip(error)

    print(f"MLP 784-512-512-10, MNIST, {args.epochs} epochs; layers {' '.join(HIDDEN)}\n")
    print(f"{'seed':>4}  {'run':12}{'alpha':>15}{'ERG gap':>10}{'accuracy':>10}{'before*':>10}")
    alphas, gaps = [], []
    accuracies: dict[bool, list[float]] = {False: [], True: []}
    with tqdm(total=2 * len(args.seeds), unit="run", file=sys.stderr, leave=False) as bar:
        for seed in args.seeds:
            for wwpgd in (False, True):
                model, boundaries = train_mlp(data, epochs=args.epochs, seed=seed, wwpgd=wwpgd)
                alpha, gap = read_hidden(model)
                accuracies[wwpgd].append(accuracy(model, data))
                line = (
                    f"{seed:4d}  {'WWPGD(AdamW)' if wwpgd else 'AdamW':12}"
                    f"{numbers(alpha, '.4f'):>15}{numbers(gap, 'd'):>10}{accuracies[wwpgd][-1]:10.2f}"
                )
                if wwpgd:
                    alphas += alpha
                    gaps += gap
                    farthest = [max(boundary.distance.values()) for boundary in boundaries]
                    line += f"{boundaries[-1].accuracy:10.2f}\n      distance before each "
                    line += f"projection: {numbers(farthest, '.3f')}"
                bar.clear()
                print(line, flush=True)
                bar.update()
    print("\n* the last projection; distances are those of the farther layer")
    differences = [w - a for a, w in zip(accuracies[False], accuracies[True], strict=True)]
    print(
        f"test accuracy: AdamW {mean_std(accuracies[False])}, "
        f"WWPGD(AdamW) {mean_std(accuracies[True])}, difference {mean_std(differences)} points"
    )
    off = max(abs(alpha - 2.0) for alpha in alphas)
    verdict("alpha within 2 ± 0.01, every layer and seed", off <= 0.01, f"off by {off:.1e}")
    worst_gap = max(abs(gap) for gap in gaps)
    verdict("|ERG gap| at most 1, every layer and seed", worst_gap <= 1, f"at most {worst_gap}")
    largest = max(differences, key=abs)
    verdict(
        "accuracy within 0.3 points, every seed",
        abs(largest) <= 0.3,
        f"largest difference {largest:+.2f}",
    )


if __name__ == "__main__":
    main()
