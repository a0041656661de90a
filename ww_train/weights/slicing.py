"""How a parameter becomes matrices, by the type of the module that owns it or by its shape and name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ww_train.ranks import NO_ROOM, gathered
from ww_train.weights.stored import CheckpointError, Deferred, StoredTensor
from ww_train.weights.weight_matrix import Skipped, WeightMatrix, layer_name


@dataclass(frozen=True, eq=False)
class GroupedTensor(StoredTensor):
    """The weight of a convolution in a file that says how many groups it has."""

    groups: int = 1


def grouped(tensor: StoredTensor, groups: int) -> StoredTensor:
    """The tensor as the weight of a convolution with so many groups."""
    if groups == 1 or tensor.ndim < 3:
        return tensor
    kept = {field.name: getattr(tensor, field.name) for field in fields(StoredTensor)}
    return GroupedTensor(**kept, groups=groups)


CONV_SCALE = math.sqrt(0.5)
"""Factor on every slice of a convolution: WeightWatcher's `conv2d_norm` for a pooled spectrum."""


def of_parameter(
    parameter: str,
    tensor: Tensor | StoredTensor,
    owner: nn.Module | None = None,
    *,
    siblings: Mapping[str, object] | None = None,
    read_only: str | None = None,
) -> Iterator[WeightMatrix | Skipped]:
    """The matrices of one parameter, sliced by the type of the module that owns it.

    | owner | matrices | layers |
    |---|---|---|
    | Linear, Embedding, Hugging Face Conv1D, any 2-D | the weight | 1 |
    | Conv1d/2d/3d, transposed, grouped | `(out/g, in/g)` per kernel position and group | 1 |
    | Bilinear | `(in1, in2)` per output | 1 |
    | MultiheadAttention `in_proj_weight` | query, key, value | 3 |
    | RNN, LSTM, GRU | one `(hidden, in)` per gate | 1, 4, 3 |
    | any other 3-D parameter (fused experts) | one per leading index | many |

    Without an owner the shape and the name decide: 4-D and 5-D are convolutions, 3-D is Conv1d if
    its name ends in "weight" and experts otherwise. Groups are known of modules, and of ONNX, Keras
    and export archives, which hold the program. State dicts, safetensors and GGUF do not say them: a
    grouped convolution is taken for a plain one of fewer inputs, with other eigenvalues.

    Args:
        parameter: Full path of the parameter.
        tensor: Its value, which is not read here if it is in a file, nor gathered if it is sharded.
        owner: The module that holds it, if known.
        siblings: The state dict it comes from, if any (tells the gates of recurrent layers).
        read_only: Passed on to the matrices.
    """
    name = layer_name(parameter)
    if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
        yield Skipped(name, "not initialised yet (lazy module: run one forward pass first)")
        return
    if tensor.ndim < 2 or parameter.rpartition(".")[2] == "bias":
        return
    if isinstance(owner, nn.LayerNorm | nn.RMSNorm):
        yield Skipped(name, "a normalisation over several dimensions is no matrix")
        return
    if isinstance(tensor, StoredTensor):
        found = _of_stored(parameter, tensor, siblings)
    elif hasattr(tensor, "full_tensor"):  # a DTensor
        found = _of_sharded(parameter, tensor, owner, siblings)
    else:
        found = _of_tensor(parameter, tensor, owner, siblings, read_only)
    for matrix in found:
        if isinstance(matrix, WeightMatrix) and _vectors(matrix):
            reason = f"its {matrix.rf} slices are vectors (depthwise, or one channel)"
            yield Skipped(name, reason)
        else:
            yield matrix


def _vectors(matrix: WeightMatrix) -> bool:
    return matrix.layer_type.startswith("conv") and matrix.rf > 1 and matrix.M == 1


def _of_tensor(
    parameter: str,
    tensor: Tensor,
    owner: nn.Module | None,
    siblings: Mapping[str, object] | None,
    read_only: str | None,
) -> Iterator[WeightMatrix | Skipped]:
    name, original = layer_name(parameter), tensor
    if tensor.is_quantized or type(tensor) not in _PLAIN:
        with suppress(RuntimeError, NotImplementedError, AttributeError):  # _unusable says so
            tensor, read_only = tensor.dequantize(), "quantised"
    reason = "on the meta device: it has a shape but no values" if tensor.is_meta else None
    reason = reason or _unusable(tensor)
    if reason is not None:
        yield Skipped(name, reason)
        return
    for label, kind, stack, scale in _stacks(parameter, tensor.detach(), owner, siblings):
        locked = read_only
        if stack.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            locked = locked or "its memory layout has no view as a stack of matrices"
        yield WeightMatrix(f"{name}{label}", kind, stack, scale, locked, original)


def _of_stored(
    parameter: str, tensor: StoredTensor, siblings: Mapping[str, object] | None
) -> Iterator[WeightMatrix | Skipped]:
    like = tensor.like()
    reason = _unusable(like)
    if reason is not None:
        yield Skipped(layer_name(parameter), reason)
        return
    locked = tensor.read_only or "in a file"
    groups = tensor.groups if isinstance(tensor, GroupedTensor) else 1

    def copied(index: int) -> Tensor:
        stacks = _stacks(parameter, tensor.part(like), None, siblings, groups)
        return next(islice(stacks, index, None))[2]

    for i, (label, kind, view, scale) in enumerate(
        _stacks(parameter, like, None, siblings, groups)
    ):
        load = partial(tensor.part, view) if view._base is like else partial(copied, i)
        weights = Deferred(_shape(view), tensor.dtype, load)
        yield WeightMatrix(f"{layer_name(parameter)}{label}", kind, weights, scale, locked)


