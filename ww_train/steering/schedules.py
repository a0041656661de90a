"""How strongly to project at which boundary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Strength: TypeAlias = "float | Callable[[int], float]"


@dataclass(frozen=True)
class Ramp:
    """Strength that rises linearly from 0 and reaches `top` at the boundary with index `epochs - 1`."""

    epochs: int = 6
    top: float = 1.0

    def __post_init__(self) -> None:
        _check(self.epochs, self.top)

    def __call__(self, epoch: int) -> float:
        """Strength at the boundary with this index (the first is 0)."""
        return self.top * min(1.0, (epoch + 1) / self.epochs)


@dataclass(frozen=True)
class Cosine:
    """Strength that rises from 0 to `top` along half a cosine: slow, fast, slow."""

    epochs: int = 6
    top: float = 1.0

    def __post_init__(self) -> None:
        _check(self.epochs, self.top)

    def __call__(self, epoch: int) -> float:
        """Strength at the boundary with this index (the first is 0)."""
        return self.top * 0.5 * (1.0 - math.cos(math.pi * min(1.0, (epoch + 1) / self.epochs)))


def check_strength(strength: float) -> None:
    """Raise ValueError unless a strength is a number from 0 to 1."""
    if not (math.isfinite(strength) and 0.0 <= strength <= 1.0):
        raise ValueError(f"strength must be between 0 and 1, got {strength}")


def _check(epochs: int, top: float) -> None:
    if epochs < 1:
        raise ValueError(f"a ramp needs at least one epoch, got {epochs}")
    check_strength(top)
