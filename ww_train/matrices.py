"""Which weights are matrices, and how: models, state dicts and arrays become `WeightMatrix` views.

Names are the dotted module path ("encoder.0.fc1"), or the parameter's own path where a module holds
several ("attn.in_proj_weight.q"), and are the same for a module and for its state dict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ww_train.effective import COMPUTED_FROM, own_weights

Source: TypeAlias = "nn.Module | Mapping[str, Tensor] | Tensor | np.ndarray"

CONV_SCALE = math.sqrt(0.5)
"""Factor on every slice of a convolution: WeightWatcher's `conv2d_norm` for a pooled spectrum."""

CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model")
"""Keys under which people save the state dict in a checkpoint."""

WRAPPER_SEGMENTS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
"""Path segments that compile, FSDP, checkpointing and Lightning insert into parameter names."""


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """One layer's weights as a stack of equally shaped matrices that share one spectrum.

    A dense layer is a stack of one. A convolution is one `(out, in)` matrix for each position of its
    kernel, and the eigenvalues of all positions are pooled.

    Attributes:
        name: Dotted path of the layer.
        layer_type: "dense", "embedding", "conv1d", "conv2d", "conv3d", "bilinear", "attention",
            "recurrent" or "expert"; "dense" also where only a 2-D shape is known.
        stack: Weights of shape `(rf, rows, cols)`; where the layer allows it, a view that shares
            storage with the parameter, so that writing to it changes the layer.
        scale: Factor c; the spectrum is that of `c * stack`.
        read_only: Why the stack must not be written to, or None if it may be.
        parameter: The tensor that the stack shows or was computed from, or None.
        slice_id: Which slice of a layer this is, if not all of it.
    """

    name: str
    layer_type: str
    stack: Tensor = field(repr=False)
    scale: float = 1.0
    read_only: str | None = None
    parameter: Tensor | None = field(default=None, repr=False)
    slice_id: int | None = None

    @property
    def N(self) -> int:
        """Larger dimension of one slice."""
        return max(self.stack.shape[-2:])

    @property
    def M(self) -> int:
        """Smaller dimension of one slice, the size of its Gram matrix."""
        return min(self.stack.shape[-2:])

    @property
    def rf(self) -> int:
        """Number of slices (the receptive field of a convolution)."""
        return self.stack.shape[0]

    @property
    def num_evals(self) -> int:
        """Number of eigenvalues of the pooled spectrum, `rf * M`."""
        return self.rf * self.M


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
        replace(matrix, name=f"{matrix.name}[{i}]", stack=matrix.stack[i : i + 1], slice_id=i)
        for i in range(matrix.rf)
    ]


def delta(matrix: WeightMatrix, base: WeightMatrix) -> WeightMatrix:
    """The difference of two layers of one shape, exact in float64 on the first one's device."""
    stack = matrix.stack.to(torch.float64, copy=True)
    stack -= base.stack.to(stack.device)
    return replace(matrix, stack=stack, read_only="a difference of two models", parameter=None)


def layer_name(parameter: str) -> str:
    """Layer name of a parameter path: wrappers removed, a final `.weight` dropped."""
    segments = [part for part in parameter.split(".") if part not in WRAPPER_SEGMENTS]
    if len(segments) > 2 and segments[0] == "module":  # DistributedDataParallel
        segments = segments[1:]
    if len(segments) > 1 and segments[-1] == "weight":
        segments = segments[:-1]
    return ".".join(segments)


def weight_matrices(source: Source) -> Iterator[WeightMatrix | Skipped]:
    """Walk over every matrix in `source`, in the order in which the model registers them.

    Vectors and scalars (biases, norms) are not matrices and are passed over. A weight shared by
    several layers comes once, under the first name; the others are `Skipped` and say so.

    Args:
        source: A module, a state dict (also one wrapped as `{"state_dict": ...}`), or one matrix.

    Yields:
        One `WeightMatrix` or `Skipped` a layer. Nothing is copied, moved or synchronised, except that
        a DTensor is gathered, which every process of its mesh must take part in.

    Raises:
        TypeError: If `source` is none of these.
    """
    if isinstance(source, nn.Module):
        yield from _of_module(source)
    elif isinstance(source, Mapping):
        yield from _of_state_dict(source)
    elif isinstance(source, np.ndarray):
        if source.dtype.kind not in "fc":
            raise TypeError(f"expected a floating-point matrix, got an array of {source.dtype}")
        yield from _of_matrix(_from_numpy(source))
    elif isinstance(source, Tensor):
        yield from _of_matrix(source)
    else:
        raise TypeError(
            "expected an nn.Module, a state dict, a torch.Tensor or a numpy array, "
            f"got {type(source).__module__}.{type(source).__qualname__}"
        )


def _of_matrix(tensor: Tensor) -> Iterator[WeightMatrix | Skipped]:
    if tensor.ndim < 2:
        yield Skipped("W", f"a tensor of shape {tuple(tensor.shape)} is no matrix")
    yield from of_parameter("W", tensor)


