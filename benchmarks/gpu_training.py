"""What `gpu.py` asks of a training run: what watching it costs, and that it changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from claims import verdict
from gpu_limits import timed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ww_train.callbacks.budget import GRANT
from ww_train.callbacks.monitor import SpectralMonitor

EPOCHS = 6
"""Measurements after the first one in a training run."""


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        seconds: Of its steps, and of the watching between them.
        weights: At its end.
        first: Seconds of watching before the first step.
        records: How often something was measured and logged.
    """

    seconds: float
    weights: list[Tensor]
    first: float = 0.0
    records: int = 0

    def equals(self, other: Run) -> bool:
        """Whether both ended with the same weights, bit for bit."""
        pairs = zip(self.weights, other.weights, strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


@sdpa_kernel(SDPBackend.MATH)  # the backward passes of the others do not always repeat
def train(device: str, small: bool, steps: int, **options: Any) -> Run:
    """Train a transformer on noise; with any options it is watched, as they say."""
    width, blocks = (128, 2) if small else (1024, 12)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.randn(16, 128, width, device=device)
    monitor = SpectralMonitor(model, optimizer, summary=False, **options) if options else None
    if monitor:
        monitor.start()  # the first measurement is in the foreground in any case
    first = monitor.budget.spent if monitor else 0.0
    taken = timed(lambda: train_steps(model, optimizer, x, steps, monitor), device)
    if monitor:
        monitor.abort()
    records = len(monitor.history) if monitor else 0
    return Run(taken, [p.detach().cpu() for p in model.parameters()], first, records)


def train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    steps: int,
    monitor: SpectralMonitor | None,
) -> None:
    """Take so many steps in `EPOCHS` epochs."""
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if monitor:
            monitor.step()
        if monitor and step % (steps // EPOCHS) == 0:
            monitor.epoch_end()


def overhead(device: str, small: bool) -> None:
    """Training without a monitor, twice, with the default one, and in the background.

    The default budget may spend a second at once and is back within 1 % after 200 s, so of a run of
    60 s it may take 1 % and that second.
    """
    train(device, small, EPOCHS)
    step = train(device, small, 2 * EPOCHS).seconds / (2 * EPOCHS)
    steps = EPOCHS * max(1, round((3.0 if small else 60.0) / step / EPOCHS))
    bare, again = train(device, small, steps), train(device, small, steps)
    normal = (bare.seconds + again.seconds) / 2
    apart = abs(bare.seconds - again.seconds) / normal
    print(f"{steps} steps in {normal:.1f} s without a monitor; two such runs differ by {apart:.2%}")
    repeats = bare.equals(again)
    if not repeats:
        print("SKIP  the same weights: training itself is not deterministic here")
    for name, grant, options in (
        ("default budget", GRANT, {"budget": 0.01}),
        ("in the background, everything", 0.0, {"background": True, "budget": None}),
    ):
        watched = train(device, small, steps, **options)
        cost_of(name, watched, normal, grant)
        if repeats:
            same = bare.equals(watched)
            verdict(f"{name}: the same weights, bit for bit", same, f"{len(bare.weights)} tensors")


def cost_of(name: str, watched: Run, normal: float, grant: float) -> None:
    """The verdict on what watching cost beyond its first measurement."""
    extra, allowed = watched.seconds - normal, 0.01 * normal + grant
    limit, beyond = "1 %", ""
    if grant:
        limit += f" and the grant of {grant:g} s"
        beyond = f", {max(0.0, extra - grant) / normal:.2%} beyond the grant"
    verdict(
        f"{name}: overhead at most {limit}",
        extra <= allowed,
        f"{extra:.2f} s of {allowed:.2f} s allowed, {extra / normal:.2%}{beyond}; "
        f"{watched.records} records, {watched.first:.2f} s before the first step",
    )
