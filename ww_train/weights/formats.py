"""Readers of PyTorch's and numpy's weight files: names, and tensors that are read when asked for.

Each reader takes a path, reads headers only and gives a `Catalogue` in the order of the file; a file
that is no such file or is damaged raises `CheckpointError`.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from ww_train.weights.stored import (
    CheckpointError,
    StoredTensor,
    from_numpy,
    in_memory,
    open_binary,
    raw_tensor,
)
from ww_train.weights.weight_matrix import Skipped

Catalogue: TypeAlias = "dict[str, StoredTensor | Skipped]"
"""Tensors by name, or why one of them cannot be read."""

CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model")
"""Keys under which people save the state dict in a checkpoint."""

SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of the safetensors format that torch has in all versions."""

EXPORT_TYPES = {6: torch.float16, 7: torch.float32, 8: torch.float64, 13: torch.bfloat16}
"""Floating types of torch.export's schema, by number."""


def inner_state(tree: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state dict inside a checkpoint, or the mapping itself if it is one."""
    for key in CHECKPOINT_KEYS:
        if isinstance(tree.get(key), Mapping):
            return cast("Mapping[Any, Any]", tree[key])
    return tree


def naturally(names: Iterable[str]) -> list[str]:
    """Names sorted with numbers as numbers, for formats that keep no order: layer 2 before 10."""

    def parts(name: str) -> list[tuple[bool, int, str]]:
        pieces = re.split(r"(\d+)", name)
        return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in pieces]

    return sorted(names, key=parts)


def safetensors(path: Path) -> Catalogue:
    """A safetensors file, sorted by name with numbers as numbers: the format keeps no order.

    The layout: eight bytes with the length of the header, a JSON header, the values.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size - 8:
            raise CheckpointError(f"{path} is cut short: copy or download it again")
        try:
            header = json.loads(file.read(length))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
            return {
                name: _entry(path, name, entries[name], 8 + length) for name in naturally(entries)
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} has a damaged header: download it again") from error


def _entry(path: Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor | Skipped:
    dtype = SAFETENSORS_TYPES.get(entry["dtype"])
    shape = tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    if start + end > path.stat().st_size:
        raise CheckpointError(f"{path} is cut short in {name}: copy or download it again")
    if dtype is None:
        return Skipped(name, f"stored as {entry['dtype']}, which cannot be read")
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise CheckpointError(f"{path} has a damaged header at {name}: download it again")
    where = f"{name} in {path}"
    return raw_tensor(partial(open_binary, path), where, start + begin, shape, dtype)


def torch_file(path: Path) -> Catalogue:
    """A file of `torch.save`: a state dict, a checkpoint with one inside, or a single tensor.

    Unpickled with `weights_only=True`. Files in the format of torch before 1.6, compressed ones and
    ones of another byte order are read into memory as a whole.
    """
    try:
        tree = _unpickled(path)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise
        raise CheckpointError(
            f"{path} holds Python objects that could run code when loaded ({named[1]}): "
            "save the state_dict() alone, or load the model yourself"
        ) from error
    if isinstance(tree, Tensor):
        tree = {"W": tree}
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, no state dict")
    state = inner_state(tree)
    return {
        name: _unpickled_entry(path, name, tensor)
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def _unpickled(path: Path) -> object:
    """What the file holds, with tensors that know the position of their values if possible."""
    if not _plain_zip(path):
        return torch.load(path, map_location="cpu", weights_only=True)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # torch.serialization documents that storages then know their position
        return torch.load(path, map_location="cpu", weights_only=True)


def _plain_zip(path: Path) -> bool:
    """Whether the values lie in the file as they are in memory."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        orders = [archive.read(r) for r in records if r.filename.endswith("/byteorder")]
    own = sys.byteorder.encode()
    return all(r.compress_type == 0 for r in records) and all(order == own for order in orders)


def _unpickled_entry(path: Path, name: str, tensor: Tensor) -> StoredTensor | Skipped:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return Skipped(name, f"stored as {tensor.layout if not tensor.is_quantized else 'codes'}")
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        return in_memory(tensor, (tensor.data_ptr(), tensor.shape, tensor.stride()))
    shape, stride = tuple(tensor.shape), tensor.stride()
    offset = start + tensor.storage_offset() * tensor.dtype.itemsize
    identity = (path, offset, shape, stride)
    where, opened = f"{name} in {path}", partial(open_binary, path)
    if tensor.is_contiguous():
        return raw_tensor(opened, where, offset, shape, tensor.dtype, identity)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    flat = raw_tensor(opened, where, offset, (extent,), tensor.dtype)

    def read(begin: int, end: int) -> Tensor:
        return flat.read(0, extent).as_strided(shape, stride)[begin:end]

    return StoredTensor(shape, tensor.dtype, read, identity)


def exported(path: Path) -> Catalogue:
    """The parameters in an archive of `torch.export.save`; the graph is not looked at."""
    with zipfile.ZipFile(path) as archive:
        configs = [
            n for n in archive.namelist() if n.endswith("data/weights/model_weights_config.json")
        ]
        if not configs:
            raise CheckpointError(
                f"{path} was saved by an older torch.export: save program.state_dict instead"
            )
        config = json.loads(archive.read(configs[0]))["config"]
    folder = configs[0].rpartition("/")[0]
    found: Catalogue = {}
    for name, entry in config.items():
        meta = entry["tensor_meta"]
        shape = tuple(size.get("as_int", -1) for size in meta["sizes"])
        if not entry["is_param"] or len(shape) < 2:
            continue
        dtype = EXPORT_TYPES.get(meta["dtype"])
        rows = [stride.get("as_int") for stride in meta["strides"]]
        expected = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if dtype is None or entry["use_pickle"] or rows != expected:
            found[name] = Skipped(
                name, "stored in a way that cannot be read from an export archive"
            )
            continue
        opened, start = _record(path, f"{folder}/{entry['path_name']}")
        offset = start + meta["storage_offset"].get("as_int", 0) * dtype.itemsize
        identity = (path, entry["path_name"], offset, shape)
        found[name] = raw_tensor(opened, f"{name} in {path}", offset, shape, dtype, identity)
    return found


def _record(path: Path, name: str) -> tuple[Callable[[], BinaryIO], int]:
    """How to open the file that an archive is, or a compressed part of it, and where a part starts."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            return lambda: cast(BinaryIO, zipfile.ZipFile(path).open(name)), 0
        file.seek(info.header_offset + 26)  # of the local header, which may differ from the central
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    return partial(open_binary, path), info.header_offset + 30 + name_length + extra_length


def numpy_array(path: Path) -> Catalogue:
    """A .npy file, named W as an array is."""
    return {"W": _array(f"{path}", partial(open_binary, path))}


def numpy_archive(path: Path) -> Catalogue:
    """The arrays of a .npz file under their names."""
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith(".npy")]
    return {n.removesuffix(".npy"): _array(f"{n} in {path}", *_record(path, n)) for n in names}


def _array(where: str, open_file: Callable[[], BinaryIO], start: int = 0) -> StoredTensor | Skipped:
    """An array in numpy's format; pickled objects are refused."""
    try:
        with open_file() as file:
            file.seek(start)
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read_header(file)
            offset = file.tell()
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{where} is no numpy file or damaged: save it again") from error
    if dtype.kind not in "fiu":
        return Skipped(where, f"an array of {dtype}")

    def whole() -> Tensor:
        try:
            with open_file() as file:
                file.seek(start)
                return from_numpy(np.lib.format.read_array(file, allow_pickle=False))
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{where} is cut short: copy it again") from error

    if dtype.itemsize > 8 or not dtype.isnative or fortran:
        kind = from_numpy(np.empty(0, dtype)).dtype
        return StoredTensor(shape, kind, lambda start, stop: whole()[start:stop])
    return raw_tensor(open_file, where, offset, shape, from_numpy(np.empty(0, dtype)).dtype)
