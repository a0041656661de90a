"""Changing the weights of a model that is not training, layer by layer, in place.

An edit is any function from a `WeightMatrix` to what it did, or to `Skipped` with the reason why it
left the layer alone; it writes with `write_`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ww_train.linalg import all_finite, has_float64
from ww_train.selection import Layers, select
from ww_train.weights.matrices import Skipped, WeightMatrix, weight_matrices
from ww_train.weights.stored import CPU

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

Edit: TypeAlias = Callable[[WeightMatrix], "T | Skipped"]

Editable: TypeAlias = "nn.Module | Mapping[str, Tensor] | Tensor"

MIN_BITS = 16
"""Weights of fewer bits are codes whose scales are stored elsewhere."""


@dataclass(frozen=True, eq=False)
class Edits(Generic[T]):
    """What was done to the layers of a model.

    Attributes:
        layers: One for each layer that was treated, in model order.
        skipped: Layers that were left alone, with reasons.
    """

    layers: tuple[T, ...]
    skipped: tuple[Skipped, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a layer; `frame.attrs["skipped"]` maps the others to the reasons."""
        import pandas as pd

        frame = pd.DataFrame([_row(layer) for layer in self.layers])
        frame.attrs["skipped"] = {layer.name: layer.reason for layer in self.skipped}
        return frame


def edit_(
    weights: Editable,
    edit: Edit[T],
    *,
    layers: Layers = None,
    types: str | tuple[str, ...] = (),
    min_evals: int = 8,
) -> Edits[T]:
    """Apply an edit to every layer whose weights can be written to, in place.

    Weights that are computed from others (so are LoRA updates), weights of fewer than 16 bits and
    small layers are skipped; frozen layers are not.

    Args:
        weights: A module, a state dict of tensors, or one matrix.
        edit: What to do to a layer.
        layers: Which layers, by name, glob, regular expression or position (`ww_train.selection`).
        types: Which types of layers, such as "dense".
        min_evals: Layers with fewer eigenvalues are left alone.

    Raises:
        TypeError: If the weights cannot be changed in place: a path, or numpy arrays.
        ValueError: If a layer or type that was asked for does not exist.
    """
    check_editable(weights)
    found = list(weight_matrices(weights))
    chosen = select(catalogue(found), layers, types)
    done: list[T] = []
    skipped: list[Skipped] = []
    for matrix, wanted in zip(found, chosen, strict=True):
        if wanted:
            result = edit_layer_(matrix, edit, min_evals)
            if isinstance(result, Skipped):
                skipped.append(result)
            else:
                done.append(result)
    return Edits(tuple(done), tuple(skipped))


def edit_layer_(matrix: WeightMatrix | Skipped, edit: Edit[T], min_evals: int) -> T | Skipped:
    """Apply an edit to one layer, unless it must not be written to.

    Where the device has no float64, a copy on the CPU is edited and written back.
    """
    if isinstance(matrix, Skipped):
        return matrix
    reason = _untouchable(matrix, min_evals)
    if reason:
        return Skipped(matrix.name, reason)
    if has_float64(matrix.device):
        return edit(matrix)
    here = matrix.to(CPU)
    done = edit(here)
    if not isinstance(done, Skipped):
        with torch.no_grad():
            matrix.stack.copy_(here.stack)
    return done


def catalogue(found: list[WeightMatrix | Skipped]) -> list[tuple[str, str]]:
    """Names and types of layers, for `select`."""
    return [(m.name, "skipped" if isinstance(m, Skipped) else m.layer_type) for m in found]


def check_editable(weights: object) -> None:
    """Raise TypeError if changing the weights in place would change a copy of them."""
    values = list(weights.values()) if isinstance(weights, Mapping) else [weights]
    if any(isinstance(value, np.ndarray) for value in values):
        raise TypeError("expected tensors, got numpy arrays: pass torch.from_numpy(array) instead")
    if not isinstance(weights, nn.Module | Mapping | Tensor):
        raise TypeError(
            "expected an nn.Module, a state dict or a torch.Tensor, which can be changed in place, "
            f"got {type(weights).__name__}"
        )


@torch.no_grad()
def write_(matrix: WeightMatrix, values: Tensor) -> float | Skipped:
    """Write new weights through a layer's view, rounded once, to the nearest, if all are finite.

    To the nearest also in half precision: this step is made once and is far larger than the rounding,
    so that nothing is lost by it, and its error is half that of stochastic rounding, which training
    needs because there many small steps follow each other (`ww_train.steering.rounding`).

    Args:
        matrix: The layer; dtype, device and storage stay.
        values: `(rf, rows, cols)` float64.

    Returns:
        The relative Frobenius distance between the weights before and after, rounding included; or
        `Skipped`, the weights untouched, if the dtype cannot hold the values.

    Cost: one float64 copy of the layer beside `values`; three synchronisations.
    """
    stack = matrix.stack
    rounded = values.to(stack.dtype)
    if not all_finite(rounded):
        return Skipped(matrix.name, f"the result would overflow {stack.dtype}")
    norm = float(torch.linalg.vector_norm(stack, dtype=torch.float64))
    moved = float(torch.linalg.vector_norm(rounded.to(torch.float64, copy=True).sub_(stack)))
    stack.copy_(rounded)
    return moved / norm if norm > 0.0 else 0.0


def _untouchable(matrix: WeightMatrix, min_evals: int) -> str | None:
    if matrix.read_only:
        return matrix.read_only
    if matrix.deferred:
        return "computed from other weights, or not in memory"
    if torch.finfo(matrix.dtype).bits < MIN_BITS:
        return f"weights of {matrix.dtype} have scales that are stored elsewhere"
    if matrix.num_evals < min_evals:
        return f"{matrix.num_evals} eigenvalues, fewer than min_evals={min_evals}"
    return None


def _row(layer: Any) -> dict[str, Any]:
    """The fields of a result; tuples as text."""
    row = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return {
        name: "; ".join(map(str, value)) if isinstance(value, tuple) else value
        for name, value in row.items()
    }
