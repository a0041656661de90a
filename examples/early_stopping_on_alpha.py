"""Can training be stopped by alpha alone, without a validation set?

    python examples/early_stopping_on_alpha.py                         # embedded digits
    python examples/early_stopping_on_alpha.py --dataset mnist --data-dir FOLDER

A network is trained on few images, a part of them with wrong labels, so that it over-fits. Lightning's
own EarlyStopping looks at the mean alpha that the callback logs, and stops when it no longer falls, or
falls below 2. The same training then goes on to the end to see what stopping was worth. SETOL (Martin
and Hinrichs, 2025) says that layers with alpha below 2 over-fit.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pandas as pd
import torch
from images import NAMES, load
from lightning.pytorch.callbacks import EarlyStopping
from matplotlib.figure import Figure
from outcome import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ww_train.callbacks.lightning import WeightWatcherCallback


class MLP(pl.LightningModule):
    """Two hidden layers; remembers the test error of each epoch, which nothing looks at."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        hidden = [nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(128, 10))
        self.errors: list[float] = []

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _index: int) -> None:
        wrong = (self.net(batch[0]).argmax(1) != batch[1]).float().mean()
        self.errors.append(100.0 * float(wrong))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def few(data: TensorDataset, number: int, wrong: float, seed: int) -> TensorDataset:
    """The first images, a share of them with random labels."""
    x, y = (tensor[:number].clone() for tensor in data.tensors)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(len(y), generator=generator) < wrong
    return TensorDataset(x, torch.where(chosen, torch.randint(10, y.shape, generator=generator), y))


def train(
    stop: bool, data: TensorDataset, test: TensorDataset, args: argparse.Namespace
) -> pd.DataFrame:
    """Train once; a row an epoch."""
    pl.seed_everything(args.seed, verbose=False)
    model = MLP(data[0][0].numel())
    watch = WeightWatcherCallback(layers=["net.0", "net.2"], budget=None, summary=False)
    alpha = EarlyStopping(
        "ww/alpha_mean", patience=args.patience, min_delta=0.01, stopping_threshold=2.0
    )
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[watch, alpha] if stop else [watch],  # the order matters: alpha is logged first
        accelerator=args.device,
        devices=1,
        logger=pl.loggers.CSVLogger(args.out, "logs"),
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    print(f"{'stopped by alpha' if stop else 'to the end'}, at most {args.epochs} epochs")
    loader = DataLoader(data, 32, shuffle=True)
    trainer.fit(model, loader, DataLoader(test, len(test)))
    alphas = [record["ww/alpha_mean"] for record in watch.history if record["step"] > 0]
    epochs = range(1, len(model.errors) + 1)
    return pd.DataFrame({"epoch": epochs, "alpha": alphas, "error": model.errors})


def draw(whole: pd.DataFrame, stopped: int) -> Figure:
    """Alpha and test error by epoch, and where training would have ended."""
    figure = Figure(figsize=(11.0, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(whole.epoch, whole.alpha, color="C0")
    left.axhline(2.0, color="C2", linestyle="--", linewidth=1.0, label="alpha 2")
    right.plot(whole.epoch, whole.error, color="C3")
    best = whole.loc[whole.error.idxmin()]
    right.plot(best.epoch, best.error, "o", color="black", label=f"best, epoch {best.epoch:.0f}")
    left.set(xlabel="epoch", title="mean alpha of the two hidden layers")
    right.set(xlabel="epoch", title="test error, %")
    for ax in (left, right):
        ax.axvline(stopped, color="0.4", linestyle=":", label=f"stopped, epoch {stopped}")
        ax.legend(frameon=False)
    return figure


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dataset", choices=NAMES, default="digits")
    parser.add_argument("--data-dir", help="folder with the IDX files of (fashion-)mnist")
    parser.add_argument("--epochs", type=int, default=120, help="at most (120)")
    parser.add_argument("--images", type=int, default=400, help="to train on (400)")
    parser.add_argument("--wrong", type=float, default=0.2, help="share of random labels (0.2)")
    parser.add_argument("--patience", type=int, default=5, help="epochs without a new low (5)")
    parser.add_argument("--device", default="cpu", help="Lightning accelerator: cpu, gpu, mps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/early_stopping_on_alpha"))
    args = parser.parse_args()

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*num_workers.*")  # small data, held in memory
    warnings.filterwarnings("ignore", message=".*isinstance.treespec.*")  # Lightning about torch
    data, test = load(args.dataset, args.data_dir)
    data = few(data, args.images, args.wrong, args.seed)
    stopped, whole = (train(stop, data, test, args) for stop in (True, False))
    rows = {
        "stopped by alpha": stopped.iloc[-1],
        "best epoch in hindsight": whole.loc[whole.error.idxmin()],
        "trained to the end": whole.iloc[-1],
    }
    table = pd.DataFrame(rows).T.rename_axis("training").reset_index()
    stop, best, end = table.itertuples(index=False)
    sentence = (
        f"With {args.images} images of {args.dataset}, {100 * args.wrong:.0f} % of them with random "
        f"labels, training by alpha ends after epoch {stop.epoch:.0f} of {args.epochs} at a mean alpha "
        f"of {stop.alpha:.2f} and a test error of {stop.error:.2f} %. The best epoch was "
        f"{best.epoch:.0f} ({best.error:.2f} %, alpha {best.alpha:.2f}); at the end the error is "
        f"{end.error:.2f} %, alpha {end.alpha:.2f}. One seed."
    )
    figure = draw(whole, len(stopped))
    save(args.out, figure, table, sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
