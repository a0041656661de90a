"""Readers of other frameworks' weight files: Keras, ONNX, GGUF. Kernels are turned to torch's layout.

The packages h5py, onnx and gguf are imported when such a file is read.
"""

from __future__ import annotations

import importlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ww_train.weights.formats import Catalogue, naturally
from ww_train.weights.slicing import grouped
from ww_train.weights.stored import (
    CheckpointError,
    StoredTensor,
    from_numpy,
    open_binary,
    raw_tensor,
)
from ww_train.weights.weight_matrix import Skipped

LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names of the layers of Llama and its relatives, and those of the transformers library."""

LLAMA_LIKE = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "granite")


def _needed(package: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise CheckpointError(
            f"{path} needs the package {package}: pip install {package}"
        ) from error


def onnx_model(path: Path) -> Catalogue:
    """The initialisers of an ONNX model that its nodes use as weights.

    Values in external files are read one by one; those inside the model are in memory with it. An
    exporter's number ("onnx::MatMul_12") is replaced by the path of the node that uses the weight.
    """
    onnx = _needed("onnx", path)
    model = onnx.load(str(path), load_external_data=False)
    users = {name: node for node in model.graph.node for name in node.input}
    found: Catalogue = {}
    for tensor in model.graph.initializer:
        if len(tensor.dims) < 2 or tensor.name not in users:
            continue
        name = _onnx_name(tensor.name, users[tensor.name])
        read = _onnx_tensor(path, name, tensor)
        groups = next((a.i for a in users[tensor.name].attribute if a.name == "group"), 1)
        found[name] = read if isinstance(read, Skipped) else grouped(read, groups)
    return found


def _onnx_name(name: str, node: Any) -> str:
    if name.startswith("onnx::") and "/" in node.name:
        name = node.name.strip("/").rpartition("/")[0].replace("/", ".") or name
    return name if name.endswith("weight") else f"{name}.weight"


def _onnx_tensor(path: Path, name: str, tensor: Any) -> StoredTensor | Skipped:
    onnx = importlib.import_module("onnx")
    kinds = {
        onnx.TensorProto.FLOAT: torch.float32,
        onnx.TensorProto.DOUBLE: torch.float64,
        onnx.TensorProto.FLOAT16: torch.float16,
    }
    dtype = kinds.get(tensor.data_type)
    if dtype is None:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        return Skipped(name.removesuffix(".weight"), f"stored as {kind}")

    def read(start: int, stop: int) -> Tensor:
        try:
            array = onnx.numpy_helper.to_array(tensor, str(path.parent))
        except Exception as error:  # missing or short external data, of several types
            text = (
                f"{name} in {path} cannot be read ({type(error).__name__}): keep its data beside it"
            )
            raise CheckpointError(text) from error
        return from_numpy(array)[start:stop]

    return StoredTensor(tuple(tensor.dims), dtype, read)


def gguf_file(path: Path) -> Catalogue:
    """The tensors of a GGUF file, dequantised to float32 by the package gguf.

    Of Llama and its relatives under the names of the transformers library, else under GGUF's own.
    """
    gguf = _needed("gguf", path)
    reader = gguf.GGUFReader(str(path))
    field = reader.get_field("general.architecture")
    llama = field is not None and str(field.contents()) in LLAMA_LIKE
    entries = [
        (t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type, int(t.data_offset))
        for t in reader.tensors
    ]
    found: Catalogue = {}
    for name, shape, kind, offset in entries:
        key = _gguf_name(name, llama)
        found[key] = _gguf_tensor(path, key, shape, kind, offset)
    return found


def _gguf_name(name: str, llama: bool) -> str:
    plain = name.removesuffix(".weight")
    if plain.endswith("_exps"):
        return plain  # a stack of experts; a name in "weight" would be a convolution
    if not llama:
        return name
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", plain)
    known = LLAMA_NAMES.get(block[2] if block else plain)
    if known is None:
        return name
    return f"model.layers.{block[1]}.{known}.weight" if block else f"{known}.weight"


def _gguf_tensor(
    path: Path, name: str, shape: tuple[int, ...], kind: Any, offset: int
) -> StoredTensor | Skipped:
    quants = importlib.import_module("gguf.quants")
    plain = {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F64": torch.float64,
    }
    opened, where = partial(open_binary, path), f"{name} in {path}"
    if kind.name in plain:
        return raw_tensor(opened, where, offset, shape, plain[kind.name])
    try:
        width = quants.quant_shape_to_byte_shape(shape, kind)
        quants.dequantize(np.zeros((1, width[-1]), np.uint8), kind)
    except (NotImplementedError, ValueError, KeyError):
        return Skipped(name, f"stored as {kind.name}, which the package gguf cannot dequantise")
    codes = raw_tensor(opened, where, offset, tuple(width), torch.uint8)

    def read(start: int, stop: int) -> Tensor:
        return from_numpy(quants.dequantize(codes.read(start, stop).numpy(), kind))

    return StoredTensor(shape, torch.float32, read, None, "quantised")


@contextmanager
def _hdf5(path: Path) -> Iterator[Any]:
    """The HDF5 file, also the one inside a .keras archive."""
    h5py = _needed("h5py", path)
    with ExitStack() as stack:
        inner: Any = path
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            inner = stack.enter_context(archive.open("model.weights.h5"))
        yield stack.enter_context(h5py.File(inner, "r"))


def keras_file(path: Path) -> Catalogue:
    """The kernels in a .keras, .weights.h5 or .h5 file, under the names of Keras' layers.

    In the order of the model's configuration where the file has one, else sorted by name.
    """
    with _hdf5(path) as file:
        old = "model_weights" in file
        datasets = (_keras2 if old else _keras3)(file["model_weights"] if old else file)
        found = {name: _keras_tensor(path, name, dataset) for dataset, name in datasets}
    layers = _layers(path)
    order = {layer: i for i, layer in enumerate(layers)}
    names = sorted(naturally(found), key=lambda n: order.get(n.partition(".")[0], len(order)))
    for name in names:
        if isinstance(read := found[name], StoredTensor) and name in layers:
            found[name] = grouped(read, layers[name].get("groups", 1))
    return {f"{name}.weight": found[name] for name in names}


def _layers(path: Path) -> dict[str, dict[str, Any]]:
    """The configurations of a model's layers by name, in its order, where the file has them."""
    if not zipfile.is_zipfile(path):
        return {}
    with zipfile.ZipFile(path) as archive:
        layers = json.loads(archive.read("config.json"))["config"].get("layers", [])
    return {layer["config"].get("name", ""): layer["config"] for layer in layers}


