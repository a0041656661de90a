"""Reader of `torch.distributed.checkpoint` folders, without its loader, which unpickles anything."""

from __future__ import annotations

import importlib
import io
import pathlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ww_train.weights.formats import CHECKPOINT_KEYS, Catalogue
from ww_train.weights.stored import CheckpointError, StoredTensor
from ww_train.weights.weight_matrix import Skipped

METADATA = "torch.distributed.checkpoint.metadata"

ALLOWED = {
    (METADATA, "Metadata"),
    (METADATA, "MetadataIndex"),
    (METADATA, "TensorStorageMetadata"),
    (METADATA, "BytesStorageMetadata"),
    (METADATA, "ChunkStorageMetadata"),
    (METADATA, "TensorProperties"),
    (METADATA, "_MEM_FORMAT_ENCODING"),
    (METADATA, "StorageMeta"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
}
"""What a `.metadata` file may name: plain records, sizes and types."""


class _Unpickler(pickle.Unpickler):
    """Refuses everything that is not a record of checkpoint metadata."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePath
        found = None
        if (module, name) in ALLOWED or (module == "torch" and name.isidentifier()):
            found = getattr(importlib.import_module(module), name, None)
        if (module, name) in ALLOWED or isinstance(found, torch.dtype):
            return found
        raise CheckpointError(
            f"the .metadata file names {module}.{name}, which no checkpoint needs: it may run code"
        )


def distributed(folder: Path) -> Catalogue:
    """The model's tensors in a folder with a `.metadata` file; each is put together from its chunks."""
    with (folder / ".metadata").open("rb") as file:
        metadata = _Unpickler(file).load()
    tensors = metadata.state_dict_metadata.items()
    paths: dict[str, Sequence[object]] = metadata.planner_data or {}
    storage = {(k.fqn, tuple(k.offset or ())): v for k, v in metadata.storage_data.items()}
    stored = {name: entry for name, entry in tensors if hasattr(entry, "chunks")}
    wrappers = [k for k in CHECKPOINT_KEYS if any(_inside(k, n, paths) for n in stored)]
    found: Catalogue = {}
    for name, entry in stored.items():
        if wrappers and not _inside(wrappers[0], name, paths):
            continue  # the state of the optimizer and the like
        short = name.removeprefix(f"{wrappers[0]}.") if wrappers else name
        found[short] = _tensor(folder, name, entry, storage)
    return found


def _inside(key: str, name: str, paths: dict[str, Sequence[object]]) -> bool:
    path = paths.get(name, (name,))
    return len(path) > 1 and path[0] == key


def _tensor(
    folder: Path, name: str, entry: Any, storage: dict[tuple[str, tuple[int, ...]], Any]
) -> StoredTensor | Skipped:
    shape, dtype = tuple(entry.size), entry.properties.dtype
    chunks = []
    for chunk in entry.chunks:
        info = storage.get((name, tuple(chunk.offsets)))
        if info is None:
            return Skipped(name, f"a part of it is missing in {folder}")
        if getattr(info, "transform_descriptors", None):
            return Skipped(name, "stored compressed")
        chunks.append((tuple(chunk.offsets), tuple(chunk.sizes), info))

    def read(start: int, stop: int) -> Tensor:
        result = torch.empty(stop - start, *shape[1:], dtype=dtype, device="cpu")
        for offsets, sizes, info in chunks:
            begin, end = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
            if begin < end:
                values = _chunk(folder, name, info)[begin - offsets[0] : end - offsets[0]]
                rest = [slice(o, o + n) for o, n in zip(offsets[1:], sizes[1:], strict=True)]
                result[(slice(begin - start, end - start), *rest)] = values
        return result

    return StoredTensor(shape, dtype, read)


def _chunk(folder: Path, name: str, info: Any) -> Tensor:
    path = folder / info.relative_path
    try:
        with path.open("rb") as file:
            file.seek(info.offset)
            blob = io.BytesIO(file.read(info.length))
        loaded: Tensor = torch.load(blob, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{name} in {path} cannot be read: copy the folder again") from error
    return loaded
