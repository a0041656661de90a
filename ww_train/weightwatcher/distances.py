"""WeightWatcher's `distances`: one number a layer, and that of the biases."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ww_train.comparing.matching import Matching, matched_pairs
from ww_train.comparing.similarity import linear_cka
from ww_train.weights.checkpoints import read_checkpoint
from ww_train.weights.formats import inner_state
from ww_train.weights.matrices import Source, WeightMatrix, layer_name, slices, weight_matrices
from ww_train.weights.stored import StoredTensor
from ww_train.weightwatcher.layers import NumberedLayer

if TYPE_CHECKING:
    import pandas as pd

Distance = Callable[[Tensor, Tensor], float]
"""From two `(rf, rows, cols)` float64 stacks to their distance."""

UNKNOWN = "unknown"
"""Shape of a bias that is not there, or that the method does not compare."""


def raw(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of the difference."""
    return float(torch.linalg.vector_norm(a - b))


def euclidean(a: Tensor, b: Tensor) -> float:
    """Mean over the slices of the Frobenius norm of the difference."""
    return float(torch.linalg.matrix_norm(a - b).mean())


def cka(a: Tensor, b: Tensor) -> float:
    """Mean over the slices of the square root of linear CKA, a similarity; NaN if one is zero."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        norms = [float(torch.linalg.vector_norm(part)) for part in (x, y)]
        if not all(0.0 < norm < math.inf for norm in norms):
            return math.nan
        total += math.sqrt(linear_cka(x[None] / norms[0], y[None] / norms[1]))
    return total / len(a)


METHODS: Mapping[str, Distance] = {"raw": raw, "euclidean": euclidean, "cka": cka}


@torch.no_grad()
def distance_table(
    model_1: Source,
    layers: Sequence[NumberedLayer],
    model_2: Source,
    *,
    method: str = "raw",
    pool: bool = True,
) -> pd.DataFrame:
    """Distance of every layer of one model to the layer of the same name in another.

    Args:
        model_1: The first model.
        layers: Those of its layers that are compared.
        model_2: The second model.
        method: "raw", "euclidean" or "cka"; biases are compared by the first only.
        pool: Otherwise one row for each slice of a convolution.

    Returns:
        Columns `method`, `name`, `delta_W`, `delta_b`, `M`, `N`, `b_shape`, `longname` and, if not
        pooled, `slice_id`; the index is `layer_id`. Layers without a partner are in `attrs`.

    Raises:
        ValueError: If there is no such method, or the models have no layer in common.

    Cost: each weight is read once, and two layers are in memory in float64.
    """
    import pandas as pd

    if method not in METHODS:
        raise ValueError(f'method is "raw", "euclidean" or "cka", got {method!r}')
    numbers = {layer.longname: layer for layer in layers}
    others = list(weight_matrices(model_2))
    matching, pairs = matched_pairs(others, [layer.matrix for layer in layers])
    biases = [_biases(model) if method == "raw" else {} for model in (model_1, model_2)]
    rows = []
    for other, matrix in pairs:
        layer = numbers[matrix.name]
        delta_b, b_shape = _bias_distance(*(found.get(matrix.name) for found in biases))
        for slice_id, a, b in _stacks(matrix, other, pool):
            row = {"method": method, "layer_id": layer.layer_id, "name": layer.name}
            row |= {"delta_W": METHODS[method](a, b), "delta_b": delta_b}
            row |= {"M": matrix.M, "N": matrix.N, "b_shape": b_shape, "longname": matrix.name}
            rows.append(row if pool else row | {"slice_id": slice_id})
    frame = pd.DataFrame(rows).set_index("layer_id")
    frame.attrs["skipped"] = _skipped(matching)
    return frame


def _stacks(
    matrix: WeightMatrix, other: WeightMatrix, pool: bool
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Slices, or all of them together, of two layers in float64."""
    one, two = matrix.loaded(), other.loaded()
    parts = zip([one] if pool else slices(one), [two] if pool else slices(two), strict=True)
    for i, (x, y) in enumerate(parts):
        a = x.stack.to(torch.float64)
        yield i, a, y.stack.to(a)


def _biases(model: Source) -> dict[str, Tensor]:
    """The biases of a model by the name of their layer."""
    return {
        layer_name(f"{key[:-4]}weight"): _values(value)
        for key, value in _entries(model)
        if isinstance(key, str) and f".{key}".endswith(".bias")
        if isinstance(value, Tensor | StoredTensor)
    }


def _entries(model: Source) -> Iterable[tuple[object, object]]:
    if isinstance(model, nn.Module):
        return model.named_parameters()
    if isinstance(model, Mapping):
        return inner_state(model).items()
    if isinstance(model, str | os.PathLike):
        return read_checkpoint(Path(model))[0].items()
    return ()


def _values(bias: Tensor | StoredTensor) -> Tensor:
    values = bias if isinstance(bias, Tensor) else bias.read(0, bias.shape[0])
    return values.detach().to(torch.float64)


def _bias_distance(a: Tensor | None, b: Tensor | None) -> tuple[float, int | str]:
    if a is None or b is None or a.shape != b.shape:
        return 0.0, UNKNOWN
    return float(torch.linalg.vector_norm(a - b.to(a))), len(a)


def _skipped(matching: Matching) -> dict[str, str]:
    reasons = {layer.name: layer.reason for layer in (*matching.reshaped, *matching.unreadable)}
    return reasons | dict.fromkeys(matching.extra, "the second model has no layer of this name")
