"""Correlation traps: spikes that remain when the entries of a matrix are shuffled.

Shuffling destroys every correlation between rows and columns. What still stands out of the random
bulk comes from the entries themselves: a mean that is not zero, or single entries that are too
large (Martin and Hinrichs, SETOL, 2025, on correlation traps).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ww_train.marchenko_pastur import MPFit, fit_mp
from ww_train.spectrum import Spectrum


@dataclass(frozen=True)
class Traps:
    """Spikes of one seeded shuffle of a layer.

    Attributes:
        num_traps: Number of eigenvalues of the shuffled matrix above the Tracy-Widom threshold.
        max_rand_eval: Largest eigenvalue of the shuffled matrix.
        mp: The random bulk of the shuffled matrix; its `threshold` is the line a trap crosses.
        seed: Seed of the shuffle, before the layer's name is mixed in.
    """

    num_traps: int
    max_rand_eval: float
    mp: MPFit
    seed: int


def shuffle(stack: Tensor, seed: int, name: str = "") -> Tensor:
    """Permute the entries of every slice of a stack, each slice on its own.

    Args:
        stack: `(rf, rows, cols)` weights.
        seed: Seed of an own generator on the stack's device; no global generator is touched.
        name: Layer name, mixed into the seed, so that a layer's shuffle does not depend on which
            other layers are analysed.

    Returns:
        A shuffled copy. The same seed gives the same copy on the same type of device.
    """
    generator = torch.Generator(stack.device).manual_seed(seed + zlib.crc32(name.encode()))
    shuffled = torch.empty_like(stack, memory_format=torch.contiguous_format)
    for source, target in zip(stack, shuffled, strict=True):
        order = torch.randperm(source.numel(), generator=generator, device=source.device)
        target.view(-1).copy_(source.reshape(-1)[order])
    return shuffled


def count_traps(shuffled: Spectrum, seed: int) -> Traps:
    """Traps of a layer, from the spectrum of its shuffled matrix.

    A shuffled matrix of well-behaved entries shows a trap with probability
    `ww_train.marchenko_pastur.FALSE_ALARM`.
    """
    mp = fit_mp(shuffled)
    return Traps(mp.num_spikes, shuffled.lambda_max, mp, seed)
