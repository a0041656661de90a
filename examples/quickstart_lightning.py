"""Train a small network twice, with AdamW and with WWPGD(AdamW), and compare the spectra.

    python examples/quickstart_lightning.py                        # embedded digits, half a minute
    python examples/quickstart_lightning.py --dataset mnist --data-dir FOLDER

Watch it live with TensorBoard: the command is printed at the end.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning.pytorch as pl
import torch
from datasets import NAMES, load
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ww_train import WWPGD, Report
from ww_train.callbacks.lightning import WeightWatcherCallback


class MLP(pl.LightningModule):
    """Two hidden layers, AdamW with cosine decay, optionally wrapped in WWPGD."""

    def __init__(self, inputs: int, width: int, epochs: int, project: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, 10)
        self.epochs, self.project = epochs, project

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], _index: int) -> None:
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("test/accuracy", 100 * accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        if self.project:
            optimizer = WWPGD(optimizer, model=self)  # the one line that steers
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def train(name: str, args: argparse.Namespace) -> tuple[Report, Report, float]:
    """Train one network; its report before and after, and the test accuracy."""
    pl.seed_everything(args.seed, verbose=False)
    train_set, test_set = load(args.dataset, args.data_dir)
    model = MLP(train_set[0][0].numel(), args.width, args.epochs, project=name == "WWPGD(AdamW)")
    watcher = WeightWatcherCallback()  # the one line that watches
    first = watcher.monitor
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[watcher],
        logger=TensorBoardLogger(args.log_dir, name="", version=name),
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    print(f"\n{name} on {args.dataset}, {args.epochs} epochs")
    loader = DataLoader(train_set, args.batch_size, shuffle=True)
    trainer.fit(model, loader, DataLoader(test_set, 1000))
    before = watcher.history[0]
    return before, first.report, float(trainer.callback_metrics["test/accuracy"])
