"""What happens to the layers of a small transformer in the Hugging Face Trainer?

    python examples/huggingface_trainer.py --data-dir FOLDER   # with tinyshakespeare.txt; or without
    python examples/huggingface_trainer.py --wwpgd             # steers the layers to alpha 2 as well

A Llama made from a config learns to predict the next character. One callback watches; for steering the
Trainer is given another optimizer, and nothing else changes. WeightWatcher's reading: as a network
learns, alpha falls into the range from 2 to 6, in every layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from corpus import CHARACTERS, shakespeare, split
from matplotlib.figure import Figure
from outcome import save
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from ww_train import Report, plots
from ww_train.callbacks.huggingface import WeightWatcherCallback, WWPGDFactory

CONTEXT, BATCH, RATE = 64, 32, 2e-3


def windows(text: Tensor, number: int) -> list[dict[str, Tensor]]:
    """Pieces of the text that do not overlap, as the Trainer wants them."""
    pieces = text.unfold(0, CONTEXT, CONTEXT)[:number]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def trainer_for(text: Tensor, args: argparse.Namespace) -> tuple[Trainer, WeightWatcherCallback]:
    """Everything a Trainer needs; the callback keeps the history of the spectra."""
    known, held_out = split(text)
    set_seed(args.seed)
    config = LlamaConfig(
        vocab_size=CHARACTERS,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
    options = TrainingArguments(
        str(args.out / "trainer"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="no",
        report_to="tensorboard",
        dataloader_pin_memory=False,
        use_cpu=args.device == "cpu",
        seed=args.seed,
    )
    # the one line that watches; the run is short: measure everything, whatever it costs
    watch = WeightWatcherCallback(budget=None)
    steer = {"optimizer_cls_and_kwargs": (WWPGDFactory, {"lr": RATE})}  # the one that steers
    trainer = Trainer(
        LlamaForCausalLM(config),
        options,
        train_dataset=windows(known, args.windows),
        eval_dataset=windows(held_out, max(1, args.windows // 10)),
        callbacks=[watch],
        **(steer if args.wwpgd else {}),
    )
    return trainer, watch


def draw(history: list[dict[str, float]], losses: pd.Series) -> Figure:
    """Alpha of the layers and the loss on text held out, by epoch."""
    figure = Figure(figsize=(11.0, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    plots.training_curves(history, ax=left)
    right.plot(losses.index, losses, "o-", color="C3", markersize=3)
    right.set(xlabel="epoch", ylabel="loss", title="validation loss, nats a character")
    right.xaxis.get_major_locator().set_params(integer=True)
    return figure


def layer_table(report: Report, first: dict[str, float | None]) -> pd.DataFrame:
    """A line a layer."""
    rows = [(x.name, first[x.name], x.alpha, x.ERG_gap, x.num_traps, x.verdict) for x in report]
    names = ["layer", "alpha_at_start", "alpha_at_end", "ERG_gap", "traps", "verdict"]
    return pd.DataFrame(rows, columns=names)


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--windows", type=int, default=1280, help="of 64 characters (1280)")
    parser.add_argument("--wwpgd", action="store_true", help="steer as well as watch")
    parser.add_argument("--data-dir", help="folder with tinyshakespeare.txt")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/huggingface_trainer"))
    args = parser.parse_args()
    corpus, text = shakespeare(args.data_dir)
    trainer, watch = trainer_for(text, args)
    trainer.train()

    table = layer_table(watch.report, watch.monitor.timeline.first)
    log = [record for record in trainer.state.log_history if "eval_loss" in record]
    losses = pd.Series({record["epoch"]: record["eval_loss"] for record in log})
    safe = [table[x].between(2.0, 6.0).sum() for x in ("alpha_at_start", "alpha_at_end")]
    sentence = (
        f"On {corpus} the validation loss is {losses.iloc[-1]:.3f} after {args.epochs} epochs. The "
        f"median alpha of {len(table)} layers went from {table.alpha_at_start.median():.2f} to "
        f"{table.alpha_at_end.median():.2f}; {safe[0]} were between 2 and 6 before, {safe[1]} are now. "
        f"{'Steered by WWPGD' if args.wwpgd else 'Only watched'}: {watch.monitor.verdict}. One seed."
    )
    device = str(trainer.args.device)
    save(args.out, draw(watch.history, losses), table, sentence, seed=args.seed, device=device)


if __name__ == "__main__":
    main()
