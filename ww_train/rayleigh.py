"""The eigenvalues of WᵀW after a small change of W, from the eigenvectors before it.

In the old eigenvectors V the matrix A = Vᵀ Wᵀ W V is nearly diagonal. Its diagonal, the Rayleigh
quotients, are the squared column norms of one product, W V. They miss what is of second order in the
rotation of the eigenvectors: that the eigenvalues of each pair repel each other. For a pair alone it
is `2 a_ij² / (|d| + sqrt(d² + 4 a_ij²))`, d the difference of their quotients (Jacobi's rotation);
summed over all partners that is second-order perturbation theory without its poles.

What is certain: the quotients have the trace of WᵀW and are majorised by its eigenvalues (Schur-Horn);
sorted alike, their distance is at most the norm of the off-diagonal part (Hoffman and Wielandt).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ww_train.linalg import gram, symmetric_eigenvectors


@dataclass(frozen=True, eq=False)
class Basis:
    """Eigenvectors of the slices of a layer, to be used again.

    Attributes:
        vectors: `(rf, M, M)`, the eigenvectors in columns times `scale`, in the precision of products.
        scale: One over the root mean square singular value: products neither overflow nor vanish.
    """

    vectors: Tensor
    scale: float

    def fits(self, stack: Tensor) -> bool:
        """Whether a stack could be a later state of the one that this was computed from."""
        rf, rows, cols = stack.shape
        same = self.vectors.shape == (rf, min(rows, cols), min(rows, cols))
        return same and self.vectors.device == stack.device


def eigenbasis(stack: Tensor) -> Basis | None:
    """The eigenvectors of the shorter side in float32; the quotients err less than they do.

    Args:
        stack: `(rf, rows, cols)` weights of any floating dtype.

    Returns:
        The basis; None if the weights are not finite or all zero, or the eigensolver fails.

    Cost: `2 N M²` float64 and about `9 M³` float32 operations a slice, on the device of the weights;
    two synchronisations.
    """
    grams = gram(stack)
    mean = float(grams.diagonal(dim1=1, dim2=2).mean())
    if not 0.0 < mean < math.inf:
        return None
    try:
        vectors = symmetric_eigenvectors((grams / mean).to(torch.float32))[1]
    except RuntimeError:  # no convergence, or no memory
        return None
    scale = 1.0 / math.sqrt(mean)
    return Basis(vectors.to(_precision(stack.device)) * scale, scale)


def in_basis(stack: Tensor, basis: Basis) -> Tensor:
    """The product W V, scaled by `basis.scale`.

    Args:
        stack: `(rf, rows, cols)` weights that `basis.fits`.
        basis: Eigenvectors of earlier weights.

    Returns:
        `(rf, N, M)` on the device of the weights.

    Cost: `2 N M²` operations a slice in float32, or float64 where float32 products are rounded further
    (an accelerator's TF32, a CPU's bfloat16). No synchronisation.
    """
    tall = stack if stack.shape[1] >= stack.shape[2] else stack.mT
    return tall.to(basis.vectors.dtype) @ basis.vectors


def rayleigh_quotients(product: Tensor) -> Tensor:
    """Rayleigh quotients `(rf, M)` in float64, in the order of the basis, from `in_basis`."""
    return product.square().sum(dim=1, dtype=torch.float64)


def repulsion(product: Tensor, quotients: Tensor, chosen: Tensor) -> Tensor:
    """What the quotients of some eigenvalues of one slice miss, to second order.

    Args:
        product: `(N, M)` from `in_basis`.
        quotients: `(M,)`, its Rayleigh quotients.
        chosen: `(k,)` positions in the basis.

    Returns:
        `(k,)` float64: the eigenvalues minus the quotients.

    Cost: `2 N M k` operations in the precision of the product; no synchronisation.
    """
    off = product[:, chosen].mT @ product
    off[torch.arange(len(chosen), device=off.device), chosen] = 0.0
    levels = quotients.to(off.dtype)
    distance = levels[chosen, None] - levels
    squares = off.square_()
    reach = (distance.square() + 4.0 * squares).sqrt_() + distance.abs()
    pairs = 2.0 * squares / reach.clamp_min_(torch.finfo(off.dtype).tiny)
    return pairs.copysign_(distance).sum(dim=1, dtype=torch.float64)


def _precision(device: torch.device) -> torch.dtype:
    """The cheapest precision in which products are good to float32's rounding."""
    if device.type != "cpu":
        return torch.float64
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch's old and new settings are mixed
        exact = False
    return torch.float32 if exact else torch.float64
