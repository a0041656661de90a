"""Ending the epoch of every `WWPGD` that a training loop has, wherever a framework hid it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ww_train import WWPGD, Projected, Skipped
from ww_train.spectrum import EPS32, Spectrum

from .sharing import Ranks, unwrapped


def find_wwpgd(optimizer: Any) -> WWPGD | None:
    """The WWPGD inside a framework's wrappers (`.optimizer`, `._optimizer`), or None."""
    while optimizer is not None:
        if type(optimizer) is WWPGD:
            return optimizer
        inner = optimizer.__dict__.get("optimizer", optimizer.__dict__.get("_optimizer"))
        if inner is None and isinstance(optimizer, WWPGD):  # a subclass of one's own
            return optimizer
        optimizer = inner
    return None


def wwpgds(optimizers: Sequence[Any] | Optimizer) -> Iterator[WWPGD]:
    """Every WWPGD among optimizers."""
    for optimizer in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
        wwpgd = find_wwpgd(optimizer)
        if wwpgd is not None:
            yield wwpgd


def end_epochs(
    found: Sequence[WWPGD], model: nn.Module, ranks: Ranks, warn: Callable[[str], object]
) -> tuple[Projected | Skipped, ...]:
    """End the epoch of each; one that has no model, or does not know its replicas, is told.

    Raises:
        Exception: Only what a strict WWPGD raises; others give a warning.
    """
    results: list[Projected | Skipped] = []
    for wwpgd in found:
        if wwpgd.model is None:
            wwpgd.model = unwrapped(model)
        if ranks.replicated and wwpgd.replicas is None:
            wwpgd.replicas = ranks.group
        try:
            results += wwpgd.end_epoch()
        except Exception as error:
            if wwpgd.strict:
                raise
            warn(f"no projection: {error!r}")
    return tuple(results)


def projection_scalars(results: Sequence[Projected | Skipped]) -> dict[str, float]:
    """`ww/distance_mean`, `ww/strength` and `ww_distance/<layer>`; empty if nothing was projected."""
    done = [result for result in results if isinstance(result, Projected)]
    if not done:
        return {}
    return {
        "ww/distance_mean": statistics.fmean(layer.distance for layer in done),
        "ww/strength": float(done[0].strength),
        **{f"ww_distance/{layer.name}": float(layer.distance) for layer in done},
    }


def known_spectra(
    results: Sequence[Projected | Skipped], found: Sequence[WWPGD], model: nn.Module
) -> dict[str, Spectrum]:
    """Spectra that a projection left behind, by layer name.

    Not of weights of 16 bits, which are rounded after it, nor if a WWPGD names layers by another
    model than the one that is watched.
    """
    if any(unwrapped(wwpgd.model) is not unwrapped(model) for wwpgd in found):
        return {}
    return {
        result.name: result.after
        for result in results
        if isinstance(result, Projected) and result.after and result.after.eps <= EPS32
    }
