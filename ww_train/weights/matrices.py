"""Which weights are matrices: models, state dicts, arrays and files become `WeightMatrix` objects.

A layer has the same name in a module, its state dict and its files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from ww_train.weights.adapters import FACTOR, factor_modules, merged, module_update, updates
from ww_train.weights.checkpoints import read_checkpoint
from ww_train.weights.effective import COMPUTED_FROM, own_weights
from ww_train.weights.formats import CHECKPOINT_KEYS, inner_state
from ww_train.weights.slicing import CONV_SCALE, of_parameter
from ww_train.weights.stored import (
    SCALES,
    CheckpointError,
    Deferred,
    StoredTensor,
    from_numpy,
    scaled,
)
from ww_train.weights.weight_matrix import (
    NOT_FINITE,
    Skipped,
    WeightMatrix,
    delta,
    layer_name,
    reasons,
    slices,
)

__all__ = [
    "CHECKPOINT_KEYS",
    "CONV_SCALE",
    "NOT_FINITE",
    "CheckpointError",
    "Deferred",
    "Skipped",
    "Source",
    "WeightMatrix",
    "delta",
    "layer_name",
    "merge",
    "of_parameter",
    "reasons",
    "slices",
    "weight_matrices",
]

Source: TypeAlias = (
    "nn.Module | Mapping[str, Tensor] | Tensor | np.ndarray | str | os.PathLike[str] | "
    "Iterable[WeightMatrix | Skipped]"
)

EMBEDDING = re.compile(r"(^|[._])((\w*_)?embed\w*|wte|wpe)$")
"""Names of embeddings, where there is no module to ask."""

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def weight_matrices(source: Source) -> Iterator[WeightMatrix | Skipped]:
    """Walk over every matrix in `source`, in the order in which the model registers them.

    Vectors and scalars (biases, norms) are not matrices and are passed over. A weight shared by
    several layers comes once, under the first name; the others are `Skipped` and say so. A layer with
    a LoRA adapter gives its weight and the update, `name.lora`, but not the update's factors.

    Args:
        source: A module, a state dict (also one wrapped as `{"state_dict": ...}`), one matrix, a file
            or folder (`ww_train.weights.checkpoints.read_checkpoint` says which), or a list of what
            this function yields. A path may also be that of an adapter, which gives its updates.

    Yields:
        One `WeightMatrix` or `Skipped` a layer. Nothing is copied, moved, gathered or synchronised,
        and of files only the headers are read. Layers of files are known by name and shape alone, so
        that "embedding" and "conv2d" are guesses, and a grouped convolution is taken for a plain one
        of fewer channels, unless the file holds the program too (ONNX, Keras, torch.export).

    Raises:
        TypeError: If `source` is none of these.
        CheckpointError: If the file cannot be read; says what to do.
    """
    if isinstance(source, nn.Module):
        yield from _of_module(source)
    elif isinstance(source, Mapping):
        yield from _of_state_dict(source)
    elif isinstance(source, np.ndarray):
        if source.dtype.kind not in "fc":
            raise TypeError(f"expected a floating-point matrix, got an array of {source.dtype}")
        yield from _of_matrix(from_numpy(source))
    elif isinstance(source, Tensor):
        yield from _of_matrix(source)
    elif isinstance(source, str | os.PathLike):
        yield from _of_path(Path(source))
    else:
        yield from _listed(source)


def _listed(source: object) -> Iterator[WeightMatrix | Skipped]:
    found = (
        list(source) if isinstance(source, Iterable) and not isinstance(source, bytes) else [source]
    )
    if not all(isinstance(item, WeightMatrix | Skipped) for item in found):
        raise TypeError(
            "expected an nn.Module, a state dict, a torch.Tensor, a numpy array, a path or weight "
            f"matrices, got {type(source).__module__}.{type(source).__qualname__}"
        )
    yield from cast("list[WeightMatrix | Skipped]", found)


def merge(base: Source, adapter: Source) -> list[WeightMatrix | Skipped]:
    """A base model with a LoRA adapter's updates added, as a source for `measure` and the others.

    Args:
        base: The model that the adapter was trained on.
        adapter: The adapter's folder.

    Returns:
        The layers of the base; each sum is computed in float64 when its turn comes.

    Raises:
        CheckpointError: If the adapter fits no layer of the base.
    """
    return list(merged(weight_matrices(base), weight_matrices(adapter)))


def _of_path(path: Path) -> Iterator[WeightMatrix | Skipped]:
    state, adapter = read_checkpoint(path)
    if adapter is None:
        yield from _of_state_dict(state)
        return
    yield from updates(state, adapter)
    yield from _of_state_dict({key: t for key, t in state.items() if not FACTOR.match(key)})


def _of_matrix(tensor: Tensor) -> Iterator[WeightMatrix | Skipped]:
    if tensor.ndim < 2:
        yield Skipped("W", f"a tensor of shape {tuple(tensor.shape)} is no matrix")
    yield from of_parameter("W", tensor)


def _of_module(model: nn.Module) -> Iterator[WeightMatrix | Skipped]:
    first_name: dict[int, str] = {}
    embeddings = {
        id(parameter)  # not module.weight, which a parametrization would compute
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module._parameters.values()
    }
    adapted, factors = _adapted(model)
    for path, module in model.named_modules():
        for own_name, tensor, read_only in own_weights(module):
            if id(tensor) in factors:
                continue
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
        if id(module) in adapted:
            update = module_update(adapted[id(module)], layer_name(f"{path}.weight"))
            if update is not None:
                yield update


def _adapted(model: nn.Module) -> tuple[dict[int, nn.Module], set[int]]:
    """The layers with LoRA adapters by their base layer, and the factors' parameters."""
    adapted: dict[int, nn.Module] = {}
    factors = set[int]()
    for module in model.modules():
        holders = factor_modules(module)
        if holders:
            adapted[id(module.base_layer)] = module
            factors |= {id(p) for holder in holders for p in holder.parameters()}
    return adapted, factors


