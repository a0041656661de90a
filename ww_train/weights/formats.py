"""Readers of PyTorch's and numpy's weight files: names, and tensors that are read when asked for.

Each reader takes a path, reads headers only and gives a `Catalogue` in the order of the file; a file
that is no such file or is damaged raises `CheckpointError`.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ww_train.weights import torch_format
from ww_train.weights.export_format import BEFORE_2_8, exported
from ww_train.weights.stored import (
    CheckpointError,
    StoredTensor,
    from_numpy,
    open_binary,
    raw_tensor,
)
from ww_train.weights.torch_format import CHECKPOINT_KEYS, Catalogue, inner_state, record
from ww_train.weights.weight_matrix import Skipped

__all__ = [
    "CHECKPOINT_KEYS",
    "Catalogue",
    "exported",
    "inner_state",
    "naturally",
    "numpy_archive",
    "numpy_array",
    "safetensors",
    "torch_file",
]

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
    """An archive or pickle of `torch.save`, or what `torch.export.save` wrote before torch 2.8."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if BEFORE_2_8 in names:
            return exported(path)
    return torch_format.torch_file(path)


def numpy_array(path: Path) -> Catalogue:
    """A .npy file, named W as an array is."""
    return {"W": _array(f"{path}", partial(open_binary, path))}


def numpy_archive(path: Path) -> Catalogue:
    """The arrays of a .npz file under their names."""
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith(".npy")]
    return {n.removesuffix(".npy"): _array(f"{n} in {path}", *record(path, n)) for n in names}


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
