"""What `torch.save` writes, alone or as a part of an archive: state dicts and checkpoints."""

from __future__ import annotations

import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeAlias, cast

import torch
from torch import Tensor, nn

from ww_train.weights.stored import (
    CheckpointError,
    StoredTensor,
    in_memory,
    open_binary,
    raw_tensor,
)
from ww_train.weights.weight_matrix import Skipped

Catalogue: TypeAlias = "dict[str, StoredTensor | Skipped]"
"""Tensors by name, or why one of them cannot be read."""

CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model")
"""Keys under which people save the state dict in a checkpoint."""


def inner_state(tree: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state dict inside a checkpoint, or the mapping itself if it is one."""
    for key in CHECKPOINT_KEYS:
        if isinstance(tree.get(key), Mapping):
            return cast("Mapping[Any, Any]", tree[key])
    return tree


def torch_file(path: Path) -> Catalogue:
    """A file of `torch.save`: a state dict, a checkpoint with one inside, or a single tensor.

    Unpickled with `weights_only=True`. Files in the format of torch before 1.6, compressed ones and
    ones of another byte order are read into memory as a whole.
    """
    tree = _unpickled(path, lambda: path.open("rb"))
    if isinstance(tree, Tensor):
        tree = {"W": tree}
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, no state dict")
    return _catalogue(path, inner_state(tree), partial(open_binary, path), 0)


def saved_parameters(path: Path, member: str) -> Catalogue:
    """The parameters of a state dict that `torch.save` wrote into a member of an archive."""
    state = _unpickled(path, partial(_member, path, member))
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__} in {member}, no state dict")
    parameters = {name: t for name, t in state.items() if isinstance(t, nn.Parameter)}
    return _catalogue(path, parameters, *record(path, member))


def _member(path: Path, name: str) -> BinaryIO:
    """A member of an archive, as a file of its own; it keeps the archive open."""
    archive = zipfile.ZipFile(path)
    return cast("BinaryIO", archive.open(name))


def _unpickled(path: Path, open_file: Callable[[], IO[bytes]]) -> object:
    """What `torch.save` wrote, with tensors that know the position of their values if possible."""
    try:
        with open_file() as file:
            if not _plain_zip(file):
                file.seek(0)
                return torch.load(file, map_location="cpu", weights_only=True)
            from torch._subclasses.fake_tensor import FakeTensorMode

            file.seek(0)
            with FakeTensorMode():  # torch.serialization documents that storages then know it
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise
        raise CheckpointError(
            f"{path} holds Python objects that could run code when loaded ({named[1]}): "
            "save the state_dict() alone, or load the model yourself"
        ) from error


def _plain_zip(file: IO[bytes]) -> bool:
    """Whether the values lie in the file as they are in memory."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        orders = [archive.read(r) for r in records if r.filename.endswith("/byteorder")]
    own = sys.byteorder.encode()
    return all(r.compress_type == 0 for r in records) and all(order == own for order in orders)


def _catalogue(
    path: Path, state: Mapping[Any, Any], opened: Callable[[], BinaryIO], start: int
) -> Catalogue:
    """The tensors of a state dict that begins at `start` of what `opened` opens."""
    return {
        name: _entry(path, name, tensor, opened, start)
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def _entry(
    path: Path, name: str, tensor: Tensor, opened: Callable[[], BinaryIO], start: int
) -> StoredTensor | Skipped:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return Skipped(name, f"stored as {tensor.layout if not tensor.is_quantized else 'codes'}")
    position = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if position is None:
        return in_memory(tensor, (tensor.data_ptr(), tensor.shape, tensor.stride()))
    shape, stride = tuple(tensor.shape), tensor.stride()
    offset = start + position + tensor.storage_offset() * tensor.dtype.itemsize
    identity = (path, offset, shape, stride)
    where = f"{name} in {path}"
    if tensor.is_contiguous():
        return raw_tensor(opened, where, offset, shape, tensor.dtype, identity)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    flat = raw_tensor(opened, where, offset, (extent,), tensor.dtype)

    def read(begin: int, end: int) -> Tensor:
        return flat.read(0, extent).as_strided(shape, stride)[begin:end]

    return StoredTensor(shape, tensor.dtype, read, identity)


def record(path: Path, name: str) -> tuple[Callable[[], BinaryIO], int]:
    """How to open the file that an archive is, or a compressed part of it, and where a part starts."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            return partial(_member, path, name), 0
        file.seek(info.header_offset + 26)  # of the local header, which may differ from the central
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    return partial(open_binary, path), info.header_offset + 30 + name_length + extra_length
