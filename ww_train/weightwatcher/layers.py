"""Layers as WeightWatcher numbers, names and chooses them.

Its `layer_id` counts all modules of a model, the model itself and those without weights included, or
all keys of a state dict that end in ".weight"; `layers=[...]` takes ids, names and types.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TypeAlias, TypeGuard

import numpy as np
from torch import Tensor, nn

from ww_train.selection import select
from ww_train.weights.adapters import FACTOR, SUFFIX, merged
from ww_train.weights.checkpoints import read_checkpoint
from ww_train.weights.formats import inner_state
from ww_train.weights.matrices import Skipped, Source, WeightMatrix, layer_name, weight_matrices

PeerLayers: TypeAlias = "int | str | re.Pattern[str] | Iterable[int | str | re.Pattern[str]]"
"""Ids, names (globs and compiled regular expressions too), types, and what to leave out."""

TYPES = frozenset({"dense", "embedding", "conv1d", "conv2d", "norm"})
"""Words that WeightWatcher takes for a type and not for a name."""

MERGED = ".merged"
"""What the name of a weight with its LoRA update has more than that of the weight."""

SHOWN = 12
"""Ids that an error lists at most."""


@dataclass(frozen=True, eq=False)
class NumberedLayer:
    """A layer with WeightWatcher's number and name.

    Attributes:
        layer_id: The number; matrices of one module, such as the projections of an attention, share it.
        name: Last part of the path for a module, the whole of it for a state dict or file.
        matrix: The layer; its own name is WeightWatcher's `longname`.
    """

    layer_id: int
    name: str
    matrix: WeightMatrix | Skipped

    @property
    def longname(self) -> str:
        """The dotted path."""
        return self.matrix.name

    @property
    def layer_type(self) -> str:
        """Type of the layer; "skipped" if it holds no plain matrix."""
        return "skipped" if isinstance(self.matrix, Skipped) else self.matrix.layer_type

    def without_scale(self) -> NumberedLayer:
        """The same without the factor on the weights of a convolution."""
        if isinstance(self.matrix, Skipped):
            return self
        return replace(self, matrix=replace(self.matrix, scale=1.0))


def numbered_layers(model: Source, start_ids: int = 0) -> list[NumberedLayer]:
    """The layers of a model in WeightWatcher's order.

    Modules count from `start_ids` and state dicts, where that is zero, from one. Files count from
    `start_ids`, safetensors shard by shard in the order of the index, without one in alphabetical
    order. Matrices that WeightWatcher passes over have the id
    of their module, or one after all others.

    Args:
        model: Any source that `measure` takes.
        start_ids: The first id.
    """
    if isinstance(model, Iterator):
        model = list(model)  # it is walked over twice
    found = list(weight_matrices(model))
    ids = dict(_ids(model, start_ids))
    short = isinstance(model, nn.Module)
    layers = [
        NumberedLayer(
            _owner(ids, m.name, start_ids), m.name.rpartition(".")[2] if short else m.name, m
        )
        for m in found
    ]
    return sorted(layers, key=lambda layer: layer.layer_id)


def chosen_layers(layers: list[NumberedLayer], wanted: PeerLayers | None) -> list[NumberedLayer]:
    """The layers that WeightWatcher's `layers=` means.

    A layer is chosen if one of the ids or names is its own, or there are none, if no negative id and
    no name with a leading "-" is its own, and if one of the types is its own, or there are none.

    Args:
        layers: All layers.
        wanted: Ids, names (short or long), types, ids below zero and "-names" to leave out; nothing
            or None for all layers.

    Raises:
        ValueError: If an id, name or type belongs to no layer, ids of both signs are mixed, or
            nothing is left.
        TypeError: If a filter is none of these.
    """
    filters: list[object] = list(_listed(wanted))
    if not filters:
        return layers
    known = {layer.longname for layer in layers} | {layer.name for layer in layers}
    own_types = {layer.layer_type for layer in layers} - known - {"skipped"}
    types = [f for f in filters if isinstance(f, str) and f in TYPES | own_types]
    numbers = [int(f) for f in filters if _is_id(f)]
    dropped = _with_ids(layers, [-number for number in numbers if number < 0])
    kept = _with_ids(layers, [number for number in numbers if number >= 0])
    if kept and dropped:
        raise ValueError(f"ids are all to keep or, below zero, all to leave out, got {numbers}")
    for pattern in filters:
        if _is_id(pattern) or pattern in types:
            continue
        if isinstance(pattern, str) and pattern.startswith("-"):
            dropped |= _named(layers, pattern[1:])
        else:
            kept |= _named(layers, pattern)
    catalogue = [(layer.longname, layer.layer_type) for layer in layers]
    flags = select(catalogue, types=types)
    kept = kept or set(range(len(layers)))
    chosen = [layer for i, layer in enumerate(layers) if flags[i] and i in kept - dropped]
    if not chosen:
        raise ValueError(f"layers={filters} leaves no layer")
    return chosen


def adapted_layers(
    layers: list[NumberedLayer], base_model: Source | None, peft: bool | str
) -> list[NumberedLayer]:
    """The LoRA updates of a model, and with "with_base" what they belong to and the sums too.

    Args:
        layers: Those of a model with adapters, or of an adapter's folder.
        base_model: The model without them, where `layers` has updates only.
        peft: True for the updates, `name.lora`; "with_base" for `name`, `name.lora` and the weight
            with the update added, `name.merged`.

    Raises:
        ValueError: If there is no update, no base or another word than "with_base".
        CheckpointError: If the updates fit no layer of the base; a ValueError.
    """
    if peft is not True and peft != "with_base":
        raise ValueError(f'peft is False, True or "with_base", got {peft!r}')
    updates = [layer for layer in layers if layer.longname.endswith(SUFFIX)]
    if not updates:
        raise ValueError("peft measures the updates of LoRA adapters, and this model has none")
    if peft is True:
        if base_model is not None:
            raise ValueError(
                'peft=True measures updates alone: leave base_model out, or use peft="with_base"'
            )
        return updates
    own = layers if base_model is None else numbered_layers(base_model)
    bases = {layer.longname: layer for layer in own if not layer.longname.endswith(SUFFIX)}
    return list(_with_bases(bases, updates))


def _with_bases(
    bases: dict[str, NumberedLayer], updates: list[NumberedLayer]
) -> Iterator[NumberedLayer]:
    matrices = [layer.matrix for layer in bases.values()]
    if not matrices:
        raise ValueError('an adapter alone has no base: pass base_model= with peft="with_base"')
    sums = {matrix.name: matrix for matrix in merged(matrices, [u.matrix for u in updates])}
    for update in updates:
        name = update.longname.removesuffix(SUFFIX)
        if name in bases:
            total = replace(sums[name], name=f"{name}{MERGED}")
            yield bases[name]
            yield update
            yield replace(update, name=f"{bases[name].name}{MERGED}", matrix=total)


def _listed(wanted: PeerLayers | None) -> Iterable[object]:
    if wanted is None:
        return []
    if isinstance(wanted, str) or not isinstance(wanted, Iterable):
        return [wanted]
    return wanted


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _ids(model: Source, start_ids: int) -> Iterator[tuple[str, int]]:
    """Names that WeightWatcher counts and their numbers, and those of the updates of adapters."""
    if isinstance(model, nn.Module):
        names = [f"{path}.weight" if path else "weight" for path, _ in model.named_modules()]
        first = start_ids
    elif isinstance(model, Mapping):
        names, first = _weights_first(inner_state(model)), start_ids or 1
    elif isinstance(model, str | os.PathLike):
        names, first = _stored_names(Path(model)), start_ids
    else:
        found = [] if isinstance(model, Tensor | np.ndarray) else model
        names, first = [layer.name for layer in found] or ["W"], start_ids or 1
    for i, name in enumerate(names, first):
        yield layer_name(name), i
        factor = FACTOR.match(name)
        if factor and factor[3] == "A" and not factor[2]:
            yield f"{layer_name(f'{factor[1]}.weight')}{SUFFIX}", i


def _stored_names(path: Path) -> list[str]:
    """The keys of a file or folder in the order in which WeightWatcher reads them."""
    names = list(read_checkpoint(path)[0])
    folder = path if path.is_dir() else None
    if path.suffix == ".safetensors" or (folder and any(folder.glob("*.safetensors"))):
        names.sort()
    for index in folder.glob("*.safetensors.index.json") if folder else ():
        shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(shards, key=shards.__getitem__)
    return _weights_first(names)


def _weights_first(keys: Iterable[object]) -> list[str]:
    """The keys that WeightWatcher counts, then the others, which so change no number."""
    names = [key for key in keys if isinstance(key, str)]
    return sorted(names, key=lambda name: not name.endswith(".weight"))


def _owner(ids: Mapping[str, int], name: str, root: int) -> int:
    """The number of a matrix: its own, or that of the module or key that it is a part of."""
    while name not in ids:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return root
    return ids[name]


def _with_ids(layers: list[NumberedLayer], numbers: list[int]) -> set[int]:
    known = {layer.layer_id for layer in layers}
    if unknown := sorted(set(numbers) - known):
        shown = [str(number) for number in sorted(known)[:SHOWN]]
        shown += ["..."] if len(known) > SHOWN else []
        raise ValueError(f"no layer has the id {unknown[0]}; the ids are {', '.join(shown)}")
    return {i for i, layer in enumerate(layers) if layer.layer_id in numbers}


def _named(layers: list[NumberedLayer], pattern: object) -> set[int]:
    """Positions of the layers of this short name, or whose long name matches."""
    short = {i for i, layer in enumerate(layers) if layer.name == pattern}
    if short:
        return short
    if isinstance(pattern, bool) or not isinstance(pattern, str | re.Pattern):
        raise TypeError(
            "layers= takes ids, names, types and compiled regular expressions, "
            f"got {pattern!r} of type {type(pattern).__name__}"
        )
    found = select([(layer.longname, layer.layer_type) for layer in layers], pattern)
    return {i for i, chosen in enumerate(found) if chosen}
