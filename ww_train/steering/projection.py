"""Projections of a layer's weights: what to change, given how strongly.

A projection is any object with `project_(matrix, strength)`. It writes through the view that a
`WeightMatrix` is, in place and only finite values, and returns what it did or why it did nothing.
Those that change singular values and keep singular vectors derive from `SpectralProjection` and need
only say where the eigenvalues go.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ww_train.erg import erg_tail
from ww_train.linalg import all_finite, gram, symmetric_eigenvectors
from ww_train.power_law import SMALL_N, PowerLawFit, fit_power_law
from ww_train.spectrum import EPS64, Array, Spectrum
from ww_train.steering.rounding import round_to
from ww_train.weights.matrices import NOT_FINITE, Skipped, WeightMatrix, of_parameter

Operator: TypeAlias = Callable[[Tensor], Tensor]
"""What was done to the weights, `(rf, rows, cols)` to the same shape in float64, linear."""


@dataclass(frozen=True, eq=False)
class Projected:
    """What a projection did to one layer.

    Attributes:
        name: Dotted path of the layer.
        strength: How far it went, 0 to 1.
        distance: Relative Frobenius distance from the weights to the target before the step: for
            the critical manifold the "distance to criticality".
        tail_size: Number k of eigenvalues in the target's tail; None if it has none.
        before: Spectrum before; None if it was not computed.
        after: Spectrum after, without another decomposition; None if it was not computed.
    """

    name: str
    strength: float
    distance: float
    tail_size: int | None = None
    before: Spectrum | None = None
    after: Spectrum | None = None

    @cached_property
    def fit(self) -> PowerLawFit | None:
        """Power law of the tail after the step."""
        return fit_power_law(self.after.positive) if self.after else None

    @property
    def alpha(self) -> float | None:
        """Power-law exponent after the step."""
        return self.fit.alpha if self.fit else None

    @property
    def ERG_gap(self) -> int | None:
        """ERG gap after the step."""
        return erg_tail(self.after, self.fit).ERG_gap if self.after else None


class Projection(Protocol):
    """What `WWPGD` needs of a projection."""

    def project_(self, matrix: WeightMatrix, strength: float) -> Projected | Skipped:
        """Move the weights of `matrix` in place by `strength` (0 to 1) of the way to the target."""
        ...


@dataclass(frozen=True, eq=False)
class Move:
    """Where the eigenvalues of a layer go in one step.

    Attributes:
        evals: `(n,)` new eigenvalues, descending, in the order of the old ones; zero stays zero.
        distance: Relative Frobenius distance from the weights to the target, before the step.
        tail_size: Number of eigenvalues in the target's tail.
    """

    evals: Array
    distance: float
    tail_size: int


class SpectralProjection(ABC):
    """A projection that changes the singular values of a layer and keeps its singular vectors.

    `W' = W V diag(sigma' / sigma) Vᵀ`: one eigendecomposition of the smaller Gram matrix and two
    products, all in float64. The slices of a convolution have one pooled spectrum. Weights of 16 bits
    are rounded stochastically (`ww_train.steering.rounding`), or small steps would be lost.
    """

    min_evals: int = SMALL_N

    @abstractmethod
    def move(self, spectrum: Spectrum, strength: float) -> Move | str:
        """Where the eigenvalues go by a step of `strength`, or why they cannot go anywhere."""

    @torch.no_grad()
    def project_(
        self,
        matrix: WeightMatrix | Tensor,
        strength: float = 1.0,
        *,
        then: Callable[[Operator], object] | None = None,
    ) -> Projected | Skipped:
        """Move the weights in place towards the target.

        Args:
            matrix: A layer's matrix, or any floating-point tensor of shape `(rows, cols)`.
            strength: 0 (stay) to 1 (arrive).
            then: Called, if the weights have changed, with the linear operator that was applied.

        Returns:
            What was done; or `Skipped`, the weights untouched, if the matrix is read-only, zero, not
            finite, too small, or has no target.

        Raises:
            TypeError: If it is neither.
            ValueError: If strength is not in 0..1 or the tensor is not two-dimensional.
            torch.linalg.LinAlgError: If the decomposition does not converge; weights untouched.

        Cost: one `eigh` of M x M, `2 M³ + 2 N M²` operations in float64 on the weights' device; two
        copies of M numbers between device and host, three synchronisations.
        """
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength must be between 0 and 1, got {strength}")
        found = _as_matrix(matrix)
        if isinstance(found, Skipped):
            return found
        refusal = self.refusal(found)
        if refusal:
            return Skipped(found.name, refusal)
        grams = gram(found.stack, found.scale)
        if not all_finite(grams):
            return Skipped(found.name, NOT_FINITE)
        return self.apply_(found, strength, *symmetric_eigenvectors(grams), then=then)

    def refusal(self, matrix: WeightMatrix) -> str | None:
        """Why a layer is left alone, as far as that can be known without decomposing it."""
        if matrix.read_only:
            return matrix.read_only
        if matrix.num_evals < self.min_evals:
            return f"{matrix.num_evals} eigenvalues, fewer than min_evals={self.min_evals}"
        return None

    def apply_(
        self,
        matrix: WeightMatrix,
        strength: float,
        evals: Tensor,
        vectors: Tensor,
        *,
        then: Callable[[Operator], object] | None = None,
    ) -> Projected | Skipped:
        """The step, given the `(rf, M)` eigenvalues and `(rf, M, M)` vectors of the Gram matrices."""
        host = evals.clamp_min(0.0).flatten().cpu().numpy()
        order = np.argsort(host)[::-1]
        before = matrix.spectrum(host)
        if before.norm == 0.0:
            return Skipped(matrix.name, "all weights are zero")
        move = self.move(before, strength)
        if isinstance(move, str):
            return Skipped(matrix.name, move)
        factors = np.zeros(len(host))
        old = host[order]
        np.divide(move.evals, old, out=factors, where=(old > 0.0) & (move.evals > 0.0))
        factors[order] = np.sqrt(factors)
        rest = float(factors[order[before.matrix_rank - 1]])
        operator = _scaling(vectors, factors.reshape(evals.shape), rest)
        seed = zlib.crc32(host.tobytes())
        rounded = round_to(operator(matrix.stack), matrix.stack.dtype, seed)
        if not all_finite(rounded):
            return Skipped(matrix.name, f"the result would overflow {matrix.stack.dtype}")
        matrix.stack.copy_(rounded)
        if then is not None:
            then(operator)
        after = matrix.spectrum(move.evals)
        return Projected(matrix.name, strength, move.distance, move.tail_size, before, after)


def _scaling(vectors: Tensor, factors: Array, rest: float) -> Operator:
    """Multiplication of singular values: `rest W + W V diag(factors - rest) Vᵀ`, for a tall W.

    Most of a bulk is scaled by one number, so that only the vectors of the others enter the products.

    Args:
        vectors: `(rf, M, M)` singular vectors of the shorter side, as columns.
        factors: `(rf, M)` one factor for each.
        rest: The factor of most of them.
    """
    other = np.flatnonzero((np.abs(factors - rest) > 8.0 * EPS64 * rest).any(axis=0))
    chosen = vectors[..., torch.from_numpy(other).to(vectors.device)]
    change = torch.from_numpy(factors[:, None, other] - rest).to(vectors.device)

    def operator(stack: Tensor) -> Tensor:
        own = stack.to(vectors.device, torch.float64, copy=True)
        if own.shape[1] >= own.shape[2]:
            return own.baddbmm_((own @ chosen).mul_(change), chosen.mT, beta=rest)
        # V diag Vᵀ W: the layout stays, a transposed copy costs half as much as the products
        return own.baddbmm_(chosen, (chosen.mT @ own).mul_(change.mT), beta=rest)

    return operator


def _as_matrix(matrix: WeightMatrix | Tensor) -> WeightMatrix | Skipped:
    if isinstance(matrix, Tensor):
        if matrix.ndim != 2:
            raise ValueError(f"expected a matrix, got a tensor of shape {tuple(matrix.shape)}")
        return next(of_parameter("W", matrix))
    if not isinstance(matrix, WeightMatrix):
        raise TypeError(f"expected a WeightMatrix or a Tensor, got {type(matrix).__name__}")
    return matrix
