"""Which of an optimizer's parameters are projected, and why the others are not."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, TypeAlias

from torch import Tensor, nn

from ww_train.selection import Layers, select
from ww_train.weights.effective import COMPUTED_FROM
from ww_train.weights.matrices import (
    Skipped,
    WeightMatrix,
    layer_name,
    of_parameter,
    weight_matrices,
)
from ww_train.weights.weight_matrix import sharded

Choice: TypeAlias = "Layers | Callable[[WeightMatrix], bool]"
"""Layers by name, glob, regular expression or position (`ww_train.selection`), or by a predicate."""

EMBEDDING_NAME = re.compile(r"(^|[._])(embed\w*|wte|wpe|tok_embeddings|lm_head)($|[._])")
"""Names that embeddings and output heads tied to them have, for parameters without a module."""

LORA_NAME = re.compile(r"(^|[._])lora_(A|B|embedding)")


def chosen(
    targets: Iterable[WeightMatrix | Skipped], include: Choice = None, exclude: Choice = None
) -> list[WeightMatrix | Skipped]:
    """Narrow targets down to those that are included and not excluded; the others are skipped.

    Args:
        targets: What `projection_targets` yields.
        include: Only these; None for all.
        exclude: Not these; None for none.

    Raises:
        ValueError: If a pattern matches no layer of the model.
        TypeError: If a pattern is of the wrong type.
    """
    found = list(targets)
    wanted = _flags(found, include, default=True)
    unwanted = _flags(found, exclude, default=False)
    result: list[WeightMatrix | Skipped] = []
    for target, yes, no in zip(found, wanted, unwanted, strict=True):
        if isinstance(target, WeightMatrix) and not yes:
            target = Skipped(target.name, "not included")
        elif isinstance(target, WeightMatrix) and no:
            target = Skipped(target.name, "excluded")
        result.append(target)
    return result


def _flags(
    targets: Sequence[WeightMatrix | Skipped], choice: Choice, default: bool
) -> Sequence[bool]:
    if choice is None:
        return [default] * len(targets)
    if callable(choice):
        return [isinstance(t, WeightMatrix) and bool(choice(t)) for t in targets]
    if not isinstance(choice, str) and isinstance(choice, Sized) and not len(choice):
        return [False] * len(targets)  # an empty list names no layer, though `select` says all
    return select([(target.name, "") for target in targets], choice)


def projection_targets(
    param_groups: Sequence[dict[str, Any]] | None, model: nn.Module | None = None
) -> Iterator[WeightMatrix | Skipped]:
    """Walk over the matrices that an optimizer trains.

    With a model, the types of its modules decide: linear layers, convolutions (by their pooled
    spectrum), attention projections, recurrent gates and experts are targets. Embeddings and heads
    tied to one, LoRA factors, frozen and computed weights are not. Without a model only
    two-dimensional parameters are targets, and embeddings are known by the names that the optimizer
    was given (`AdamW(model.named_parameters())`), if it was.

    Args:
        param_groups: Of the optimizer; read afresh at each call, since wrappers replace parameters.
            None for all parameters of the model, frozen ones too.
        model: The model that owns the parameters.

    Yields:
        One `WeightMatrix` to project or `Skipped` for each matrix, in the model's order.
    """
    if model is None:
        yield from _of_groups(param_groups or ())
        return
    trained = {id(p) for group in param_groups or () for p in group["params"]}
    for matrix in weight_matrices(model):
        if isinstance(matrix, Skipped):
            yield matrix
        elif matrix.read_only and not sharded(matrix):
            yield Skipped(matrix.name, matrix.read_only)
        elif matrix.layer_type == "embedding":
            yield Skipped(matrix.name, "an embedding, or tied to one")
        elif LORA_NAME.search(matrix.name):
            yield Skipped(matrix.name, "a LoRA factor: its product is the layer, not the factor")
        elif param_groups is None:
            yield matrix
        elif matrix.parameter is None or not matrix.parameter.requires_grad:
            yield Skipped(matrix.name, "frozen")
        elif id(matrix.parameter) not in trained:
            yield Skipped(matrix.name, "not among the optimizer's parameters")
        else:
            yield matrix


def _of_groups(param_groups: Sequence[dict[str, Any]]) -> Iterator[WeightMatrix | Skipped]:
    for name, parameter in _named(param_groups):
        if parameter.ndim > 2:
            reason = f"{parameter.ndim}-D: pass model= to tell what kind of layer it is"
            yield Skipped(layer_name(name), reason)
            continue
        for matrix in of_parameter(name, parameter):
            if isinstance(matrix, Skipped):
                yield matrix
            elif EMBEDDING_NAME.search(matrix.name):
                yield Skipped(matrix.name, "named like an embedding or a head tied to one")
            elif LORA_NAME.search(matrix.name):
                yield Skipped(matrix.name, "a LoRA factor: its product is the layer")
            elif COMPUTED_FROM.search(matrix.name):
                yield Skipped(matrix.name, "named like a part from which a weight is computed")
            elif not parameter.requires_grad:
                yield Skipped(matrix.name, "frozen")
            else:
                yield matrix


def _named(param_groups: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    for g, group in enumerate(param_groups):
        parameters = list(group["params"])
        names = group.get("param_names") or [f"group{g}.param{i}" for i in range(len(parameters))]
        yield from zip(names, parameters, strict=True)


def refuse_flattened(param_groups: Sequence[dict[str, Any]]) -> None:
    """Raise if a framework has replaced the matrices by flat pieces, of which none can be projected.

    Raises:
        RuntimeError: For FullyShardedDataParallel outside `summon_full_params`, and DeepSpeed.
    """
    parameters = [p for group in param_groups for p in group["params"]]
    sharded = [p for p in parameters if hasattr(p, "_fsdp_flattened")]
    if sharded and not any(
        p.ndim > 1 for p in sharded
    ):  # biases have one dimension, summoned or not
        raise RuntimeError(
            "FullyShardedDataParallel has flattened the parameters: use fully_shard (FSDP2) instead, "
            "or wrap the model with use_orig_params=True and call end_epoch() inside "
            "FullyShardedDataParallel.summon_full_params(model, writeback=True)"
        )
    if any(hasattr(p, "ds_id") for p in parameters) or (
        "deepspeed" in sys.modules and not any(p.ndim > 1 for p in parameters)
    ):
        raise RuntimeError(
            "DeepSpeed has taken the parameters over, and what is written to them is lost: train with "
            "DistributedDataParallel or fully_shard (FSDP2), or project the model it saves with "
            "ww_train.project_"
        )
