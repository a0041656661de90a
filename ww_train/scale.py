"""What watching and steering a model takes in time, memory and traffic, on paper.

From the shapes of the model's matrices and the measured costs of a device, for any number of
processes ("ranks"). Nothing of the model is computed or even in memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ww_train.batching import BATCH_BYTES
from ww_train.costs import Costs
from ww_train.decomposition import LARGE
from ww_train.linalg import CHUNK_BYTES
from ww_train.planning import MAX_EVALS, Plan, plan_layer
from ww_train.power_law import SMALL_N
from ww_train.ranks import deal
from ww_train.weights.matrices import Skipped, Source, WeightMatrix, weight_matrices

ONE_CORE = 2 * LARGE
"""Size up to which `decompose` gives layers a core each, as long as there is one for every core."""

FIT = 1e-3
"""Seconds of what is computed of one spectrum on the host, about the same for all sizes."""

REPORT = 512
"""Bytes of a layer's report beside its eigenvalues."""


@dataclass(frozen=True)
class Work:
    """What is done to a layer.

    Attributes:
        spectra: Decompositions of the weights, without vectors.
        shuffles: Decompositions of shuffled weights.
        projections: Decompositions with vectors, and two products with them.
    """

    spectra: int = 0
    shuffles: int = 0
    projections: int = 0

    @property
    def values(self) -> int:
        """Decompositions without vectors."""
        return self.spectra + self.shuffles


SPECTRA = Work(spectra=1)
TRAPS = Work(spectra=1, shuffles=1)
PROJECTION = Work(projections=1)


@dataclass(frozen=True)
class Load:
    """What one round over the layers takes.

    Attributes:
        layers: Number of layers.
        seconds: Of one rank that does everything.
        longest: Seconds until the last rank is done, traffic included if its rate is known.
        memory: Bytes beyond the model on the rank that needs the most, for weights that are there.
        gathered: Bytes that each rank receives if the weights are sharded: every layer once.
        largest: Bytes of the largest layer when it is gathered.
        results: Bytes of results, which each rank receives: reports, or projected weights.
    """

    layers: int
    seconds: float
    longest: float
    memory: int
    gathered: int
    largest: int
    results: int

    def every(self, step_seconds: float, overhead: float) -> int:
        """Steps from one round to the next that keep its cost within a share of the training."""
        return max(1, math.ceil(self.longest / (overhead * step_seconds)))


@dataclass(frozen=True)
class Scale:
    """A model on a number of ranks.

    Attributes:
        ranks: Their number.
        parameters: Numbers in the matrices of the model, also those that are skipped for their size.
        skipped: Matrices that `measure` would not analyse, with the reasons.
        spectra: A round of spectra.
        traps: A round of spectra and correlation traps.
        projection: A round of projections, at most: all singular values move.
    """

    ranks: int
    parameters: int
    skipped: tuple[Skipped, ...]
    spectra: Load
    traps: Load
    projection: Load


def scale(
    model: Source,
    costs: Costs,
    ranks: int = 1,
    *,
    max_evals: int | None = MAX_EVALS,
    network: float = math.inf,
) -> Scale:
    """What watching and steering a model takes.

    Args:
        model: As in `measure`; of a file only the headers are read.
        costs: Of the device of each rank.
        ranks: Processes that share the layers (`ww_train.ranks.deal`).
        max_evals: Layers with more eigenvalues are not measured, as in `measure`; None for no limit.
        network: Bytes a second that a rank receives; the weights are then taken to be sharded, and
            gathering them is added to the time. Infinity leaves traffic out.

    Raises:
        ValueError: If the model has no matrix or a number makes no sense.
    """
    if ranks < 1 or not network > 0.0:
        raise ValueError(f"ranks and network are positive, got {ranks} and {network}")
    found = list(weight_matrices(model))
    matrices = [matrix for matrix in found if isinstance(matrix, WeightMatrix)]
    if not matrices:
        raise ValueError("there is no matrix in the model")
    plans = [plan_layer(i, layer, None, 8, max_evals, None) for i, layer in enumerate(found)]
    measured = [plan.matrix for plan in plans if isinstance(plan, Plan)]
    projected = [m for m in matrices if m.layer_type != "embedding" and m.num_evals >= SMALL_N]
    return Scale(
        ranks,
        sum(math.prod(m.shape) for m in matrices),
        tuple(plan for plan in plans if isinstance(plan, Skipped)),
        load(measured, costs, ranks, SPECTRA, network),
        load(measured, costs, ranks, TRAPS, network),
        load(projected, costs, ranks, PROJECTION, network),
    )


