"""Which lines must I add to a training script that I have? Everything else is as it was.

    python examples/monitor_existing_script.py                         # embedded digits
    python examples/monitor_existing_script.py --dataset mnist --data-dir FOLDER

Besides the import there are two, marked (1) and (2). They change no weight and no random number. By
default watching takes at most about 1 % of the training time and leaves out what costs more; this run
lasts seconds and is measured in full, with budget=None; log_to="runs/mine" would fill TensorBoard. The
monitor prints a table at the end if (3) is added too; what is below it draws this example's figure.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from images import NAMES, load
from outcome import save
from torch import nn
from tqdm import trange

from ww_train import plots
from ww_train.callbacks.monitor import SpectralMonitor


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dataset", choices=NAMES, default="digits")
    parser.add_argument("--data-dir", help="folder with the IDX files of (fashion-)mnist")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/monitor_existing_script"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    data = [part.tensors for part in load(args.dataset, args.data_dir)]
    (x, y), (test_x, test_y) = ([t.to(args.device) for t in tensors] for tensors in data)
    model = nn.Sequential(
        nn.Linear(x.shape[1], 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    ).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = SpectralMonitor(model, optimizer, budget=None)  # (1)

    for _ in (bar := trange(args.epochs, unit="epoch")):
        for batch in torch.randperm(len(x)).to(args.device).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = 100.0 * float((model(test_x).argmax(1) == test_y).float().mean())
        bar.set_postfix(accuracy=f"{accuracy:.1f}")
        monitor.epoch_end()  # (2)

    monitor.close()  # (3) optional: prints the table of all layers
    history = pd.DataFrame(monitor.history)
    names = [column for column in history if column.startswith("ww_alpha/")]
    table = pd.DataFrame(
        {
            "layer": [name.removeprefix("ww_alpha/") for name in names],
            "alpha_first_epoch": [history[name].dropna().iloc[0] for name in names],
            "alpha_last_epoch": [history[name].dropna().iloc[-1] for name in names],
            "verdict": [monitor.report[name.removeprefix("ww_alpha/")].verdict for name in names],
        }
    )
    sentence = (
        f"After {args.epochs} epochs the test accuracy is {accuracy:.1f} %; in one line: "
        f"{monitor.verdict}. Watching took {monitor.budget.spent:.2f} s, "
        f"{100 * monitor.budget.overhead:.1f} % of the training time. One seed."
    )
    figure = plots.training_curves(monitor.history)
    save(args.out, figure, table, sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
