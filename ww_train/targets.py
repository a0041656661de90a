"""Which of an optimizer's parameters are projected, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ww_train.effective import COMPUTED_FROM
from ww_train.matrices import (
    Skipped,
    WeightMatrix,
    layer_name,
    of_parameter,
    weight_matrices,
)

EMBEDDING_NAME = re.compile(r"(^|[._])(embed\w*|wte|wpe|tok_embeddings|lm_head)($|[._])")
"""Names that embeddings and output heads tied to them have, for parameters without a module."""

LORA_NAME = re.compile(r"(^|[._])lora_(A|B|embedding)")


def projection_targets(
    param_groups: Sequence[dict[str, Any]], model: nn.Module | None = None
) -> Iterator[WeightMatrix | Skipped]:
    """Walk over the matrices that an optimizer trains.

    With a model, the types of its modules decide: linear layers, convolutions (by their pooled
    spectrum), attention projections, recurrent gates and experts are targets. Embeddings and heads
    tied to one, LoRA factors, frozen and computed weights are not. Without a model only
    two-dimensional parameters are targets, and embeddings are known by the names that the optimizer
    was given (`AdamW(model.named_parameters())`), if it was.

    Args:
        param_groups: Of the optimizer; read afresh at each call, since wrappers replace parameters.
        model: The model that owns the parameters.

    Yields:
        One `WeightMatrix` to project or `Skipped` for each matrix, in the model's order.
    """
    if model is None:
        yield from _of_groups(param_groups)
        return
    trained = {id(p) for group in param_groups for p in group["params"]}
    for matrix in weight_matrices(model):
        if isinstance(matrix, Skipped):
            yield matrix
        elif matrix.read_only:
            yield Skipped(matrix.name, matrix.read_only)
        elif matrix.layer_type == "embedding":
            yield Skipped(matrix.name, "an embedding, or tied to one")
        elif LORA_NAME.search(matrix.name):
            yield Skipped(matrix.name, "a LoRA factor: its product is the layer, not the factor")
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
