"""How strongly to project in which epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Strength: TypeAlias = "float | Callable[[int], float]"


@dataclass(frozen=True)
class Ramp:
    """Strength that rises linearly from 0 and reaches 1 in the epoch with index `epochs - 1`."""

    epochs: int = 6

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"a ramp needs at least one epoch, got {self.epochs}")

    def __call__(self, epoch: int) -> float:
        """Strength at the end of the epoch with this index (the first is 0)."""
        return min(1.0, (epoch + 1) / self.epochs)


def check_strength(strength: float) -> None:
    """Raise ValueError unless a strength is a number from 0 to 1."""
    if not (math.isfinite(strength) and 0.0 <= strength <= 1.0):
        raise ValueError(f"strength must be between 0 and 1, got {strength}")
