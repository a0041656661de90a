"""What makes correlation traps: the entries and means that a shuffle cannot break up.

A shuffled matrix is noise plus rank-one parts, so that a screen without any decomposition names the
weights behind its spikes; `ww_train.traps.count_traps` counts the spikes themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ww_train.marchenko_pastur import FALSE_ALARM, MPFit, mp_edges, signal_energy, tracy_widom_edge
from ww_train.spectrum import EPS64, Array
from ww_train.weights.matrices import WeightMatrix


@dataclass(frozen=True)
class TrapCause:
    """What makes a trap: one entry that is too large, or the mean of a slice.

    Attributes:
        kind: "entry" or "mean".
        slice_id: Index of the slice in `WeightMatrix.stack`.
        row: Row of the entry in its slice; None for a mean.
        column: Column of the entry; None for a mean.
        value: The weight, or the mean of the slice without its named entries; not scaled by c.
        theta: Singular value it contributes, in units of the square root of the eigenvalues.
        rand_eval: Where theory puts the eigenvalue of the shuffled matrix.
    """

    kind: Literal["entry", "mean"]
    slice_id: int
    row: int | None
    column: int | None
    value: float
    theta: float
    rand_eval: float

    def __str__(self) -> str:
        where = "mean" if self.kind == "mean" else f"entry ({self.row}, {self.column})"
        of_slice = f" of slice {self.slice_id}" if self.slice_id else ""
        return f"{where}{of_slice} = {self.value:.3g}"


def trap_causes(matrix: WeightMatrix, mp: MPFit | None = None) -> tuple[TrapCause, ...]:
    """Name the weights that make a layer's traps, without shuffling or decomposing anything.

    A shuffled matrix is noise plus rank-one parts that the shuffle cannot break up: the mean, of
    strength `theta = |mean| sqrt(N M)`, and every single entry, `theta = |w - mean|`. A part shows
    as a spike at `(theta² + sigma² N)(theta² + sigma² M) / theta²` if `theta > sigma (N M)^¼`
    (Benaych-Georges and Nadakuditi, J. Multivariate Analysis 111 (2012) 120). Named is what this puts
    above the threshold of the bulk, Tracy-Widom margin included. At that line a shuffle shows the
    entry as a trap in 4 of 10 cases, 10 % below it in 1 and 10 % above it in 8.

    The number of causes is what `count_traps` finds as long as large entries are sparse. It differs
    for two reasons, both of which depend on the shuffle: named entries that meet in a row or column
    share one spike, and entries below the line that meet add up to one. With heavy tails (Student-t
    of 2 to 4 degrees of freedom) the second makes a quarter of the traps or more, and those come from
    no weight in particular. `without_causes` and the same seeded shuffle tell how many remain. Nor is
    a slice named that stands out as a whole: if its weights are larger than those of the others by a
    tenth, the edge of its own noise exceeds the threshold of a pooled fit.

    Args:
        matrix: The layer. All slices are measured against one bulk, as in `fit_mp`.
        mp: Bulk of the shuffled layer, `count_traps(...).mp`; None to compute it from the entries,
            by the same balance of energy.

    Returns:
        Means and entries, strongest first; at most M above and M below the mean of each slice. Empty
        if a weight is not finite.

    Cost: a few passes over the weights and `8 N M rf` bytes; one copy to the host.
    """
    entries = _largest_entries(matrix)
    if not math.isfinite(entries.energy):
        return ()
    named = np.ones(entries.values.shape, dtype=bool)  # the first means are trimmed of all these
    for _ in range(2):
        means, theta, energy = _rank_one_parts(entries, named, matrix)
        order = np.argsort(-theta, kind="stable")
        count, variance = _stand_out(theta[order] ** 2, energy, matrix, mp)
        named = np.isin(np.arange(matrix.rf, len(theta)), order[:count]).reshape(named.shape)

    N, M, rf, c = matrix.N, matrix.M, matrix.rf, matrix.scale
    causes = []
    for index in order[:count].tolist():
        strength = float(theta[index]) ** 2
        spike = (strength + variance * N) * (strength + variance * M) / strength
        predicted = {"theta": c * math.sqrt(strength), "rand_eval": c * c * spike}
        if index < rf:
            causes.append(TrapCause("mean", index, None, None, float(means[index]), **predicted))
        else:
            slice_id, k = divmod(index - rf, entries.values.shape[1])
            row, column = divmod(int(entries.places[slice_id, k]), matrix.stack.shape[-1])
            value = float(entries.values[slice_id, k])
            causes.append(TrapCause("entry", slice_id, row, column, value, **predicted))
    return tuple(causes)


def without_causes(matrix: WeightMatrix, causes: Sequence[TrapCause]) -> Tensor:
    """A copy of a layer's stack without what makes its traps.

    Named entries become the mean of the other entries of their slice; where the mean of a slice is
    named too, that mean is then taken off all of them. Nothing is done to the correlations, which are
    what the layer has learned. Writing it back, `matrix.stack.copy_(...)`, is left to the caller.

    Args:
        matrix: The layer.
        causes: What to remove, from `trap_causes`.

    Returns:
        `(rf, rows, cols)` in the dtype and on the device of the stack; no synchronisation.
    """
    stack = matrix.stack.detach().clone()
    for slice_id in {cause.slice_id for cause in causes}:
        part = stack[slice_id]
        here = [cause for cause in causes if cause.slice_id == slice_id]
        entries = [cause for cause in here if cause.kind == "entry"]
        places = [[cause.row for cause in entries], [cause.column for cause in entries]]
        rows, columns = torch.tensor(places, dtype=torch.int64, device=part.device)
        part[rows, columns] = 0
        mean = part.sum(dtype=torch.float64) / max(part.numel() - len(entries), 1)
        part[rows, columns] = mean.to(part.dtype)
        if len(entries) < len(here):
            part.sub_(mean)
    return stack


@dataclass(frozen=True, eq=False)
class _Entries:
    """Host copy of a layer's sums and of the largest and smallest entries of each slice.

    `sums` is `(rf,)`, `energy` the sum of all squares; `values` and `places`, the index in the flat
    slice, are `(rf, 2k)`. Both ends hold the k entries farthest from any mean, which is not known yet.
    """

    sums: Array
    energy: float
    values: Array
    places: Array


def _largest_entries(matrix: WeightMatrix) -> _Entries:
    flat = matrix.stack.detach().flatten(1)
    sums = flat.sum(dim=1, dtype=torch.float64)
    norms = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    # a slice has M eigenvalues, hence no more spikes; some entries must be left to have a mean
    k = min(matrix.M, (flat.shape[1] - 1) // 2)
    ends = [flat.topk(k, dim=1, largest=largest, sorted=False) for largest in (True, False)]
    parts = [sums[:, None], norms[:, None]]
    parts += [end.values.to(torch.float64) for end in ends]
    parts += [end.indices.to(torch.float64) for end in ends]
    host = torch.cat(parts, dim=1).cpu().numpy()
    energy = float((host[:, 1] ** 2).sum())
    return _Entries(host[:, 0], energy, host[:, 2 : 2 * k + 2], host[:, 2 * k + 2 :])


def _rank_one_parts(
    entries: _Entries, named: npt.NDArray[np.bool_], matrix: WeightMatrix
) -> tuple[Array, Array, float]:
    """Means without the named entries; theta of means, then entries; the energy they are part of."""
    size = matrix.N * matrix.M
    means = (entries.sums - (entries.values * named).sum(axis=1)) / (size - named.sum(axis=1))
    excess = entries.values - means[:, None]
    theta = np.append(abs(means) * math.sqrt(size), abs(excess))
    # w² = mean² + excess² + twice their product, which the other entries of the slice sum to zero
    products = float((means * (excess * named).sum(axis=1)).sum())
    return means, theta, entries.energy - 2.0 * products


def _stand_out(
    strengths: Array, energy: float, matrix: WeightMatrix, mp: MPFit | None
) -> tuple[int, float]:
    """How many of the descending strengths theta² show as spikes, and the variance of the noise."""
    N, M, rf, total = matrix.N, matrix.M, matrix.rf, matrix.N * matrix.M * matrix.rf
    # noise that storage and summation make of equal weights: those have no cause but the mean
    rounding = max(torch.finfo(matrix.stack.dtype).eps ** 2, EPS64) * energy / total
    if mp is not None:
        variance = max(mp.bulk_max / mp_edges(N, M)[1] / matrix.scale**2, rounding)
        # the noise beside the spikes, to which the threshold of a fit with spikes belongs
        n, m = (max(side - mp.num_spikes / rf, 1.0) for side in (N, M))
        line = _line(mp.threshold / matrix.scale**2, n, m, variance)
        return int(np.count_nonzero(strengths > line)), variance
    line = _line(tracy_widom_edge(N, M, FALSE_ALARM / rf), N, M, 1.0)
    variances = np.maximum((energy - np.append(0.0, np.cumsum(strengths))) / total, rounding)
    # the last that stands out of the rest: equal entries may hide the first ones among them
    count = int((np.flatnonzero(strengths > line * variances[1:])[-1:] + 1).sum())
    return count, float(variances[count])


def _line(threshold: float, N: float, M: float, variance: float) -> float:
    """Strength theta² of the signal whose spike lies on the threshold, at least the critical one."""
    strength = float(signal_energy(np.array([threshold]), N, M, variance)[0])
    return max(strength, variance * math.sqrt(N * M))
