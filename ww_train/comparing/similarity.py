"""How alike two matrices are, whatever their scale: linear CKA, and the overlap of their tails.

A layer of several slices counts as the block-diagonal matrix of them, whose spectrum is the pooled
one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ww_train.linalg import gram, symmetric_eigenvectors
from ww_train.spectrum import EPS64, Spectrum
from ww_train.weights.matrices import WeightMatrix


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Linear CKA of two stacks as block-diagonal matrices, rows as examples, columns as features.

    `||AᵀB||_F² / (||AᵀA||_F ||BᵀB||_F)` over all slices; equal to `<AAᵀ, BBᵀ>` in the numerator, which
    is used where a slice is wider than high. Not centred.

    Args:
        a: `(rf, rows, cols)` float64, not all zero.
        b: Of the same shape.
    """
    if a.shape[-2] < a.shape[-1]:
        k, l = a @ a.mT, b @ b.mT  # noqa: E741
        alignment = (k * l).sum()
    else:
        k, l = a.mT @ a, b.mT @ b  # noqa: E741
        alignment = (a.mT @ b).square().sum()
    norm = torch.linalg.vector_norm(k) * torch.linalg.vector_norm(l)
    return unit(float(alignment / norm))


def centred_cka(a: Tensor, b: Tensor) -> float | None:
    """Linear CKA after the mean of every column of every slice is taken off; None if rows are equal."""
    centred = []
    for x in (a, b):
        deviations = x - x.mean(dim=1, keepdim=True)
        norm = float(torch.linalg.vector_norm(deviations))
        if norm <= 16.0 * EPS64 * float(torch.linalg.vector_norm(x)):  # the rounding of the means
            return None
        centred.append(deviations / norm)
    return linear_cka(*centred)


def unit(value: float) -> float:
    """A cosine, or its square, that rounding has not carried beyond one."""
    return min(max(value, -1.0), 1.0)


@dataclass(frozen=True, eq=False)
class Decomposed:
    """A stack of weights with the eigenvectors of its Gram matrices.

    Attributes:
        stack: `(rf, rows, cols)` float64 weights.
        evals: `(rf, M)` eigenvalues, ascending in each slice.
        vectors: `(rf, M, M)` eigenvectors of the shorter side, as columns.
        spectrum: All eigenvalues.
    """

    stack: Tensor
    evals: Tensor
    vectors: Tensor
    spectrum: Spectrum

    @classmethod
    def of(cls, stack: Tensor, matrix: WeightMatrix) -> Decomposed:
        """Decompose the float64 weights of a layer, which may have been scaled."""
        evals, vectors = symmetric_eigenvectors(gram(stack))
        evals = evals.clamp_min(0.0)
        return cls(stack, evals, vectors, matrix.spectrum(evals.cpu().numpy()))

    def tail(self, k: int) -> list[tuple[Tensor, Tensor]]:
        """Left and right singular vectors of each slice, of the k largest eigenvalues of all slices.

        Fewer if the others are rounding: those have no vectors of the longer side.
        """
        k = min(k, len(self.spectrum.positive))
        flat = self.evals.flatten()
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[torch.topk(flat, k).indices] = True
        pairs = []
        for w, evals, vectors, mask in zip(
            self.stack, self.evals, self.vectors, chosen.view_as(self.evals), strict=True
        ):
            short = vectors[:, mask]
            svals = evals[mask].sqrt()
            tall = w.shape[0] >= w.shape[1]
            long = (w if tall else w.mT) @ short / svals
            pairs.append((long, short) if tall else (short, long))
        return pairs


def tail_overlaps(a: Decomposed, b: Decomposed, k: int) -> tuple[float, float]:
    """Mean squared cosines of the principal angles between the spaces of the k largest eigenvalues.

    `||UᵀU'||_F² / k` of the left and of the right singular vectors (Bjorck and Golub, Mathematics of
    Computation 27 (1973) 579, for the angles). Directions that b lacks count as orthogonal.

    Args:
        a: A layer of rank k at least.
        b: Another of the same shape.
        k: Size of the tails.
    """
    shared = [
        torch.stack([(x.mT @ y).square().sum() for x, y in zip(pa, pb, strict=True)])
        for pa, pb in zip(a.tail(k), b.tail(k), strict=True)
    ]
    left, right = (torch.stack(shared).sum(dim=0) / k).tolist()
    return unit(left), unit(right)
