"""A plain PyTorch loop with Hugging Face Accelerate: what do the layers of a network do?

    python examples/accelerate_loop.py                                 # embedded digits
    accelerate launch examples/accelerate_loop.py                      # on whatever you configured

`SpectralMonitor` takes the prepared model and optimizer as they are: it finds the layers, and a WWPGD
(`--wwpgd`), inside Accelerate's wrappers. In several processes it deals the layers to them, and the
first one writes. WeightWatcher's reading: as a network learns, alpha falls towards 2 in every layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from images import NAMES, load
from matplotlib.figure import Figure
from outcome import save
from torch import nn
from torch.utils.data import DataLoader
from tqdm import trange

from ww_train import WWPGD, plots
from ww_train.callbacks.monitor import SpectralMonitor


def train(
    accelerator: Accelerator, args: argparse.Namespace
) -> tuple[SpectralMonitor, list[float]]:
    """Train; the monitor with what it saw, and the test error in percent of each epoch."""
    train_set, test_set = load(args.dataset, args.data_dir)
    layers = [nn.Linear(train_set[0][0].numel(), 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if args.wwpgd:
        optimizer = WWPGD(optimizer, model=model)
    loaders = DataLoader(train_set, 64, shuffle=True), DataLoader(test_set, 500)
    model, optimizer, loader, test = accelerator.prepare(model, optimizer, *loaders)
    first, errors = accelerator.is_main_process, []
    # budget=None: the run is short, measure every layer every epoch whatever it costs
    with SpectralMonitor(model, optimizer, log_to=args.out / "tensorboard", budget=None) as monitor:
        for _ in trange(args.epochs, unit="epoch", disable=not first):
            model.train()
            for x, y in loader:
                optimizer.zero_grad()
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
            monitor.epoch_end()  # projects, if the optimizer is a WWPGD; measures and logs
            model.eval()
            with torch.no_grad():
                pairs = [accelerator.gather_for_metrics((model(x).argmax(1), y)) for x, y in test]
            wrong = torch.cat([guess != y for guess, y in pairs])
            errors.append(100.0 * float(wrong.float().mean()))
    return monitor, errors


def draw(history: list[dict[str, float]], errors: list[float]) -> Figure:
    """Alpha of the layers, and the test error, by epoch."""
    figure = Figure(figsize=(11.0, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    plots.training_curves(history, ax=left)
    right.plot(range(1, len(errors) + 1), errors, "o-", color="C3", markersize=3)
    right.set(xlabel="epoch", ylabel="test error, %", title="test error")
    right.xaxis.get_major_locator().set_params(integer=True)
    return figure


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dataset", choices=NAMES, default="digits")
    parser.add_argument("--data-dir", help="folder with the IDX files of (fashion-)mnist")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--wwpgd", action="store_true", help="steer as well as watch")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate_loop"))
    args = parser.parse_args()
    accelerator = Accelerator(cpu=args.device == "cpu")
    set_seed(args.seed)
    monitor, errors = train(accelerator, args)
    if not accelerator.is_main_process or monitor.report is None:
        return
    start, report = monitor.timeline.first, monitor.report
    rows = [(x.name, start[x.name], x.alpha, x.ERG_gap, x.num_traps, x.verdict) for x in report]
    columns = ["layer", "alpha_at_start", "alpha_at_end", "ERG_gap", "traps", "verdict"]
    table = pd.DataFrame(rows, columns=columns)
    both = table.dropna(subset=["alpha_at_start", "alpha_at_end"])
    nearer = (both.alpha_at_end - 2).abs() < (both.alpha_at_start - 2).abs()
    sentence = (
        f"Alpha came nearer to 2 in {nearer.sum()} of {len(both)} layers; its mean went from "
        f"{np.mean(both.alpha_at_start):.2f} to {np.mean(both.alpha_at_end):.2f} while the test error "
        f"fell to {errors[-1]:.1f} % ({min(errors):.1f} % at best). {table.traps.gt(0).sum()} layers "
        "have correlation traps. One seed."
    )
    device, figure = accelerator.device.type, draw(monitor.history, errors)
    save(args.out, figure, table, sentence, seed=args.seed, device=device)


if __name__ == "__main__":
    main()