def _from_numpy(array: np.ndarray) -> Tensor:
    """A tensor of the same values, copied only where torch cannot share the memory."""
    native = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    if any(stride < 0 for stride in array.strides) or not array.flags.writeable:
        array = np.array(array, dtype=native)
    return torch.from_numpy(np.asarray(array, dtype=native))


def _of_module(model: nn.Module) -> Iterator[WeightMatrix | Skipped]:
    first_name: dict[int, str] = {}
    embeddings = {
        id(parameter)  # not module.weight, which a parametrization would compute
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module._parameters.values()
    }
    for path, module in model.named_modules():
        for own_name, tensor, read_only in own_weights(module):
            parameter = f"{path}.{own_name}" if path else own_name
            name = layer_name(parameter)
            if read_only is None and id(tensor) in first_name:
                if tensor.ndim >= 2:
                    yield Skipped(name, f"shares its weights with {first_name[id(tensor)]}")
                continue
            if read_only is None:
                first_name[id(tensor)] = name
            embedding = id(tensor) in embeddings or isinstance(module, nn.Embedding)
            for matrix in of_parameter(parameter, tensor, module, read_only=read_only):
                if isinstance(matrix, WeightMatrix) and embedding:
                    matrix = replace(matrix, layer_type="embedding")  # also a head tied to one
                yield matrix


def _of_state_dict(state: Mapping[str, object]) -> Iterator[WeightMatrix | Skipped]:
    for wrapper in CHECKPOINT_KEYS:
        inner = state.get(wrapper)
        if isinstance(inner, Mapping):
            state = inner
            break
    first_name: dict[tuple[object, ...], str] = {}
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise TypeError(f"the keys of a state dict are names, got {key!r}")
        if isinstance(tensor, np.ndarray) and tensor.dtype.kind in "fc":
            tensor = _from_numpy(tensor)
        if not isinstance(tensor, Tensor) or tensor.ndim < 2:
            continue
        name = layer_name(key)
        if COMPUTED_FROM.search(key):
            yield Skipped(name, "a part from which a weight is computed: pass the module instead")
            continue
        storage = _storage(tensor)
        if storage in first_name:
            yield Skipped(name, f"shares its weights with {first_name[storage]}")
            continue
        if storage is not None:
            first_name[storage] = name
        yield from of_parameter(key, tensor, siblings=state)


def _storage(tensor: Tensor) -> tuple[object, ...] | None:
    """What two tied entries of a state dict have in common, or None where that is unknown."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return None
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def of_parameter(
    parameter: str,
    tensor: Tensor,
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
    its name ends in "weight" and experts otherwise.

    Args:
        parameter: Full path of the parameter.
        tensor: Its value.
        owner: The module that holds it, if known.
        siblings: The state dict it comes from, if any (tells the gates of recurrent layers).
        read_only: Passed on to the matrices.
    """
    name = layer_name(parameter)
    if nn.parameter.is_lazy(tensor):
        yield Skipped(name, "not initialised yet (lazy module: run one forward pass first)")
        return
    if tensor.ndim < 2 or parameter.rpartition(".")[2] == "bias":
        return
    if isinstance(owner, nn.LayerNorm | nn.RMSNorm):
        yield Skipped(name, "a normalisation over several dimensions is no matrix")
        return
    original = tensor
    if hasattr(tensor, "full_tensor"):  # a DTensor
        tensor, read_only = tensor.full_tensor(), "sharded over processes"
    elif tensor.is_quantized or type(tensor) not in _PLAIN:
        with suppress(RuntimeError, NotImplementedError, AttributeError):  # _unusable says so
            tensor, read_only = tensor.dequantize(), "quantised"
    reason = _unusable(tensor)
    if reason is not None:
        yield Skipped(name, reason)
        return
    for label, kind, stack, scale in _stacks(parameter, tensor.detach(), owner, siblings):
        if kind.startswith("conv") and stack.shape[0] > 1 and min(stack.shape[1:]) == 1:
            yield Skipped(
                name, f"its {stack.shape[0]} slices are vectors (depthwise, or one channel)"
            )
            continue
        locked = read_only
        if stack.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            locked = locked or "its memory layout has no view as a stack of matrices"
        yield WeightMatrix(f"{name}{label}", kind, stack, scale, locked, original)


def _stacks(
    parameter: str, tensor: Tensor, owner: nn.Module | None, siblings: Mapping[str, object] | None
) -> Iterator[tuple[str, str, Tensor, float]]:
    """Suffix of the name, layer type, stack of slices and scale of each matrix of a parameter."""
    last = parameter.rpartition(".")[2]
    if _is_conv(tensor, owner, last):
        groups = owner.groups if isinstance(owner, nn.modules.conv._ConvNd) else 1
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
    if tensor.is_meta:
        return "on the meta device: it has a shape but no values"
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
    if not isinstance(recurrent, Tensor) or recurrent.ndim != 2:
        return None
    rows, hidden = recurrent.shape
    return hidden if rows in (hidden, 3 * hidden, 4 * hidden) else None