def load(
    matrices: Sequence[WeightMatrix],
    costs: Costs,
    ranks: int,
    work: Work,
    network: float = math.inf,
) -> Load:
    """What one round of `work` over these layers takes, dealt to the ranks by their seconds."""
    owners = deal([seconds([m], costs, work) for m in matrices], ranks)
    dealt: dict[int, list[WeightMatrix]] = {}
    for matrix, owner in zip(matrices, owners, strict=True):
        dealt.setdefault(owner, []).append(matrix)
    weights = [math.prod(m.shape) * m.dtype.itemsize for m in matrices]
    gathered = sum(weights) * (ranks - 1) // ranks
    evals = sum(8 * m.num_evals for m in matrices) * (work.values + 2 * work.projections)
    results = evals + REPORT * len(matrices) + work.projections * sum(weights)
    traffic = (gathered + results) / network if ranks > 1 else 0.0
    return Load(
        len(matrices),
        seconds(matrices, costs, work),
        max((seconds(own, costs, work) for own in dealt.values()), default=0.0) + traffic,
        max((memory(own, costs, work) for own in dealt.values()), default=0),
        gathered,
        max(weights, default=0),
        results,
    )


def seconds(matrices: Sequence[WeightMatrix], costs: Costs, work: Work) -> float:
    """Seconds of one rank for its layers; those of one size are decomposed together."""
    sizes = Counter[int]()
    total = 0.0
    for m in matrices:
        sizes[m.M] += m.rf * work.values
        products = work.values + 3 * work.projections  # W V and (W V) Vᵀ cost a Gram matrix each
        total += products * m.rf * costs.gram_seconds(m.N, m.M, m.dtype)
        total += work.projections * m.rf * costs.eigenvector_seconds(m.M)
        if work.shuffles:
            cores = (costs.machine.threads or 1) if _one_core(m, costs) else 1
            total += work.shuffles * costs.shuffle_seconds(math.prod(m.shape)) / cores
        total += FIT * (work.values + work.projections)
    return total + sum(_eigenvalues(costs, M, number) for M, number in sizes.items() if number)


def _eigenvalues(costs: Costs, M: int, number: int) -> float:
    """As `decompose` does it: on the CPU one core for a small matrix, all cores for a large one."""
    if costs.machine.kind != "cpu":
        return costs.eigenvalue_seconds(M, number)
    return number * (costs.batched if M <= ONE_CORE else costs.looped)(M)


def _one_core(matrix: WeightMatrix, costs: Costs) -> bool:
    return costs.machine.kind == "cpu" and matrix.M <= ONE_CORE


def memory(matrices: Sequence[WeightMatrix], costs: Costs, work: Work) -> int:
    """Bytes beyond the weights that a rank needs for its layers, at their peak.

    On the CPU as many small layers as there are threads are in work, or one large one; on an
    accelerator the Gram matrices of one size wait for each other up to `BATCH_BYTES`.
    """
    if costs.machine.kind == "cpu":
        alone = sorted(
            ((m.M <= ONE_CORE, _scratch(m, work) + _decomposed(_grams(m), work)) for m in matrices),
            key=lambda pair: -pair[1],
        )
        small = sum([nbytes for is_small, nbytes in alone if is_small][: costs.machine.threads])
        return max([small, *(nbytes for is_small, nbytes in alone if not is_small)])
    peak = 0
    for M in {m.M for m in matrices}:
        same = [m for m in matrices if m.M == M]
        waiting = [_grams(m) * max(work.values, work.projections) for m in same]
        batch = min(sum(waiting), BATCH_BYTES + max(waiting))
        scratch = max(_scratch(m, work) for m in same)
        # beside what the solver needs, the matrices that wait and their concatenation
        peak = max(peak, batch + scratch, batch + _decomposed(batch, work))
    return peak


def _grams(matrix: WeightMatrix) -> int:
    return 8 * matrix.rf * matrix.M**2


def _decomposed(grams: int, work: Work) -> int:
    """The matrices, a copy without what is not finite, and the solver's; or vectors and workspace."""
    return grams * (5 if work.projections else 3)


def _scratch(matrix: WeightMatrix, work: Work) -> int:
    """Copies of the weights: part of them in float64, shuffled with their order, or multiplied."""
    entries = math.prod(matrix.shape)
    if work.projections:  # in float64, times the vectors, the result; rounded, and to put back
        return entries * (24 + 2 * matrix.dtype.itemsize)
    parts = min(2 * CHUNK_BYTES, 8 * entries)  # one is made while the last is still there
    return entries * matrix.dtype.itemsize + max(parts, 4 * entries) if work.shuffles else parts


def step_seconds(
    parameters: int, tokens: float, flops: float, ranks: int = 1, *, efficiency: float = 0.4
) -> float:
    """Seconds of a training step by the rule of 6 operations a parameter and token.

    Args:
        parameters: Parameters that a token passes.
        tokens: Tokens a step, of all ranks.
        flops: Peak operations a second of one rank's device, in the precision of the training.
        ranks: Number of ranks.
        efficiency: Share of the peak that is reached ("MFU").

    Source: Kaplan et al., arXiv:2001.08361, section 2.1.
    """
    return 6.0 * parameters * tokens / (ranks * flops * efficiency)
