"""From a path to tensors: which format a file has, which of a folder's files hold the weights."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from ww_train.weights.adapters import configuration
from ww_train.weights.distributed_format import distributed
from ww_train.weights.foreign_formats import gguf_file, keras_file, onnx_model
from ww_train.weights.formats import (
    Catalogue,
    exported,
    naturally,
    numpy_archive,
    numpy_array,
    safetensors,
    torch_file,
)
from ww_train.weights.stored import CheckpointError

Reader: TypeAlias = Callable[[Path], Catalogue]

MAGIC: tuple[tuple[bytes, Reader], ...] = (
    (b"GGUF", gguf_file),
    (b"\x89HDF\r\n\x1a\n", keras_file),
    (b"\x93NUMPY", numpy_array),
)
"""First bytes of formats that have their own."""

KNOWN = (
    "safetensors, .bin/.pt/.pth/.ckpt of torch.save, .pt2 of torch.export, .npy, .npz, .onnx, "
    ".keras, .h5, .gguf, or a folder with one of these"
)

PREFERENCE = (
    *("*.safetensors.index.json", "*.safetensors"),
    *("*.bin.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt"),
    *("*.pt2", "*.keras", "*.h5", "*.onnx", "*.gguf", "*.npz"),
)
"""Weights in a folder, by preference."""

NO_WEIGHTS = re.compile(r"^(training_args|optimizer|scheduler|scaler|rng_state|random_states)")
"""Beginnings of the names of files that trainers save beside the weights."""

SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)(\.\w+)")
"""Name of one of several files that are a checkpoint together."""


def read_checkpoint(path: Path) -> tuple[Catalogue, dict[str, Any] | None]:
    """The tensors in a file or folder, and the configuration of the adapter if it is one.

    Only headers are read. The contents of a file decide, not its name: safetensors, `torch.save` (also
    Lightning's), `torch.export.save`, numpy, Keras, ONNX, GGUF. Of a folder: an index and its shards,
    a LoRA adapter of peft, `torch.distributed.checkpoint`, the single file of one of these formats,
    or arrays of numpy. Where a folder has weights in several formats, safetensors are preferred and a
    warning says what was chosen.

    Raises:
        CheckpointError: If it cannot be read; one line with what is wrong and what to do.
    """
    try:
        if path.is_dir():
            return _folder(path)
        config = path.parent / "adapter_config.json"
        is_adapter = path.name.startswith("adapter_model.") and config.is_file()
        return read_file(path), configuration(config) if is_adapter else None
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror or error}") from error


def read_file(path: Path) -> Catalogue:
    """The tensors in one file."""
    if not path.exists():
        raise CheckpointError(
            f"there is no file or folder {path}: check the path, and download models of a hub first"
        )
    with path.open("rb") as file:
        head = file.read(64)
    return _read(_reader(path, head), path)


def _read(reader: Reader, path: Path) -> Catalogue:
    """What a reader gives; there is nothing that the parsers of damaged files do not raise."""
    try:
        return reader(path)
    except CheckpointError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"
        raise CheckpointError(
            f"{path} is damaged or cut short ({text}): copy or download it again"
        ) from error


def _reader(path: Path, head: bytes) -> Reader:
    if path.suffix == ".onnx" and head:
        return onnx_model
    for magic, reader in MAGIC:
        if head.startswith(magic):
            return reader
    if head.startswith(b"PK\x03\x04"):
        return _archive
    if head[8:9] == b"{":  # behind the length of the header, which may begin as a pickle does
        return safetensors
    if head.startswith(b"\x80"):  # a pickle, as torch wrote it before 1.6
        return torch_file
    raise CheckpointError(f"{path} {_unknown(path, head)}")


def _archive(path: Path) -> Catalogue:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if "model.weights.h5" in names:
        return keras_file(path)
    if any(name.endswith("archive_format") for name in names):
        return exported(path)
    if names and all(name.endswith(".npy") for name in names):
        return numpy_archive(path)
    return torch_file(path)


def _unknown(path: Path, head: bytes) -> str:
    if not head:
        return "is empty: copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the weights: run `git lfs pull`"
    if path.suffix == ".safetensors":
        return "is no safetensors file, or a damaged one: download it again"
    return f"has no format that is known here; known are {KNOWN}"


def _folder(folder: Path) -> tuple[Catalogue, dict[str, Any] | None]:
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder), configuration(folder / "adapter_config.json")
    if (folder / ".metadata").is_file():
        return _read(distributed, folder), None
    groups = [_candidates(folder, pattern) for pattern in PREFERENCE]
    groups = [group for group in groups if group]
    if not groups:
        return _arrays(folder), None
    chosen = _only(folder, groups[0])
    others = {path.suffix for group in groups for path in group} - {".json", chosen[0].suffix}
    if others - ({".safetensors", ".bin"} if chosen[0].suffix == ".json" else set()):
        warnings.warn(f"{folder} holds several checkpoints; reading {chosen[0].name}", stacklevel=2)
    if chosen[0].suffix == ".json":
        return _sharded(chosen[0]), None
    return _union(chosen), None


def _candidates(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        path
        for path in folder.glob(pattern)
        if path.is_file() and not NO_WEIGHTS.match(path.name) and not path.name.startswith(".")
    )


def _only(folder: Path, group: list[Path]) -> list[Path]:
    """The file, or the shards of the checkpoint, that a group of candidates must mean."""
    if len(group) == 1 and not SHARD.fullmatch(group[0].name):
        return group
    shards = [match for path in group if (match := SHARD.fullmatch(path.name))]
    if len(shards) == len(group) and len({match.group(1, 3, 4) for match in shards}) == 1:
        missing = set(range(1, int(shards[0][3]) + 1)) - {int(match[2]) for match in shards}
        if missing:
            raise CheckpointError(
                f"{folder} lacks shard {min(missing)} of {shards[0][3]}: download it again"
            )
        return group
    usual = [path for path in group if path.name.startswith(("model.", "pytorch_model."))]
    if len(usual) == 1:
        others = ", ".join(path.name for path in group if path not in usual)
        warnings.warn(f"{folder} also holds {others}; reading {usual[0].name}", stacklevel=2)
        return usual
    names = ", ".join(path.name for path in group[:5])
    raise CheckpointError(f"{folder} holds several checkpoints ({names}): name one of them")


def _union(shards: Iterable[Path]) -> Catalogue:
    state: Catalogue = {}
    for shard in shards:
        state |= read_file(shard)
    return state


def _sharded(index: Path) -> Catalogue:
    """The tensors of the shards that an index lists, each where it says."""
    try:
        files: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        shards = sorted({index.parent / Path(file).name for file in files.values()})
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged: download it again") from error
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{index.parent} lacks {missing[0]}{more}: download it again")
    found = {shard.name: read_file(shard) for shard in shards}
    for name, file in files.items():
        if name not in found[Path(file).name]:
            raise CheckpointError(
                f"{index.name} says that {name} is in {file}, but it is not: the files of "
                f"{index.parent} are not of one checkpoint, download them again"
            )
    state = {name: t for shard in found.values() for name, t in shard.items() if name in files}
    order = naturally(state) if ".safetensors." in index.name else list(state)
    return {name: state[name] for name in order}


def _adapter(folder: Path) -> Catalogue:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            return read_file(folder / name)
    raise CheckpointError(
        f"{folder} has an adapter_config.json but no adapter_model.safetensors: save it again"
    )


def _arrays(folder: Path) -> Catalogue:
    """A folder of .npy files, each a weight named after its file."""
    files = {path.stem: path for path in folder.glob("*.npy")}
    if not files:
        inside = naturally(p.name for p in folder.iterdir() if p.is_dir())
        hint = f"; it has the folders {', '.join(inside[:5])}" if inside else ""
        raise CheckpointError(f"{folder} holds no weights{hint}: known are {KNOWN}")
    return {name: numpy_array(files[name])["W"] for name in naturally(files)}
