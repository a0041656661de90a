"""Writing a changed copy of a safetensors checkpoint, one shard in memory at a time.

A checkpoint is a `.safetensors` file, or a folder with one such file or with shards and their index.
The copy appears under its name when it is complete, and not at all if anything fails.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from torch import Tensor

from ww_train.editing.edits import Edit, Edits, catalogue, edit_layer_
from ww_train.selection import Layers, select
from ww_train.weights.checkpoints import read_file
from ww_train.weights.formats import Catalogue
from ww_train.weights.matrices import CheckpointError, Skipped, WeightMatrix, weight_matrices

T = TypeVar("T")

SUFFIX = ".safetensors"

INDEX_SUFFIX = ".safetensors.index.json"

WEIGHT_SUFFIXES = frozenset(
    {SUFFIX, ".bin", ".ckpt", ".gguf", ".h5", ".keras", ".msgpack", ".npz", ".onnx", ".pt", ".pth"}
)
"""Files beside the checkpoint that would hold the weights as they were: they are not copied."""

OTHER_INDICES = (".bin.index.json", ".h5.index.json", ".msgpack.index.json")
"""Ends of the names of their indices."""


def rewrite_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    edit: Edit[T],
    *,
    layers: Layers = None,
    types: str | tuple[str, ...] = (),
    min_evals: int = 8,
) -> Edits[T]:
    """Apply an edit to every layer of a checkpoint on disk and write the result elsewhere.

    Shards keep their names, tensors, dtypes and metadata, so that the index stays valid. Configuration,
    tokenizer and all other files of the folder are copied, except weights in other formats, hidden
    files and indices of other formats.

    Args:
        path: A `.safetensors` file or a folder.
        out: The folder to write, which must be empty if it exists; or, if `path` is a file, the
            `.safetensors` file, which must not exist.
        edit: What to do to a layer, in place.
        layers: Which layers, chosen among those of all shards.
        types: Which types of layers.
        min_evals: Layers with fewer eigenvalues are left alone.

    Raises:
        CheckpointError: If there is no such checkpoint, or a file or the index is damaged or missing.
        FileExistsError: If `out` is not empty.
        ValueError: If a layer or type that was asked for does not exist.

    Cost: each shard is read once and written once; in memory is one shard, and while it is written its
    bytes a second time.
    """
    source, target = Path(path), Path(out)
    shards = checkpoint_files(source)
    stored = stored_tensors(shards)
    found = _layers(stored)
    names = catalogue(found)
    flags = select(names, layers, types)
    chosen = [name for (name, _), wanted in zip(names, flags, strict=True) if wanted]
    apply = partial(edit_layer_, edit=edit, min_evals=min_evals)
    results: dict[str, T | Skipped] = {m.name: _unread(m) for m in found}
    single = source.is_file() and target.suffix == SUFFIX
    with _appearing(source, target, single=single) as temporary:
        if source.is_dir():
            _copy_other_files(source, temporary)
        elif not single:
            temporary.mkdir()
        for shard in shards:
            new = temporary if single else temporary / shard.name
            results |= _rewrite(shard, new, stored, set(chosen), apply)
    done = [results[name] for name in chosen]
    return Edits(
        tuple(result for result in done if not isinstance(result, Skipped)),
        tuple(result for result in done if isinstance(result, Skipped)),
    )


def _rewrite(
    shard: Path,
    target: Path,
    stored: Catalogue,
    chosen: set[str],
    edit: Callable[[WeightMatrix], T | Skipped],
) -> dict[str, T | Skipped]:
    """Write one shard with the chosen layers in it edited; what was done to each."""
    tensors, metadata = _read(shard)
    mine = {id(tensor) for tensor in tensors.values()}
    # the entries of other shards tell the gates of recurrent layers from plain matrices
    results = {
        matrix.name: edit(matrix)
        for matrix in _layers({**stored, **tensors})
        if matrix.name in chosen
        and isinstance(matrix, WeightMatrix)
        and id(matrix.parameter) in mine
    }
    _write(tensors, target, metadata)
    return results


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index if it has one.

    Raises:
        CheckpointError: If there is none, one that the index names is missing, the index is damaged, or
            it is not clear which files are meant.
    """
    if path.is_file():
        if path.suffix != SUFFIX:
            raise CheckpointError(f"{path} is no {SUFFIX} file: save the model as one first")
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"there is no file or folder {path}: check the path")
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(f"{path} is an adapter: merge it into its base and save that first")
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(indices) == 1:
        return _indexed(indices[0])
    if len(files) == 1 and not indices:
        return files
    if not files and not indices:
        raise CheckpointError(f"{path} holds no {SUFFIX} file: save the model as one first")
    several = ", ".join(file.name for file in (indices or files))
    raise CheckpointError(f"{path} holds several checkpoints ({several}): name one of the files")


def stored_tensors(shards: list[Path]) -> Catalogue:
    """Names, shapes and types of the tensors of all shards; only headers are read.

    Raises:
        CheckpointError: If a file is damaged, or two shards hold a tensor of the same name.
    """
    state: Catalogue = {}
    for shard in shards:
        found = read_file(shard)
        if twice := sorted(state.keys() & found.keys()):
            raise CheckpointError(f"{shard.name} and another shard both hold {twice[0]}")
        state |= found
    return state


def _unread(matrix: WeightMatrix | Skipped) -> Skipped:
    """What becomes of a layer that is not the tensor of one shard, such as codes with their scales."""
    return (
        Skipped(matrix.name, matrix.read_only or "") if isinstance(matrix, WeightMatrix) else matrix
    )


def _layers(state: Mapping[str, object]) -> list[WeightMatrix | Skipped]:
    return list(weight_matrices(cast("Mapping[str, Tensor]", state)))  # it takes stored ones too


def _indexed(index: Path) -> list[Path]:
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(weight_map.values()))
        shards = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of shards: download it again") from error
    for name, shard in zip(names, shards, strict=True):
        if Path(name).name != name or shard.suffix != SUFFIX:
            raise CheckpointError(
                f"{index.name} names {name!r}, which is no {SUFFIX} file beside it"
            )
        if not shard.is_file():
            raise CheckpointError(f"{index.parent} lacks {name}: download it again")
        held = read_file(shard)
        absent = [key for key, file in weight_map.items() if file == name and key not in held]
        if absent:
            raise CheckpointError(f"{index.name} says that {absent[0]} is in {name}, but it is not")
    return shards


def _read(shard: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{shard} is damaged or cut short: download it again") from error


def _write(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata)


@contextmanager
def _appearing(source: Path, target: Path, *, single: bool) -> Iterator[Path]:
    """A temporary path beside `target`, which it becomes if the block succeeds."""
    source, target = source.resolve(), Path(os.path.abspath(target))
    if target.is_relative_to(source):
        raise FileExistsError(f"{target} is or lies in the checkpoint {source}: write elsewhere")
    if target.exists() and (single or not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty: remove it or write elsewhere")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        if target.is_dir():
            target.rmdir()
        temporary.rename(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _copy_other_files(source: Path, target: Path) -> None:
    def left_out(folder: str, names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if name.startswith(".")
            or Path(name).suffix in WEIGHT_SUFFIXES
            or name.endswith(OTHER_INDICES)
        ]

    shutil.copytree(source, target, ignore=left_out)
