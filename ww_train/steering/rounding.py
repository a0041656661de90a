"""Rounding of float64 results to the dtype of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def round_to(values: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Round float64 values to a dtype: to the nearest, or stochastically if it has 16 bits.

    Half-precision weights have so few digits that a small step, rounded to the nearest, changes
    nothing at all; up or down at random, with the probabilities that keep the mean, it is kept on
    average (Gupta et al., ICML 2015). The generator is its own, seeded by `seed`.
    """
    if torch.finfo(dtype).bits != 16:
        return values.to(dtype)
    info = torch.finfo(dtype)
    digits = 1 - round(math.log2(info.eps))
    spacing = torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - digits)
    spacing.clamp_(min=info.smallest_normal * info.eps)
    generator = torch.Generator(values.device).manual_seed(seed)
    dither = torch.rand(
        values.shape, generator=generator, dtype=torch.float64, device=values.device
    )
    return torch.floor(values / spacing + dither).mul_(spacing).to(dtype)
