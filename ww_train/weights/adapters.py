"""Low-rank adapters (LoRA): the update `scaling * B A` of each layer, from files and from modules.

An update is one matrix named after its layer, `encoder.0.fc1.lora`. Of its eigenvalues at most r are
positive; they are those of an r x r product, so that nothing of the layer's size is decomposed.
Formulas: Hu et al. 2021 (alpha / r), Kalajdzievski 2023 (rank-stabilised: alpha / sqrt(r)); names and
the configuration are those of the peft library, which is not imported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ww_train.weights.slicing import CONV_SCALE
from ww_train.weights.stored import CPU, CheckpointError, Deferred, StoredTensor
from ww_train.weights.weight_matrix import Skipped, WeightMatrix, layer_name

SUFFIX = ".lora"
"""What the name of an update has more than that of its layer."""

READ_ONLY = "a LoRA update: its factors are trained, not their product"

DORA = "DoRA: the update depends on the weights of the base; merge the adapter into it"

FACTOR = re.compile(r"^(.*?)\.?lora_(embedding_)?([AB])(?:\.(?!weight$)[^.]+)?(?:\.weight)?$")
"""Path of the layer, whether it is an embedding, and which factor a tensor is."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The two factors of one update and how they are applied.

    Attributes:
        A: Makes the `(rf, r, in)` factor.
        B: Makes the `(out, r)` factor.
        shape: `(rf, out, in)` of the product.
        rank: r.
        kind: Layer type: "dense", "embedding" or a convolution.
        dtype: In which the factors are stored.
        scaling: Factor on the product.
        transposed: Whether the layer's weight is `(in, out)`.
        device: Where the factors are.
        collective: Whether they are sharded over processes.
    """

    A: Callable[[], Tensor]
    B: Callable[[], Tensor]
    shape: tuple[int, int, int]
    rank: int
    kind: str
    dtype: torch.dtype
    scaling: float = 1.0
    transposed: bool = False
    device: torch.device = CPU
    collective: bool = False

    def product(self) -> Tensor:
        """`scaling * B A` in float64, `(rf, out, in)`, or `(rf, in, out)` if transposed."""
        update = self.B().to(torch.float64) @ self.A().to(torch.float64)
        update *= self.scaling
        return update.mT if self.transposed else update

    def core(self) -> Tensor:
        """`scaling * R_B R_Aᵀ` in float64: `(rf, k, k)`, k at most r, of the same singular values.

        From the QR decompositions `B = Q_B R_B` and `Aᵀ = Q_A R_A`.
        """
        B = torch.linalg.qr(self.B().to(torch.float64), mode="r").R
        A = torch.linalg.qr(self.A().to(torch.float64).mT, mode="r").R
        core: Tensor = self.scaling * (B @ A.mT)
        return core

    def matrix(self, layer: str) -> WeightMatrix:
        """The update of a layer."""
        rf, out, inner = self.shape
        weights = Deferred(
            (rf, inner, out) if self.transposed else self.shape,
            self.dtype,
            self.product,
            self.device,
            self.collective,
            rank=min(self.rank, out, inner),
            core=self.core,
        )
        scale = CONV_SCALE if self.kind.startswith("conv") else 1.0
        return WeightMatrix(f"{layer}{SUFFIX}", self.kind, weights, scale, READ_ONLY)


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
    pairs: dict[tuple[str, bool], dict[str, StoredTensor]] = {}
    dora = bool(config.get("use_dora")) or any("lora_magnitude_vector" in key for key in state)
    for key, tensor in state.items():
        match = FACTOR.match(key)
        if match and isinstance(tensor, StoredTensor):
            pair = pairs.setdefault((layer_name(match[1]), bool(match[2])), {})
            pair[match[3]] = tensor
    for (layer, embedding), pair in pairs.items():
        reason = DORA if dora else _mismatch(pair)
        if reason is not None:
            yield Skipped(f"{layer}{SUFFIX}", reason)
            continue
        factors = _stored_factors(pair["A"], pair["B"], embedding)
        transposed = embedding or bool(config.get("fan_in_fan_out"))
        factor = scaling(config, layer, factors.rank)
        yield replace(factors, scaling=factor, transposed=transposed).matrix(layer)


def _mismatch(pair: Mapping[str, StoredTensor]) -> str | None:
    if set(pair) != {"A", "B"}:
        return f"only the factor {''.join(pair)} is there"
    A, B = pair["A"].shape, pair["B"].shape
    if len(A) < 2 or len(A) != len(B) or A[0] != B[1] or math.prod(B[2:]) != 1:
        return f"factors of shapes {B} and {A} have no product (a grouped convolution, perhaps)"
    return None


def _stored_factors(A: StoredTensor, B: StoredTensor, embedding: bool) -> Factors:
    rank, inner, *kernel = A.shape
    out = B.shape[0]
    return Factors(
        lambda: _positions(A.read(0, rank)),
        lambda: B.read(0, out).flatten(1),
        (math.prod(kernel), out, inner),
        rank,
        _kind(A.ndim, embedding),
        A.dtype,
    )


def _positions(A: Tensor) -> Tensor:
    """The factor A of a convolution as one matrix for each position of the kernel."""
    return A.flatten(2).permute(2, 0, 1) if A.ndim > 2 else A[None]


def _kind(ndim: int, embedding: bool) -> str:
    return f"conv{ndim - 2}d" if ndim > 2 else "embedding" if embedding else "dense"


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
        lambda: torch.cat([_positions(_whole(A)) for A, _ in pairs], 1),
        lambda: torch.cat(
            [_whole(B).flatten(1).double() * s for (_, B), s in zip(pairs, scales, strict=True)], 1
        ),
        (math.prod(A.shape[2:]), B.shape[0], A.shape[1]),
        sum(A.shape[0] for A, _ in pairs),
        _kind(A.ndim, embedding),
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
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    detached: Tensor = tensor.detach()
    return detached


def merged(
    base: Iterable[WeightMatrix | Skipped], adapter: Iterable[WeightMatrix | Skipped]
) -> Iterator[WeightMatrix | Skipped]:
    """The layers of a base model with an adapter's updates added, in float64, layer by layer.

    A layer that the adapter holds as a whole (peft's `modules_to_save`) replaces the base's.

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


def _sum(layer: WeightMatrix, update: WeightMatrix) -> WeightMatrix | Skipped:
    if layer.shape != update.shape:
        return Skipped(layer.name, f"shape {layer.shape}, that of the update is {update.shape}")

    def load() -> Tensor:
        return layer.stack.to(torch.float64, copy=True).add_(update.stack.to(layer.device))

    weights = Deferred(layer.shape, layer.dtype, load, layer.device, layer.collective)
    return replace(layer, weights=weights, read_only="a sum of weights and update", parameter=None)
