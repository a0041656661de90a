"""`WeightMatrix`: one layer's weights as a stack of matrices, in memory or not, and its name.

Names are the dotted module path ("encoder.0.fc1"), or the parameter's own path where a module holds
several ("attn.in_proj_weight.q"), and are the same for a module, its state dict and its files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ww_train.spectrum import Array, Spectrum
from ww_train.weights.stored import Deferred

NOT_FINITE = "NaN or infinite weights, or squares that overflow"
"""Why a layer whose Gram matrix is not finite is skipped."""

WRAPPER_SEGMENTS = frozenset(
    {
        *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"),
        "base_layer",
    }
)
"""Path segments that compile, FSDP, checkpointing, Lightning and PEFT insert into parameter names."""


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """One layer's weights as a stack of equally shaped matrices that share one spectrum.

    A dense layer is a stack of one. A convolution is one `(out, in)` matrix for each position of its
    kernel, and the eigenvalues of all positions are pooled.

    Attributes:
        name: Dotted path of the layer.
        layer_type: "dense", "embedding", "conv1d", "conv2d", "conv3d", "bilinear", "attention",
            "recurrent" or "expert"; "dense" also where only a 2-D shape is known.
        weights: Weights of shape `(rf, rows, cols)`; where the layer allows it, a view that shares
            storage with the parameter, so that writing to it changes the layer. `Deferred` if they
            are not in memory.
        scale: Factor c; the spectrum is that of `c * stack`.
        read_only: Why the stack must not be written to, or None if it may be.
        parameter: The tensor that the stack shows or was computed from, or None.
        slice_id: Which slice of a layer this is, if not all of it.
    """

    name: str
    layer_type: str
    weights: Tensor | Deferred = field(repr=False)
    scale: float = 1.0
    read_only: str | None = None
    parameter: Tensor | None = field(default=None, repr=False)
    slice_id: int | None = None

    @property
    def stack(self) -> Tensor:
        """The weights; what is not in memory is read, gathered or computed at each access."""
        return self.weights if isinstance(self.weights, Tensor) else self.weights.load()

    def loaded(self) -> WeightMatrix:
        """The same with the weights in memory."""
        return replace(self, weights=self.stack) if self.deferred else self

    def to(self, device: torch.device) -> WeightMatrix:
        """The same on another device, a copy; what is not in memory yet moves when it is."""
        if self.device == device:
            return self
        return replace(self, weights=self.weights.to(device), parameter=None)

    def later(self, device: torch.device) -> WeightMatrix:
        """The same on another device, to which it is copied when it is asked for."""
        if self.deferred:
            return self.to(device)
        weights = Deferred(self.shape, self.dtype, lambda: self.stack.to(device), device)
        return replace(self, weights=weights, parameter=None)

    @property
    def deferred(self) -> bool:
        """Whether the weights are not in memory."""
        return isinstance(self.weights, Deferred)

    @property
    def collective(self) -> bool:
        """Whether all processes must ask for the weights, in the same order."""
        return isinstance(self.weights, Deferred) and self.weights.collective

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the stack."""
        rf, rows, cols = self.weights.shape
        return rf, rows, cols

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the weights are stored."""
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        """Where the stack is, or will be when it is in memory."""
        return self.weights.device

    @property
    def N(self) -> int:
        """Larger dimension of one slice."""
        return max(self.shape[1:])

    @property
    def M(self) -> int:
        """Smaller dimension of one slice, the size of its Gram matrix."""
        return min(self.shape[1:])

    @property
    def rf(self) -> int:
        """Number of slices (the receptive field of a convolution)."""
        return self.shape[0]

    @property
    def num_evals(self) -> int:
        """Number of eigenvalues of the pooled spectrum, `rf * M`."""
        return self.rf * self.M

    @property
    def max_rank(self) -> int:
        """Number of eigenvalues that can be positive: fewer for a product of thin factors."""
        rank = self.weights.rank if isinstance(self.weights, Deferred) else None
        return self.rf * (self.M if rank is None else rank)

    def spectrum(self, evals: Array) -> Spectrum:
        """The pooled spectrum of the layer, or of some of its slices.

        Args:
            evals: Eigenvalues of `scale * stack`, `M` of each slice, in any order and shape.
        """
        eps = torch.finfo(self.dtype).eps
        return Spectrum(np.sort(evals, axis=None), self.N, self.M, evals.size // self.M, eps)


def sharded(matrix: WeightMatrix) -> bool:
    """Whether a matrix is part of a DTensor that can be gathered, changed and written back."""
    weights = matrix.weights
    return not isinstance(weights, Tensor) and weights.collective and weights.view is not None


@dataclass(frozen=True)
class Skipped:
    """A layer that holds a matrix but was not analysed or projected, and why."""

    name: str
    reason: str


def reasons(skipped: Sequence[Skipped], limit: int = 5) -> str:
    """The first reasons as one line, for warnings."""
    texts = [f"{layer.name}: {layer.reason}" for layer in skipped[:limit]]
    if len(skipped) > limit:
        texts.append(f"and {len(skipped) - limit} more")
    return "; ".join(texts) or "the model holds no matrix"


def slices(matrix: WeightMatrix) -> list[WeightMatrix]:
    """Every slice of a layer as a layer of its own, named `layer[i]`; a single slice stays as it is."""
    if matrix.rf == 1:
        return [matrix]
    return [
        replace(matrix, name=f"{matrix.name}[{i}]", weights=_slice(matrix.weights, i), slice_id=i)
        for i in range(matrix.rf)
    ]


def _slice(weights: Tensor | Deferred, i: int) -> Tensor | Deferred:
    return weights[i : i + 1] if isinstance(weights, Tensor) else _deferred_slice(weights, i)


def _deferred_slice(weights: Deferred, i: int) -> Deferred:
    core = weights.core
    return replace(
        weights,
        shape=(1, *weights.shape[1:]),
        load=lambda: weights.load()[i : i + 1],
        core=None if core is None else lambda: core()[i : i + 1],
        relocate=lambda device: _deferred_slice(weights.to(device), i),
    )


def delta(matrix: WeightMatrix, base: WeightMatrix) -> WeightMatrix:
    """The difference of two layers of one shape, exact in float64 on the first one's device."""
    own, other = matrix.stack, base.stack  # what is sharded is gathered before anything can fail
    stack = own.to(torch.float64, copy=True)
    stack -= other.to(stack.device)
    return replace(matrix, weights=stack, read_only="a difference of two models", parameter=None)


def layer_name(parameter: str) -> str:
    """Layer name of a parameter path: wrappers removed, a final `.weight` dropped."""
    segments = [part for part in parameter.split(".") if part not in WRAPPER_SEGMENTS]
    if len(segments) > 2 and segments[0] == "module":  # DistributedDataParallel
        segments = segments[1:]
    if len(segments) > 2 and segments[:2] == ["base_model", "model"]:  # PEFT
        segments = segments[2:]
    if len(segments) > 1 and segments[-1] == "weight":
        segments = segments[:-1]
    return ".".join(segments)
