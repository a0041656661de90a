"""Correlation traps: spikes that remain when the entries of a matrix are shuffled.

Shuffling destroys every correlation between rows and columns. What still stands out of the random
bulk comes from the entries themselves: a mean that is not zero, or single entries that are too
large (Martin and Hinrichs, SETOL, 2025, on correlation traps); `ww_train.trap_causes` names them.
"""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ww_train.marchenko_pastur import (
    FALSE_ALARM,
    MPFit,
    fit_mp,
)
from ww_train.spectrum import Spectrum

LARGEST = 2**31
"""Entries from which CUDA has no permutation."""


@dataclass(frozen=True)
class Traps:
    """Spikes of one seeded shuffle of a layer.

    Attributes:
        num_traps: Number of eigenvalues of the shuffled matrix above the Tracy-Widom threshold, slice
            by slice.
        max_rand_eval: Largest eigenvalue of the shuffled matrix.
        mp: The random bulk of the pooled shuffled spectrum; the `threshold` of a layer of one slice is
            the line a trap crosses.
        seed: Seed of the shuffle, before the layer's name is mixed in.
    """

    num_traps: int
    max_rand_eval: float
    mp: MPFit
    seed: int


@dataclass(frozen=True)
class TrapAverage:
    """Traps of one layer over several seeded shuffles.

    Attributes:
        num_shuffles: Number of shuffles.
        num_traps_mean: Mean number of traps of a shuffle.
        num_traps_std: Sample standard deviation of that number; None for a single shuffle.
    """

    num_shuffles: int
    num_traps_mean: float
    num_traps_std: float | None


def shuffle(stack: Tensor, seed: int, name: str = "") -> Tensor:
    """Permute the entries of every slice of a stack, each slice on its own.

    Args:
        stack: `(rf, rows, cols)` weights.
        seed: Seed of an own generator on the stack's device; no global generator is touched.
        name: Layer name, mixed into the seed, so that a layer's shuffle does not depend on which
            other layers are analysed.

    Returns:
        A shuffled copy, without gradient. The same seed gives the same copy on the same type of
        device; one too large for a permutation there is shuffled on the CPU.
    """
    generator = torch.Generator(stack.device).manual_seed(seed + zlib.crc32(name.encode()))
    shuffled = torch.empty_like(stack, memory_format=torch.contiguous_format, requires_grad=False)
    for source, target in zip(stack.detach(), shuffled, strict=True):
        if source.numel() >= LARGEST and source.device.type != "cpu":
            target.copy_(shuffle(source[None].cpu(), seed, name)[0])
            continue
        # half the memory traffic, and on the CPU the same permutation as with int64
        index = torch.int32 if source.numel() < LARGEST else torch.int64
        order = torch.randperm(
            source.numel(), generator=generator, device=source.device, dtype=index
        )
        torch.index_select(source.reshape(-1), 0, order, out=target.view(-1))
    return shuffled


def count_traps(shuffled: Spectrum, seed: int, slices: Sequence[Spectrum] = ()) -> Traps:
    """Traps of a layer, from the spectrum of its shuffled matrix.

    A shuffled matrix of well-behaved entries shows a trap with probability
    `ww_train.marchenko_pastur.FALSE_ALARM`. The slices of a convolution are random matrices of
    different variance, so that each has an edge of its own: their traps are counted one by one.

    Args:
        shuffled: The pooled spectrum.
        seed: Seed of the shuffle.
        slices: The spectra of the slices, if there are several.
    """
    mp = fit_mp(shuffled)
    num_traps = mp.num_spikes
    if len(slices) > 1:
        share = FALSE_ALARM / len(slices)
        num_traps = sum(fit_mp(part, share).num_spikes for part in slices if part.norm > 0.0)
    return Traps(num_traps, shuffled.lambda_max, mp, seed)


def average_traps(shuffles: Sequence[Traps]) -> TrapAverage:
    """Mean and spread of the number of traps over shuffles of one layer with different seeds.

    Large entries that meet in one row share a spike or lift each other over the threshold, which
    makes the number differ from shuffle to shuffle: by 1 to 4 where entries have heavy tails.

    Args:
        shuffles: Results of `count_traps`, at least one.
    """
    counts = [traps.num_traps for traps in shuffles]
    return TrapAverage(
        num_shuffles=len(counts),
        num_traps_mean=statistics.fmean(counts),
        num_traps_std=statistics.stdev(counts) if len(counts) > 1 else None,
    )
