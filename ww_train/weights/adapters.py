"""Low-rank adapters (LoRA): the update `scaling * B A` of each layer, from files and from modules.

An update is one matrix named after its layer, `encoder.0.fc1.lora`. Formulas: Hu et al. 2021
(alpha / r), Kalajdzievski 2023 (rank-stabilised: alpha / sqrt(r)), Liu et al. 2024 (DoRA); names and
the configuration are those of the peft library, which is not imported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ww_train.ranks import NO_ROOM, gathered
from ww_train.weights.low_rank import DORA, SUFFIX, DoraUpdate, Factors, kind_of, positions
from ww_train.weights.stored import CheckpointError, Deferred, StoredTensor
from ww_train.weights.weight_matrix import Skipped, WeightMatrix, layer_name

__all__ = [
    "FACTOR",
    "SUFFIX",
    "configuration",
    "factor_modules",
    "merged",
    "module_update",
    "scaling",
    "updates",
]

MAGNITUDE = "magnitude_vector"

FACTOR = re.compile(
    rf"^(.*?)\.?lora_(embedding_)?([AB]|{MAGNITUDE})(?:\.(?!weight$)[^.]+)?(?:\.weight)?$"
)
"""Path of the layer, whether it is an embedding, and which factor a tensor is, or DoRA's sizes."""


