"""Taking correlation traps out of a layer and leaving alone what it has learned.

WeightWatcher's `SVDSharpness` counts the spikes of the shuffled matrix and then deletes as many
singular vectors of the matrix itself: the signal goes, the trap stays. A trap comes from named
entries or from the mean (`ww_train.trap_causes`), and those are what is changed here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ww_train.editing.edits import Editable, Edits, edit_, write_
from ww_train.linalg import gram_eigenvalues
from ww_train.selection import Layers
from ww_train.trap_causes import TrapCause, trap_causes, without_causes
from ww_train.traps import Traps, count_traps, shuffle
from ww_train.weights.matrices import Skipped, WeightMatrix, slices


@dataclass(frozen=True, eq=False)
class WithoutTraps:
    """A layer's weights without their traps.

    Attributes:
        stack: `(rf, rows, cols)` float64 copy; entries that no cause names are those of the layer.
        causes: What was taken out, the strongest first; empty if nothing was.
    """

    stack: Tensor
    causes: tuple[TrapCause, ...]


@dataclass(frozen=True)
class TrapsRemoved:
    """What `remove_traps_` did to one layer.

    Attributes:
        name: Dotted path of the layer.
        layer_type: See `ww_train.weights.matrices.WeightMatrix`.
        traps_before: Traps of the seeded shuffle before.
        traps_after: Traps of the same shuffle after. Not zero if some come from no entry in particular,
            as with heavy tails, or by chance, in one shuffle of a hundred.
        causes: The entries and means that were taken out; none from a layer without traps.
        distance: Relative Frobenius distance between the weights before and after.
    """

    name: str
    layer_type: str
    traps_before: int
    traps_after: int
    causes: tuple[TrapCause, ...]
    distance: float


def remove_traps_(
    model: Editable,
    *,
    layers: Layers = None,
    types: str | tuple[str, ...] = (),
    seed: int = 0,
    min_evals: int = 8,
) -> Edits[TrapsRemoved]:
    """Take the correlation traps out of every layer that has some, in place.

    What was learned, the correlations, stays; so does every bit of the entries that are not named,
    unless the mean of their slice is a trap. Dtype, device and storage stay.

    Args:
        model: A module, a state dict of tensors, or one matrix.
        layers: Which layers, as in `measure`.
        types: Which types of layers.
        seed: Seed of the shuffle in which traps are counted, as in `measure`.
        min_evals: Layers with fewer eigenvalues are left alone.

    Returns:
        What was taken out of each layer, and which were left alone and why.

    Raises:
        TypeError: If the model cannot be changed in place.
        ValueError: If a layer or type that was asked for does not exist.

    Cost: the eigenvalues of each layer, and those of a layer with traps once more.
    """

    def edit(matrix: WeightMatrix) -> TrapsRemoved | Skipped:
        try:
            before = shuffled_traps(matrix, seed).num_traps
        except ValueError:
            return Skipped(matrix.name, "all weights are zero, or one is NaN or infinite")
        if before == 0:
            return TrapsRemoved(matrix.name, matrix.layer_type, 0, 0, (), 0.0)
        cleaned = without_traps(matrix)
        distance = write_(matrix, cleaned.stack)
        if isinstance(distance, Skipped):
            return distance
        # weights that were all equal are all zero without their mean
        after = shuffled_traps(matrix, seed).num_traps if bool(matrix.stack.any()) else 0
        kind, causes = matrix.layer_type, cleaned.causes
        return TrapsRemoved(matrix.name, kind, before, after, causes, distance)

    return edit_(model, edit, layers=layers, types=types, min_evals=min_evals)


@torch.no_grad()
def without_traps(matrix: WeightMatrix) -> WithoutTraps:
    """The weights without the entries and means that make traps. Changes nothing.

    A named entry becomes the mean of the other entries of its slice; where the mean of a slice is
    named, it is then taken off all of them (`without_causes`). Each slice is measured against its own
    noise. Spikes of heavy tails that come from no entry in particular stay.

    Args:
        matrix: The layer.

    Returns:
        The new weights in float64, so that they are rounded once, by who writes them. Empty `causes`
        and the weights as they are if no cause is found or a weight is not finite.

    Cost: some passes over the weights and 16 bytes an entry; one copy to the host a slice; nothing is
    shuffled or decomposed.
    """
    matrix = matrix.loaded()
    causes = [
        replace(cause, slice_id=i)
        for i, part in enumerate(slices(matrix))
        for cause in trap_causes(part)
    ]
    causes.sort(key=lambda cause: -cause.theta)
    exact = replace(matrix, weights=matrix.stack.detach().to(torch.float64))
    return WithoutTraps(without_causes(exact, causes), tuple(causes))


@torch.no_grad()
def shuffled_traps(matrix: WeightMatrix, seed: int = 0) -> Traps:
    """Traps of one seeded shuffle of a layer, as `measure(..., randomize=True)` counts them.

    Args:
        matrix: The layer, not all of whose weights are zero.
        seed: Seed of the shuffle; the layer's name is mixed in.

    Raises:
        ValueError: If a weight is not finite, or all are zero.

    Cost: that of the layer's eigenvalues.
    """
    evals = gram_eigenvalues(shuffle(matrix.stack, seed, matrix.name)).cpu().numpy()
    evals *= matrix.scale**2
    parts = [matrix.spectrum(part) for part in evals]
    return count_traps(matrix.spectrum(evals), seed, parts)
