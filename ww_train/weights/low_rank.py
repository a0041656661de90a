"""One low-rank update `scaling * B A`: its product, its core, and what DoRA makes of it.

Of its eigenvalues at most r are positive; they are those of an r x r product, so that nothing of the
layer's size is decomposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ww_train.weights.slicing import CONV_SCALE
from ww_train.weights.stored import CPU, Deferred
from ww_train.weights.weight_matrix import Skipped, WeightMatrix

SUFFIX = ".lora"
"""What the name of an update has more than that of its layer."""

READ_ONLY = "a LoRA update: its factors are trained, not their product"

DORA = (
    "DoRA: the update depends on the weights of the base; "
    "use ww_train.merge(base, adapter), ww-train analyze BASE --adapter ADAPTER, "
    "or a copy after peft's merge_and_unload()"
)


@dataclass(frozen=True, eq=False)
class Factors:
    """The two factors of one update and how they are applied.

    Attributes:
        A: Makes the `(rf, r, in)` factor on a device.
        B: Makes the `(out, r)` factor.
        shape: `(rf, out, in)` of the product.
        rank: r.
        kind: Layer type: "dense", "embedding" or a convolution.
        dtype: In which the factors are stored.
        scaling: Factor on the product.
        transposed: Whether the layer's weight is `(in, out)`.
        device: Where they are to be multiplied.
        collective: Whether they are sharded over processes.
    """

    A: Callable[[torch.device], Tensor]
    B: Callable[[torch.device], Tensor]
    shape: tuple[int, int, int]
    rank: int
    kind: str
    dtype: torch.dtype
    scaling: float = 1.0
    transposed: bool = False
    device: torch.device = CPU
    collective: bool = False

    def product(self) -> Tensor:
        """`scaling * B A` in float64, `(rf, out, in)`, or `(rf, in, out)` if transposed."""
        B, A = self.B(self.device), self.A(self.device)  # gathered before anything can fail
        update = B.to(torch.float64) @ A.to(torch.float64)
        update *= self.scaling
        return update.mT if self.transposed else update

    def core(self) -> Tensor:
        """`scaling * R_B R_Aᵀ` in float64: `(rf, k, k)`, k at most r, of the same singular values.

        From the QR decompositions `B = Q_B R_B` and `Aᵀ = Q_A R_A`.
        """
        B, A = self.B(self.device), self.A(self.device)
        R_B = torch.linalg.qr(B.to(torch.float64), mode="r").R
        R_A = torch.linalg.qr(A.to(torch.float64).mT, mode="r").R
        core: Tensor = self.scaling * (R_B @ R_A.mT)
        return core

    def deferred(self) -> Deferred:
        """The product, multiplied out when it is asked for, where the factors are."""
        rf, out, inner = self.shape
        return Deferred(
            (rf, inner, out) if self.transposed else self.shape,
            self.dtype,
            self.product,
            self.device,
            self.collective,
            rank=min(self.rank, out, inner),
            core=self.core,
            relocate=lambda device: replace(self, device=device).deferred(),
        )

    def matrix(self, layer: str) -> WeightMatrix:
        """The update of a layer."""
        scale = CONV_SCALE if self.kind.startswith("conv") else 1.0
        return WeightMatrix(f"{layer}{SUFFIX}", self.kind, self.deferred(), scale, READ_ONLY)


@dataclass(frozen=True, eq=False)
class DoraUpdate(Skipped):
    """An update of DoRA: nothing to measure without the base, but it can be merged.

    The merged weights have the direction of base plus update, and for each output a size of their own.

    Attributes:
        update: The product of the factors.
        sizes: Makes the `(out,)` norms of the merged outputs.
        transposed: Whether the layer's weight is `(in, out)`.
    """

    update: WeightMatrix = field(repr=False)
    sizes: Callable[[], Tensor] = field(repr=False)
    transposed: bool

    def resized(self, total: Tensor) -> Tensor:
        """Base plus update `(rf, rows, cols)` with each output, over all its inputs, of its size."""
        outputs = total.mT if self.transposed else total
        norms = outputs.square().sum((0, 2)).sqrt()
        outputs *= (self.sizes().to(norms) / norms)[:, None]
        return total

    def __reduce__(self) -> tuple[type[Skipped], tuple[str, str]]:
        """Pickled in a report it is a skipped layer as others are."""
        return Skipped, (self.name, self.reason)


def positions(A: Tensor) -> Tensor:
    """The factor A of a convolution as one matrix for each position of the kernel."""
    return A.flatten(2).permute(2, 0, 1) if A.ndim > 2 else A[None]


def kind_of(ndim: int, embedding: bool) -> str:
    """Layer type of an update whose factor A has so many dimensions."""
    return f"conv{ndim - 2}d" if ndim > 2 else "embedding" if embedding else "dense"
