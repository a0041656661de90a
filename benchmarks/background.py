"""Claim: with `background=True` and a free core, watching costs 1 % of the training time at most.

Two equal MLPs are trained on MNIST with one thread, an epoch of the one and an epoch of the other in
turn. One is watched in the background, every layer and its traps at every epoch, whatever it costs.
Afterwards the weights of both must be equal bit for bit. Needs two idle cores.

    WW_TRAIN_DATA=FOLDER python benchmarks/background.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from claims import skip, verdict
from mnist_mlp import MLP, add_data_argument, load_mnist
from overhead import train_epoch
from tqdm.auto import tqdm

from ww_train.callbacks.monitor import SpectralMonitor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_argument(parser)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    try:
        data = load_mnist(args.data_dir)
    except FileNotFoundError as error:
        skip(error)
    torch.set_num_threads(1)
    for background in (False, True):
        models = [MLP(0), MLP(0)]
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
        options = {"budget": None, "summary": False, "background": background}
        monitor = SpectralMonitor(models[1], optimizers[1], **options)
        order = torch.Generator().manual_seed(0)
        ratios = []
        for epoch in tqdm(range(args.epochs), unit="epoch", file=sys.stderr, leave=False):
            batches = list(torch.randperm(len(data.train_x), generator=order).split(128))
            seconds = [0.0, 0.0]
            for which in (0, 1) if epoch % 2 else (1, 0):
                started = time.perf_counter()
                if which == 1:  # what the last epoch left is measured while this one trains
                    monitor.epoch_end()
                train_epoch(models[which], optimizers[which], data, batches)
                seconds[which] = time.perf_counter() - started
                monitor.settle()  # or the thread would slow the other one
            ratios.append(seconds[1] / seconds[0] - 1.0)
        monitor.close()
        weights = zip(models[0].parameters(), models[1].parameters(), strict=True)
        same = all(torch.equal(bare, watched) for bare, watched in weights)
        cost = 100 * statistics.median(ratios)
        where = "in the background" if background else "in the foreground"
        told = f"{cost:+.2f} % (median of {args.epochs} epochs)"
        if background:
            verdict(f"every epoch measured {where} costs at most 1 %", cost <= 1.0, told)
        else:
            print(f"every epoch measured {where} costs {told}")
        verdict(f"the same weights, bit for bit, {where}", same, f"{len(monitor.history)} records")


if __name__ == "__main__":
    main()
