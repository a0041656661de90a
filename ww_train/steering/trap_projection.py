"""`TrapProjection`: shrinks the weights that make a layer's correlation traps."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from ww_train.editing.trap_removal import without_traps
from ww_train.linalg import all_finite
from ww_train.steering.projection import Projected
from ww_train.steering.rounding import round_to
from ww_train.weights.matrices import NOT_FINITE, Skipped, WeightMatrix


@dataclass(frozen=True)
class TrapProjection:
    """Moves what `ww_train.trap_causes` names towards where it makes no trap; nothing else.

    The target of a named entry is the mean of the other entries of its slice; where the mean of a
    slice is named, the target of every entry of the slice is lower by that mean
    (`ww_train.editing.trap_removal.without_traps`). A layer without a cause is at its target, so that
    in repeated steps of small strength a cause shrinks until it no longer stands out of the noise, not
    to nothing.

    Traps that have no single cause (many large entries that meet; see `trap_causes`) are not removed.
    Weights of 16 bits are rounded stochastically (`ww_train.steering.rounding`).
    """

    @torch.no_grad()
    def project_(self, matrix: WeightMatrix, strength: float = 1.0) -> Projected | Skipped:
        """Move the named weights in place towards the target; the others keep every bit.

        Args:
            matrix: A layer's matrix.
            strength: 0 (stay) to 1 (arrive).

        Returns:
            What was done, with the relative distance of the weights from the target, zero for a layer
            without a trap, and no spectra; or `Skipped`, the weights untouched, if the matrix is
            read-only or not finite.

        Raises:
            ValueError: If strength is not in 0..1.

        Cost: no decomposition; some passes over the weights, three copies of them in float64, two
        synchronisations.
        """
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength must be between 0 and 1, got {strength}")
        if matrix.read_only:
            return Skipped(matrix.name, matrix.read_only)
        if not all_finite(matrix.stack):
            return Skipped(matrix.name, NOT_FINITE)
        cleaned = without_traps(matrix)
        if not cleaned.causes:
            return Projected(matrix.name, strength, 0.0)
        exact = matrix.stack.to(torch.float64)
        step = cleaned.stack - exact
        distance = float(step.norm() / exact.norm())
        seed = zlib.crc32(repr(cleaned.causes).encode())
        rounded = round_to(exact + strength * step, matrix.stack.dtype, seed)
        if not all_finite(rounded):
            return Skipped(matrix.name, f"the result would overflow {matrix.stack.dtype}")
        # where nothing moves the sum may still have lost the sign of a zero
        matrix.stack.copy_(torch.where(step == 0.0, matrix.stack, rounded))
        return Projected(matrix.name, strength, distance)