def scaling(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Factor on the product of a layer's factors, by an adapter's configuration."""
    alpha = config["lora_alpha"]
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = own
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def configuration(path: Path) -> dict[str, Any]:
    """An `adapter_config.json`.

    Raises:
        CheckpointError: If it is damaged, or of an adapter that is not LoRA.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, _ = config["peft_type"], float(config["lora_alpha"])
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: save the adapter again") from error
    except KeyError:
        kind = config.get("peft_type", "unknown")
    if kind != "LORA":
        raise CheckpointError(
            f"{path} is of an adapter of type {kind}; only LORA can be read: merge it into its base"
        )
    if "lora_alpha" not in config:
        raise CheckpointError(f"{path} has no lora_alpha, so the scaling is not known")
    return dict(config)


def updates(
    state: Mapping[str, StoredTensor | Skipped], config: Mapping[str, Any]
) -> Iterator[WeightMatrix | Skipped]:
    """The updates in an adapter's tensors; tensors that are no factors are passed over."""
    layers: dict[str, dict[str, StoredTensor]] = {}
    embeddings = set[str]()
    for key, tensor in state.items():
        match = FACTOR.match(key)
        if match and isinstance(tensor, StoredTensor):
            layer = layer_name(match[1])
            layers.setdefault(layer, {})[match[3]] = tensor
            if match[2]:
                embeddings.add(layer)
    for layer, parts in layers.items():
        reason = _mismatch(parts, config)
        if reason is not None:
            yield Skipped(f"{layer}{SUFFIX}", reason)
            continue
        factors = _stored_factors(parts["A"], parts["B"], layer in embeddings)
        transposed = layer in embeddings or bool(config.get("fan_in_fan_out"))
        factor = scaling(config, layer, factors.rank)
        update = replace(factors, scaling=factor, transposed=transposed).matrix(layer)
        if MAGNITUDE in parts:
            yield DoraUpdate(update.name, DORA, update, _all(parts[MAGNITUDE]), transposed)
        else:
            yield update


def _mismatch(parts: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> str | None:
    present = [part for part in parts if part != MAGNITUDE]
    if len(present) != 2:
        return f"only the factor {''.join(present)} is there" if present else "it has no factors"
    if config.get("use_dora") and MAGNITUDE not in parts:
        return "DoRA, but its magnitude vector is missing: save the adapter again"
    A, B = parts["A"].shape, parts["B"].shape
    if len(A) < 2 or len(A) != len(B) or A[0] != B[1] or math.prod(B[2:]) != 1:
        return f"factors of shapes {B} and {A} have no product (a grouped convolution, perhaps)"
    if MAGNITUDE in parts and math.prod(parts[MAGNITUDE].shape) != B[0]:
        return f"DoRA: magnitudes of shape {parts[MAGNITUDE].shape} for {B[0]} outputs"
    return None


def _all(stored: StoredTensor) -> Callable[[], Tensor]:
    return lambda: stored.read(0, stored.shape[0]).flatten()


def _stored_factors(A: StoredTensor, B: StoredTensor, embedding: bool) -> Factors:
    rank, inner, *kernel = A.shape
    out = B.shape[0]
    return Factors(
        lambda device: positions(A.read(0, rank)).to(device),
        lambda device: B.read(0, out).flatten(1).to(device),
        (math.prod(kernel), out, inner),
        rank,
        kind_of(A.ndim, embedding),
        A.dtype,
    )


def factor_modules(module: nn.Module) -> list[nn.Module]:
    """Of a layer that peft has wrapped, the modules that hold factors; of others none."""
    if not hasattr(module, "base_layer") or not hasattr(module, "scaling"):
        return []
    names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    children = [getattr(module, name, None) for name in names]
    return [child for child in children if isinstance(child, nn.Module)]


def module_update(module: nn.Module, layer: str) -> WeightMatrix | Skipped | None:
    """The sum of the updates of the active adapters of a layer that peft has wrapped, if any."""
    wrapped: Any = module
    embedding = bool(len(getattr(wrapped, "lora_embedding_A", ())))
    As = wrapped.lora_embedding_A if embedding else wrapped.lora_A
    Bs = wrapped.lora_embedding_B if embedding else wrapped.lora_B
    active = getattr(wrapped, "active_adapters", list(As))
    chosen = [name for name in active if name in As]
    if not chosen or getattr(wrapped, "disable_adapters", False):
        return None
    if len(getattr(wrapped, "lora_magnitude_vector", ())):
        return Skipped(f"{layer}{SUFFIX}", DORA)
    if getattr(wrapped.base_layer, "groups", 1) > 1:
        return Skipped(f"{layer}{SUFFIX}", "the adapter of a grouped convolution")
    pairs = [(_weight(As[name]), _weight(Bs[name])) for name in chosen]
    scales = [
        wrapped.scaling[name] if isinstance(wrapped.scaling, Mapping) else wrapped.scaling
        for name in chosen
    ]
    A, B = pairs[0]
    factors = Factors(
        lambda device: torch.cat([positions(_whole(A).to(device)) for A, _ in pairs], 1),
        lambda device: torch.cat(
            [
                _whole(B).to(device).flatten(1).double() * s
                for (_, B), s in zip(pairs, scales, strict=True)
            ],
            1,
        ),
        (math.prod(A.shape[2:]), B.shape[0], A.shape[1]),
        sum(A.shape[0] for A, _ in pairs),
        kind_of(A.ndim, embedding),
        A.dtype,
        transposed=embedding or bool(getattr(wrapped, "fan_in_fan_out", False)),
        device=A.device,
        collective=hasattr(A, "full_tensor"),
    )
    return factors.matrix(layer)


def _weight(holder: Any) -> Tensor:
    tensor: Tensor = holder if isinstance(holder, Tensor) else holder.weight
    return tensor


def _whole(tensor: Any) -> Tensor:
    if not hasattr(tensor, "full_tensor"):
        own: Tensor = tensor.detach()
        return own
    whole = gathered(tensor)
    if whole is None:
        raise CheckpointError(NO_ROOM)
    return whole


def merged(
    base: Iterable[WeightMatrix | Skipped], adapter: Iterable[WeightMatrix | Skipped]
) -> Iterator[WeightMatrix | Skipped]:
    """The layers of a base model with an adapter's updates added, in float64, layer by layer.

    A layer that the adapter holds as a whole (peft's `modules_to_save`) replaces the base's. With DoRA
    each output of a sum has the size that the adapter says.

    Raises:
        CheckpointError: If the adapter fits no layer of the base.
    """
    changes = {change.name: change for change in adapter}
    left = dict(changes)
    for layer in base:
        whole = left.pop(layer.name, layer)
        update = left.pop(f"{layer.name}{SUFFIX}", None)
        if update is None or isinstance(whole, Skipped):
            yield whole
        elif isinstance(update, DoraUpdate):
            yield _sum(whole, update.update, update.resized)
        elif isinstance(update, Skipped):
            yield replace(update, name=layer.name)
        else:
            yield _sum(whole, update)
    if changes and len(left) == len(changes):
        raise CheckpointError(
            f"the adapter fits no layer of the base model: its first is {next(iter(changes))}"
        )
    for name in left:
        yield Skipped(name, "the base model has no layer of this name")


def _deferred_sum(
    layer: WeightMatrix, update: WeightMatrix, finish: Callable[[Tensor], Tensor]
) -> Deferred:
    """The sum in float64, made where the layer is."""

    def load() -> Tensor:
        own, change = layer.stack, update.stack  # gathered before anything can fail
        return finish(own.to(torch.float64, copy=True).add_(change.to(layer.device)))

    return Deferred(
        layer.shape,
        layer.dtype,
        load,
        layer.device,
        layer.collective,
        relocate=lambda device: _deferred_sum(layer.to(device), update.to(device), finish),
    )


def _sum(
    layer: WeightMatrix,
    update: WeightMatrix,
    finish: Callable[[Tensor], Tensor] = lambda total: total,
) -> WeightMatrix | Skipped:
    if layer.shape != update.shape:
        return Skipped(layer.name, f"shape {layer.shape}, that of the update is {update.shape}")

    weights = _deferred_sum(layer, update, finish)
    return replace(layer, weights=weights, read_only="a sum of weights and update", parameter=None)
