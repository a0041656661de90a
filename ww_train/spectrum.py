"""The spectrum (ESD) of a layer and what follows from it alone: norms, ranks, entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

EPS32 = float(np.finfo(np.float32).eps)
EPS64 = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of WᵀW of one layer, with the numbers that depend on nothing else.

    Attributes:
        evals: `(rf * M,)` eigenvalues, ascending, at least zero, not divided by N.
        N: Larger dimension of one slice.
        M: Smaller dimension of one slice.
        rf: Number of slices pooled.
        eps: Machine epsilon of the dtype in which the weights are stored; 0 if nothing is rounding.

    All logarithms are base 10 except in `entropy`, as in WeightWatcher.
    """

    evals: Array = field(repr=False)
    N: int
    M: int
    rf: int = 1
    eps: float = EPS64

    @property
    def Q(self) -> float:
        """Aspect ratio N/M, at least 1."""
        return self.N / self.M

    @property
    def _stored(self) -> float:
        """Squared spectral norm of the rounding of the entries, a random matrix of `eps * rms(W)`.

        `eps² * mean(lambda) * (sqrt(N) + sqrt(M))² / N` (Bai-Yin edge).
        """
        edge = (math.sqrt(self.N) + math.sqrt(self.M)) ** 2 / self.N
        return self.eps**2 * float(self.evals.mean()) * edge

    @property
    def floor(self) -> float:
        """Eigenvalue up to which eigenvalues are rounding; proportional to the weights' scale.

        What storing the entries adds, or what the float64 Gram matrix resolves, `M * eps64 *
        lambda_max`, whichever is larger.
        """
        if self.eps == 0.0:
            return 0.0
        return max(self._stored, self.M * EPS64 * self.lambda_max)

    @property
    def resolution(self) -> float:
        """Relative difference below which two of the largest eigenvalues may be equal but rounded.

        A perturbation E of W moves an eigenvalue by up to `2 sqrt(lambda) ||E||`; rounding to the
        nearest is `1/sqrt(12)` of the spacing. Weights of 32 bits and fewer were computed in float32
        at best, which costs some 16 units in the last place (an orthogonal initialisation, by QR).
        """
        if self.eps == 0.0:
            return 0.0
        stored = math.sqrt(self._stored / self.lambda_max / 3.0)
        return max(stored, 16.0 * min(self.eps, EPS32), self.M * EPS64)

    @property
    def positive(self) -> Array:
        """Eigenvalues above the rounding floor, ascending."""
        return self.evals[self.evals > self.floor]

    def inverse(self) -> Spectrum:
        """Spectrum of the (pseudo-)inverse: 1/lambda of the eigenvalues above the rounding floor."""
        return replace(self, evals=1.0 / self.positive[::-1], eps=0.0)

    @property
    def lambda_max(self) -> float:
        """Largest eigenvalue: the squared spectral norm."""
        return float(self.evals[-1])

    @property
    def sv_max(self) -> float:
        """Largest singular value."""
        return math.sqrt(self.lambda_max)

    @property
    def sv_min(self) -> float:
        """Smallest singular value over all slices."""
        return math.sqrt(float(self.evals[0]))

    @property
    def norm(self) -> float:
        """Sum of the eigenvalues: the squared Frobenius norm (WeightWatcher's `norm`)."""
        return float(self.evals.sum())

    @property
    def log_norm(self) -> float:
        """log10 of `norm`."""
        return math.log10(self.norm)

    @property
    def log_spectral_norm(self) -> float:
        """log10 of `lambda_max`."""
        return math.log10(self.lambda_max)

    @property
    def stable_rank(self) -> float:
        """Sum of the eigenvalues over the largest."""
        return self.norm / self.lambda_max

    @property
    def matrix_rank(self) -> int:
        """Number of eigenvalues above the rounding floor of the stored dtype."""
        return len(self.positive)

    @property
    def rank_loss(self) -> int:
        """Number of eigenvalues that are rounding."""
        return len(self.evals) - self.matrix_rank

    def weak_rank_loss(self, tolerance: float = 1e-6) -> int:
        """Number of eigenvalues below `tolerance * lambda_max`.

        Relative, where WeightWatcher 0.7.7 compares with an absolute 1e-6.
        """
        return int(np.count_nonzero(self.evals < tolerance * self.lambda_max))

    @property
    def entropy(self) -> float:
        """Matrix entropy `-sum p ln p / ln rank`, p = lambda / sum; in [0, 1], 0 for rank one."""
        p = self.positive / self.norm
        if len(p) < 2:
            return 0.0
        return float(-(p * np.log(p)).sum() / math.log(len(p)))

    def log_alpha_norm(self, alpha: float) -> float:
        """log10 of the Schatten norm `sum lambda^alpha`, computed without overflow."""
        exponents = alpha * np.log(self.positive)
        top = exponents.max()
        return float((top + np.log(np.exp(exponents - top).sum())) / math.log(10))

    def normalized(self) -> Array:
        """Eigenvalues divided by their mean, the scale of the ERG condition."""
        normalized: Array = self.evals / self.evals.mean()
        return normalized