def _keras3(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[Any, str]]:
    """Datasets and names of the matrices; Keras 3 keeps a layer's name as an attribute of `vars`."""
    variables = group.get("vars", {})
    kernel = variables.get("0")
    for key in naturally(variables):
        dataset = variables[key]
        bias = key != "0" and dataset.ndim < kernel.ndim and kernel.shape[-dataset.ndim :]
        if dataset.ndim > 1 and bias != dataset.shape:
            role = () if key == "0" else ("recurrent_kernel" if "cell" in group.name else key,)
            yield dataset, ".".join((*path, *role))
    for key in naturally(k for k in group if k not in ("vars", "optimizer")):
        inner = group[key]
        label = inner["vars"].attrs.get("name", key) if "vars" in inner else None
        yield from _keras3(inner, path if label is None else (*path, str(label)))


def _keras2(group: Any) -> Iterator[tuple[Any, str]]:
    """Datasets and names of the matrices of a .h5 model, where every variable has its own name."""
    datasets: dict[str, Any] = {}
    group.visititems(
        lambda name, item: datasets.update({name: item} if hasattr(item, "ndim") else {})
    )
    for path, dataset in datasets.items():
        *parts, last = path.split("/")
        last = last.partition(":")[0]
        if dataset.ndim < 2 or last == "bias":
            continue
        parts = parts[1:] if len(parts) > 1 else parts  # the layer's group repeats its name
        yield dataset, ".".join(parts if last in ("kernel", "embeddings") else [*parts, last])


def _turn(path: str, ndim: int) -> Callable[[Tensor], Tensor] | None:
    """How a Keras kernel comes to torch's layout; None if its shape does not tell the matrix."""
    if ndim == 2:
        return torch.clone if "embedding" in path else torch.t
    if ndim == 3 and re.search(r"output(_dense|/|\.)", path):  # (heads, size, out) of attention
        return lambda w: w.flatten(0, 1).t()
    if ndim == 3 and re.search(r"(query|key|value)(_dense|/|\.)", path):  # (in, heads, size)
        return lambda w: w.flatten(1).t()
    if ndim == 3 and "einsum" in path:
        return None
    if "depthwise" in path:  # (height, width, in, multiplier)
        return lambda w: w.movedim((-2, -1), (0, 1)).flatten(0, 1)[:, None]
    return lambda w: w.movedim(
        (-1, -2), (0, 1)
    )  # (height, width, in, out), transposed (.., out, in)


def _keras_tensor(path: Path, name: str, dataset: Any) -> StoredTensor | Skipped:
    turn = _turn(f"{dataset.name}.{name}".lower(), dataset.ndim)
    if turn is None:
        reason = "a kernel of three dimensions of which only the equation tells the matrix"
        return Skipped(name, reason)
    shape = tuple(turn(torch.empty(dataset.shape, device="meta")).shape)
    bfloat16 = dataset.attrs.get("dtype") == "bfloat16"  # kept as 16-bit integers
    kind = torch.bfloat16 if bfloat16 else from_numpy(np.empty(0, dataset.dtype)).dtype

    def read(start: int, stop: int, key: str = dataset.name) -> Tensor:
        with _hdf5(path) as file:
            values = from_numpy(np.asarray(file[key][()]))
        return turn(values.view(torch.bfloat16) if bfloat16 else values)[start:stop].contiguous()

    return StoredTensor(shape, kind, read)
