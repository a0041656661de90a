"""Projections of a layer's weights: what to change, given how strongly.

A projection is any object with `project_(matrix, strength)`. It writes through the view that a
`WeightMatrix` is, in place and only finite values, and returns what it did or why it did nothing.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ww_train.erg import erg_tail
from ww_train.linalg import gram
from ww_train.manifold import critical_spectrum, feasible_tail_sizes, partial_step
from ww_train.matrices import Skipped, WeightMatrix, of_parameter
from ww_train.power_law import SMALL_N, PowerLawFit, fit_power_law
from ww_train.spectrum import Array, Spectrum


@dataclass(frozen=True, eq=False)
class Projected:
    """What a projection did to one layer.

    Attributes:
        name: Dotted path of the layer.
        strength: How far it went, 0 to 1.
        distance: Relative Frobenius distance from the weights to the target before the step: the
            "distance to criticality".
        tail_size: Number k of eigenvalues in the target's tail.
        before: Spectrum before.
        after: Spectrum after, without another decomposition.
    """

    name: str
    strength: float
    distance: float
    tail_size: int
    before: Spectrum
    after: Spectrum

    @cached_property
    def fit(self) -> PowerLawFit | None:
        """Power law of the tail after the step."""
        return fit_power_law(self.after.positive)

    @property
    def alpha(self) -> float | None:
        """Power-law exponent after the step."""
        return self.fit.alpha if self.fit else None

    @property
    def ERG_gap(self) -> int | None:
        """ERG gap after the step."""
        return erg_tail(self.after, self.fit).ERG_gap


class Projection(Protocol):
    """What `WWPGD` needs of a projection."""

    def project_(self, matrix: WeightMatrix, strength: float) -> Projected | Skipped:
        """Move the weights of `matrix` in place by `strength` (0 to 1) of the way to the target."""
        ...


@dataclass(frozen=True)
class ManifoldProjection:
    """Projection onto the critical manifold: the given alpha and trace-log zero, exactly.

    The nearest critical weights share the singular vectors of W (`ww_train.manifold`), so
    `W* = W V diag(sigma* / sigma) Vᵀ`: one eigendecomposition of the smaller Gram matrix and two
    products, all in float64. A step of strength eta moves `ln sigma` by eta of the way and restores
    the Frobenius norm. Strength 1 lands on the manifold and is idempotent. The slices of a
    convolution have one pooled spectrum and one tail.

    Weights of 16 bits are rounded stochastically (`round_to`), or small steps would be lost.

    Attributes:
        alpha: Target exponent, above 1.
        min_evals: Smaller layers are left alone: their alpha is not reliable.
    """

    alpha: float = 2.0
    min_evals: int = SMALL_N

    def __post_init__(self) -> None:
        if not 1.0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be a finite number above 1, got {self.alpha}")

    @torch.no_grad()
    def project_(self, matrix: WeightMatrix | Tensor, strength: float = 1.0) -> Projected | Skipped:
        """Move the weights in place towards the manifold.

        Args:
            matrix: A layer's matrix, or any floating-point tensor of shape `(rows, cols)`.
            strength: 0 (stay) to 1 (arrive).

        Returns:
            What was done; or `Skipped`, the weights untouched, if the matrix is read-only, zero, not
            finite, or too small or of too low rank for a critical spectrum.

        Raises:
            TypeError: If it is neither.
            ValueError: If strength is not in 0..1 or the tensor is not two-dimensional.
            torch.linalg.LinAlgError: If the decomposition does not converge; weights untouched.

        Cost: one `eigh` of M x M, `2 M³ + 2 N M²` operations in float64 on the weights' device; two
        copies of M numbers between device and host, three synchronisations.
        """
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength must be between 0 and 1, got {strength}")
        if isinstance(matrix, Tensor):
            if matrix.ndim != 2:
                raise ValueError(f"expected a matrix, got a tensor of shape {tuple(matrix.shape)}")
            found = next(of_parameter("W", matrix))
            if isinstance(found, Skipped):
                return found
            matrix = found
        if not isinstance(matrix, WeightMatrix):
            raise TypeError(f"expected a WeightMatrix or a Tensor, got {type(matrix).__name__}")
        if matrix.read_only:
            return Skipped(matrix.name, matrix.read_only)
        n = matrix.num_evals
        if n < self.min_evals:
            return Skipped(matrix.name, f"{n} eigenvalues, fewer than min_evals={self.min_evals}")
        grams = gram(matrix.stack, matrix.scale)
        if not grams.isfinite().all():
            return Skipped(matrix.name, "NaN or infinite weights, or squares that overflow")
        device_evals, vectors = torch.linalg.eigh(grams)
        evals = device_evals.clamp_min(0.0).flatten().cpu().numpy()
        order = np.argsort(evals)[::-1]
        before = _spectrum(matrix, evals[order])
        if before.norm == 0.0:
            return Skipped(matrix.name, "all weights are zero")
        target = critical_spectrum(evals[order], self.alpha, before.matrix_rank)
        if target is None:
            return Skipped(matrix.name, self._infeasible(n, before.matrix_rank))
        positive = np.where(np.arange(n) < before.matrix_rank, evals[order], 0.0)
        moved = partial_step(positive, target.evals, strength)
        ratio = np.zeros(n)
        np.divide(moved, positive, out=ratio, where=positive > 0.0)
        factors = np.empty(n)
        factors[order] = np.sqrt(ratio)
        if not _rescale_(matrix.stack, vectors, factors, seed=zlib.crc32(evals.tobytes())):
            return Skipped(matrix.name, f"the result would overflow {matrix.stack.dtype}")
        after = _spectrum(matrix, moved)
        return Projected(matrix.name, strength, target.distance, target.tail_size, before, after)

    def _infeasible(self, n: int, rank: int) -> str:
        if len(feasible_tail_sizes(n, self.alpha)) == 0:
            return f"no critical spectrum of {n} eigenvalues has alpha {self.alpha:g}"
        return f"rank {rank} of {n} is too low for a critical spectrum of alpha {self.alpha:g}"


def _spectrum(matrix: WeightMatrix, evals: Array) -> Spectrum:
    eps = torch.finfo(matrix.stack.dtype).eps
    return Spectrum(np.sort(evals), matrix.N, matrix.M, matrix.rf, eps)


def _rescale_(stack: Tensor, vectors: Tensor, factors: Array, seed: int) -> bool:
    """Multiply the singular values of every slice by `factors`; False, untouched, if not finite."""
    rf, rows, cols = stack.shape
    scaling = torch.from_numpy(factors).to(stack.device).view(rf, 1, -1)
    operator = (vectors * scaling) @ vectors.mT
    weights = stack.to(torch.float64)
    result = weights @ operator if rows >= cols else operator @ weights
    rounded = round_to(result, stack.dtype, seed)
    if not rounded.isfinite().all():
        return False
    stack.copy_(rounded)
    return True


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
