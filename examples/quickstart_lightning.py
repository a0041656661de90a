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
import pandas as pd
import torch
from images import NAMES, load
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ww_train import WWPGD, Report, measure
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
    """Train one network; its spectra before and after, and the test accuracy in percent."""
    pl.seed_everything(args.seed, verbose=False)
    train_set, test_set = load(args.dataset, args.data_dir)
    model = MLP(train_set[0][0].numel(), args.width, args.epochs, project=name != "AdamW")
    before = measure(model, randomize=True)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[WeightWatcherCallback()],  # the one line that watches
        logger=TensorBoardLogger(args.log_dir, name=name, version=""),
        accelerator=args.device,
        devices=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    print(f"{name} on {args.dataset}, {args.epochs} epochs")
    loader = DataLoader(train_set, args.batch_size, shuffle=True)
    trainer.fit(model, loader, DataLoader(test_set, 1000))
    after = measure(model, randomize=True)
    return before, after, float(trainer.callback_metrics["test/accuracy"])


def table(reports: dict[str, Report]) -> str:
    """Layers by rows, one line for each moment."""
    rows = [
        [layer.name, moment, layer.alpha, layer.ERG_gap, layer.num_traps, layer.verdict]
        for moment, report in reports.items()
        for layer in report
    ]
    columns = ["layer", "network", "alpha", "ERG gap", "traps", "verdict"]
    frame = pd.DataFrame(rows, columns=columns).set_index(["layer", "network"])
    return frame.sort_index(level="layer", sort_remaining=False).round(2).to_string()


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dataset", choices=NAMES, default="digits")
    parser.add_argument("--data-dir", help="folder with the IDX files of (fashion-)mnist")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="Lightning accelerator: cpu, gpu, mps")
    parser.add_argument("--log-dir", default="runs/quickstart")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*num_workers.*")  # small data, held in memory
    warnings.filterwarnings("ignore", message=".*isinstance.treespec.*")  # Lightning about torch

    start, adamw, adamw_accuracy = train("AdamW", args)
    _, wwpgd, wwpgd_accuracy = train("WWPGD(AdamW)", args)
    print("\n" + table({"at the start": start, "AdamW": adamw, "WWPGD(AdamW)": wwpgd}))
    print(
        "\nrandom-like: nothing learned that the spectrum shows; trapped: weights that stand out of"
    )
    print("the noise, or that lean to one side. WWPGD steers fc1 and fc2 to alpha 2 and ERG gap 0")
    print("over its first six epochs; fc3 has too few eigenvalues for it.")
    print(f"test accuracy: AdamW {adamw_accuracy:.1f} %, WWPGD(AdamW) {wwpgd_accuracy:.1f} %")
    print(f"\nsee the curves:  tensorboard --logdir {args.log_dir}")


if __name__ == "__main__":
    main()