def _of_state_dict(tree: Mapping[str, object]) -> Iterator[WeightMatrix | Skipped]:
    state = inner_state(tree)
    first_name: dict[object, str] = {}
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise TypeError(f"the keys of a state dict are names, got {key!r}")
        if isinstance(tensor, Skipped):
            yield replace(tensor, name=layer_name(key))
            continue
        if isinstance(tensor, np.ndarray) and tensor.dtype.kind in "fc":
            tensor = from_numpy(tensor)
        if not isinstance(tensor, Tensor | StoredTensor) or tensor.ndim < 2:
            continue
        name = layer_name(key)
        if reason := _part_of_another(key, state):
            if reason is not _SAID:
                yield Skipped(name, reason)
            continue
        storage = _storage(tensor)
        if storage in first_name:
            yield Skipped(name, f"shares its weights with {first_name[storage]}")
            continue
        if storage is not None:
            first_name[storage] = name
        yield from _of_entry(key, tensor, state)


def _of_entry(
    key: str, tensor: Tensor | StoredTensor, state: Mapping[str, object]
) -> Iterator[WeightMatrix | Skipped]:
    scale = _scale(key, state) if tensor.dtype in FLOAT8 and tensor.ndim == 2 else None
    if scale is not None:
        dequantised = scaled(tensor, scale)
        if isinstance(dequantised, str):
            yield Skipped(layer_name(key), dequantised)
            return
        tensor = dequantised
    for matrix in of_parameter(key, tensor, siblings=state):
        if isinstance(matrix, WeightMatrix) and matrix.layer_type == "dense":
            kind = "embedding" if EMBEDDING.search(matrix.name) else "dense"
            matrix = replace(matrix, layer_type=kind)
        yield matrix


_SAID = "what belongs to a layer that is named elsewhere"


def _part_of_another(key: str, state: Mapping[str, object]) -> str | None:
    """Why an entry of a state dict is no layer of its own, or None if it is."""
    if COMPUTED_FROM.search(key):
        return "a part from which a weight is computed: pass the module instead"
    for ending in SCALES:
        if key.endswith(ending) and f"{key.removesuffix(ending)}.weight" in state:
            return _SAID
    factor = FACTOR.match(key)
    if factor and factor[3] == "A":
        return "a LoRA factor without its scaling: pass the model or the adapter's folder"
    return _SAID if factor else None


def _scale(key: str, state: Mapping[str, object]) -> Tensor | StoredTensor | None:
    for ending in SCALES:
        found = state.get(f"{key.removesuffix('.weight')}{ending}")
        if isinstance(found, Tensor | StoredTensor):
            return found
    return None


def _storage(tensor: Tensor | StoredTensor) -> object:
    """What two tied entries of a state dict have in common, or None where that is unknown."""
    if isinstance(tensor, StoredTensor):
        return tensor.identity
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return None
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
