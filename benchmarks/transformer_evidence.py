"""Character-level GPT on tinyshakespeare: which projection leaves the validation loss as it is?

Three pre-norm blocks of width 128 and four heads, context 96; query, key, value and output are
linear layers of their own, so a block has six; the head is tied to the embedding and not projected.
AdamW, weight decay 0.1, lr 1e-3 with 100 steps of warm-up and cosine decay to zero, batches of 32,
gradients clipped to norm 1. The first 90 % of the text are for training; the validation loss is that
of all of the rest, in windows of the context's length. The same seed gives every arm the same
initial weights and batches. Alpha and ERG gap are given as the range over the 18 layers.

    WW_TRAIN_DATA=FOLDER python benchmarks/transformer_evidence.py    # FOLDER/tinyshakespeare.txt
    WW_TRAIN_DATA=FOLDER python benchmarks/transformer_evidence.py --steps 30 --seeds 0 --log s.jsonl
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from char_gpt import CONTEXT, GPT, batches_of, load_text, windows_of
from evidence import (
    Row,
    by_layer,
    fit,
    late_distance,
    mean_loss,
    number,
    spectra,
    sweep,
    sweep_arguments,
    table,
)
from torch import Tensor, nn
from torch.optim import AdamW, lr_scheduler

from ww_train import WWPGD, ManifoldProjection, Ramp, TailProjection
from ww_train.steering.momentum import project, reset
from ww_train.steering.schedules import Strength

BATCH, WARM_UP = 32, 100


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How often to project in a run, how strongly, and other options of WWPGD."""

    times: int = 15
    strength: Strength = field(default_factory=lambda: Ramp(8))
    options: Mapping[str, Any] = field(default_factory=dict)


MLP_LAYERS = ("*.up", "*.down")

ARMS: dict[str, Arm | None] = {
    "AdamW": None,
    "all, alpha 2": Arm(),
    "all, alpha 3": Arm(options={"projection": ManifoldProjection(3.0)}),
    "MLP layers, alpha 2": Arm(options={"include": MLP_LAYERS}),
    "MLP layers, alpha 3": Arm(
        options={"include": MLP_LAYERS, "projection": ManifoldProjection(3.0)}
    ),
    "all, alpha 4": Arm(options={"projection": ManifoldProjection(4.0)}),
    "down alpha 2, query and key alpha 3": Arm(
        options={
            "projection": {"*.down": ManifoldProjection(2.0), "*.[qk]*y": ManifoldProjection(3.0)}
        }
    ),
    "all, alpha 2, strength up to 0.5": Arm(strength=Ramp(8, top=0.5)),
    "all, alpha 2, ramp over the whole run": Arm(strength=Ramp(15)),
    "all, alpha 2, 5 times": Arm(times=5, strength=Ramp(3)),
    "all, alpha 2, momentum projected": Arm(options={"momentum": project}),
    "all, alpha 2, momentum reset": Arm(options={"momentum": reset}),
    "TailProjection": Arm(strength=Ramp(5), options={"projection": TailProjection()}),
}
"""None: nothing is projected."""


def optimizer_of(arm: Arm | None, model: nn.Module) -> torch.optim.Optimizer:
    base = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    return WWPGD(base, model=model, strength=arm.strength, **arm.options) if arm else base


def run(text: Tensor, arm: str, steps: int, seed: int) -> Row:
    """One run and what came of it."""
    cut = len(text) * 9 // 10
    unseen = windows_of(text[cut:])
    seen = windows_of(text[:cut], every=9 * CONTEXT)  # as many
    model = GPT(int(text.max()) + 1, seed)
    optimizer = optimizer_of(ARMS[arm], model)
    warm_up = lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP)
    decay = lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - WARM_UP))
    schedule = lr_scheduler.SequentialLR(optimizer, [warm_up, decay], [WARM_UP])
    times = (ARMS[arm] or Arm()).times
    every = max(1, steps // times)
    last = {}

    def watch(step: int) -> None:
        if step > steps - every:
            last["before"] = mean_loss(model, *unseen)

    batches = batches_of(text[:cut], batch=BATCH, steps=steps, seed=seed)
    course = fit(model, optimizer, schedule, batches, every=every, watch=watch)
    return {
        **last,
        "val": mean_loss(model, *unseen),
        "train": mean_loss(model, *seen),
        **spectra(model),
        "distances": course.distances,
        "cpu_step": course.cpu / steps,
        "cpu_projection": course.cpu_projection / times,
    }


COLUMNS = {
    "val loss": number("val", ".4f"),
    "before last projection": number("before", ".4f"),
    "train loss": number("train", ".4f"),
    "alpha": by_layer("alpha", ".2f"),
    "ERG gap": by_layer("gap", ".1f"),
    "distance": by_layer("distance", ".3f"),
    "before projections": late_distance,
    "CPU s/projection": number("cpu_projection", ".2f"),
}


def main() -> None:
    parser = sweep_arguments(__doc__, "transformer_evidence.jsonl", seeds=3)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    keys = [
        {"arm": arm, "steps": args.steps, "seed": seed}
        for seed in args.seeds
        for arm in args.arms or ARMS
    ]
    rows = sweep(args, lambda: load_text(args.data_dir), run, keys)
    print(f"\n{args.steps} steps\n")
    mine = [row for row in rows if row["steps"] == args.steps]
    print(table(mine, COLUMNS, {"val": ".4f"}))


if __name__ == "__main__":
    main()
