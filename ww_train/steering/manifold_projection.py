"""`ManifoldProjection`: onto the critical manifold, the default of `WWPGD`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ww_train.power_law import SMALL_N
from ww_train.spectrum import Spectrum
from ww_train.steering.manifold import critical_spectrum, feasible_tail_sizes, partial_step
from ww_train.steering.projection import Move, SpectralProjection


@dataclass(frozen=True)
class ManifoldProjection(SpectralProjection):
    """Projection onto the critical manifold: the given alpha and trace-log zero, exactly.

    The nearest critical weights share the singular vectors of W (`ww_train.steering.manifold`). A
    step of strength eta moves `ln sigma` by eta of the way and restores the Frobenius norm. Strength
    1 lands on the manifold and is idempotent.

    Attributes:
        alpha: Target exponent, above 1.
        min_evals: Smaller layers are left alone: their alpha is not reliable.
    """

    alpha: float = 2.0
    min_evals: int = SMALL_N

    def __post_init__(self) -> None:
        if not 1.0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be a finite number above 1, got {self.alpha}")

    def move(self, spectrum: Spectrum, strength: float) -> Move | str:
        """Where the eigenvalues go, or that there is no critical spectrum of this size and rank."""
        evals = spectrum.evals[::-1]
        target = critical_spectrum(evals, self.alpha, spectrum.matrix_rank)
        if target is None:
            return self._infeasible(len(evals), spectrum.matrix_rank)
        positive = np.where(np.arange(len(evals)) < spectrum.matrix_rank, evals, 0.0)
        moved = partial_step(positive, target.evals, strength)
        return Move(moved, target.distance, target.tail_size)

    def _infeasible(self, n: int, rank: int) -> str:
        if len(feasible_tail_sizes(n, self.alpha)) == 0:
            return f"no critical spectrum of {n} eigenvalues has alpha {self.alpha:g}"
        return f"rank {rank} of {n} is too low for a critical spectrum of alpha {self.alpha:g}"