def _of_sharded(
    parameter: str,
    tensor: Any,
    owner: nn.Module | None,
    siblings: Mapping[str, object] | None,
) -> Iterator[WeightMatrix | Skipped]:
    like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    reason = _unusable(like)
    if reason is not None:
        yield Skipped(layer_name(parameter), reason)
        return

    def part(index: int) -> Tensor:
        whole = gathered(tensor)
        if whole is None:
            raise CheckpointError(NO_ROOM)
        stacks = _stacks(parameter, whole, owner, siblings)
        return next(islice(stacks, index, None))[2]

    for i, (label, kind, view, scale) in enumerate(_stacks(parameter, like, owner, siblings)):
        load = partial(part, i)
        weights = Deferred(
            _shape(view),
            tensor.dtype,
            load,
            tensor.device,
            collective=True,
            view=view if view._base is like else None,
        )
        name = f"{layer_name(parameter)}{label}"
        yield WeightMatrix(name, kind, weights, scale, "sharded over processes", tensor)


def _shape(stack: Tensor) -> tuple[int, int, int]:
    rf, rows, cols = stack.shape
    return rf, rows, cols


def _stacks(
    parameter: str,
    tensor: Tensor,
    owner: nn.Module | None,
    siblings: Mapping[str, object] | None,
    groups: int = 1,
) -> Iterator[tuple[str, str, Tensor, float]]:
    """Suffix of the name, layer type, stack of slices and scale of each matrix of a parameter."""
    last = parameter.rpartition(".")[2]
    if _is_conv(tensor, owner, last):
        groups = owner.groups if isinstance(owner, nn.modules.conv._ConvNd) else groups
        # (g * out, in, *kernel) -> (g, out, in, positions) -> (positions * g, out, in)
        kernels = tensor.flatten(2)
        kernels = kernels.view(groups, -1, *kernels.shape[1:])
        slices = kernels.permute(3, 0, 1, 2)
        yield "", f"conv{tensor.ndim - 2}d", slices.flatten(0, 1), CONV_SCALE
    elif last == "in_proj_weight" and tensor.ndim == 2 and tensor.shape[0] == 3 * tensor.shape[1]:
        for part, matrix in zip("qkv", tensor.chunk(3), strict=True):
            yield f".{part}", "attention", matrix[None], 1.0
    elif tensor.ndim == 2 and (hidden := _hidden_size(parameter, owner, siblings)):
        gates = _GATES[tensor.shape[0] // hidden]
        for gate, matrix in zip(gates, torch.split(tensor, hidden), strict=True):
            yield f".{gate}" if len(gates) > 1 else "", "recurrent", matrix[None], 1.0
    elif tensor.ndim == 2:
        yield "", "dense", tensor[None], 1.0
    elif tensor.ndim == 3 and isinstance(owner, nn.Bilinear):
        yield "", "bilinear", tensor, 1.0
    else:
        experts = tensor.flatten(0, -3)
        for index, matrix in enumerate(experts):
            yield f".{index}", "expert", matrix[None], 1.0


_GATES = {1: "h", 3: "rzn", 4: "ifgo"}
"""Gates of RNN, GRU and LSTM in the order in which torch stacks them."""


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
"""Types whose values are the weights; subclasses may hold shards, codes or anything."""


def _unusable(tensor: Tensor) -> str | None:
    """Why a tensor's values are not weights that can be read, or None."""
    if tensor.layout is not torch.strided:
        return f"stored as {tensor.layout}"
    if tensor.is_quantized or not (tensor.is_floating_point() or tensor.is_complex()):
        return f"quantised or integer codes ({tensor.dtype})"
    if tensor.is_complex():
        return f"complex weights ({tensor.dtype})"
    if type(tensor) not in _PLAIN:
        return f"held by a tensor subclass ({type(tensor).__name__})"
    if tensor.numel() == 0:
        return f"empty: shape {tuple(tensor.shape)}"
    return None


def _is_conv(tensor: Tensor, owner: nn.Module | None, last: str) -> bool:
    if isinstance(owner, nn.modules.conv._ConvNd):
        return tensor.ndim > 2
    if owner is not None or not last.endswith("weight"):
        return False
    return 3 <= tensor.ndim <= 5


def _hidden_size(
    parameter: str, owner: nn.Module | None, siblings: Mapping[str, object] | None
) -> int | None:
    """Rows of one gate if the parameter belongs to a recurrent layer; projections have no gates."""
    prefix, _, last = parameter.rpartition(".")
    if not last.startswith(("weight_ih", "weight_hh")):
        return None
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        return owner.hidden_size
    if siblings is None:
        return None
    # h -> gates has `hidden` columns; with projections (LSTM proj_size) that cannot be told here
    partner = last.replace("_ih", "_hh")
    recurrent = siblings.get(f"{prefix}.{partner}" if prefix else partner)
    if not isinstance(recurrent, Tensor | StoredTensor) or recurrent.ndim != 2:
        return None
    rows, hidden = recurrent.shape
    return hidden if rows in (hidden, 3 * hidden, 4 * hidden) else None
