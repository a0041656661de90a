"""Which layers are decomposed, and the weights of each while it is its turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ww_train.decomposition import Job
from ww_train.linalg import has_float64
from ww_train.selection import Layers, select
from ww_train.spectrum import Array, Spectrum
from ww_train.traps import shuffle
from ww_train.weights.adapters import SUFFIX
from ww_train.weights.matrices import Skipped, Source, WeightMatrix, delta, slices, weight_matrices
from ww_train.weights.stored import CPU, CheckpointError, Deferred

MIN_EVALS, MAX_EVALS = 8, 15000
"""Layers with fewer or more eigenvalues are skipped, unless asked for: the peer's limits."""


class Plan:
    """One layer to decompose, and its weights while they are in memory for it.

    Weights that are in a file, sharded or the difference to a base model are loaded once, when the
    layer's turn comes, and kept until its report is finished.

    Attributes:
        layer_id: Position of the layer in the model.
        matrix: The layer.
        base: What it is compared with, if anything.
        failure: Why its weights could not be read.
        eps: Relative rounding of the weights.
        turn: The layers that are gathered together with this one, each for another process; none if
            it is gathered alone.
    """

    def __init__(self, layer_id: int, matrix: WeightMatrix, base: WeightMatrix | None) -> None:
        self.layer_id = layer_id
        self.matrix = matrix
        self.base = base
        self.failure: str | None = None
        self.eps = torch.finfo(matrix.dtype).eps
        self.turn: tuple[Plan, ...] = ()
        self._attended = False
        self._loaded: WeightMatrix | None = None

    @property
    def collective(self) -> bool:
        """Whether all processes must load the weights together."""
        return self.matrix.collective or (self.base is not None and self.base.collective)

    def weights(self) -> WeightMatrix:
        """The layer or its difference to the base, in memory."""
        if self._loaded is not None:
            return self._loaded
        return self.matrix.loaded() if self.base is None else delta(self.matrix, self.base)

    def load(self) -> None:
        """Read, gather or subtract; what cannot be read becomes a failure with its reason."""
        self._attended = True
        failure: Exception | None = None
        turn, self.turn = self.turn or (self,), ()  # a cycle would keep the weights
        for plan in turn:  # to the end, whatever happens: other processes wait in it
            try:
                with torch.no_grad():
                    plan._bring()
            except Exception as error:
                failure = failure or error
            if plan is not self:
                plan.release()
        if failure is not None:
            raise failure

    def attend(self) -> None:
        """Take part in gathering what the other processes wait for, unless that was done."""
        if self.collective and not self._attended:
            self.load()
            self.release()

    def _bring(self) -> None:
        try:
            matrix = self.matrix.loaded()
            self._loaded = matrix if self.base is None else self._difference(matrix)
        except CheckpointError as error:
            self.failure = str(error)

    def _difference(self, matrix: WeightMatrix) -> WeightMatrix:
        assert self.base is not None
        difference = delta(matrix, self.base)
        size = float(difference.stack.norm())
        if size > 0.0:
            # the difference carries the rounding of the weights, which are larger
            self.eps *= float(torch.linalg.vector_norm(matrix.stack, dtype=torch.float64)) / size
        return difference

    def retreat(self) -> None:
        """Go on in host memory, with what is loaded or will be."""
        with torch.no_grad():
            if self._loaded is not None or not (self.matrix.deferred or self.base):
                self._loaded = self.weights().to(CPU)
                return
        self.matrix = self.matrix.to(CPU)
        self.base = None if self.base is None else self.base.to(CPU)

    def release(self) -> None:
        """Let go of the weights."""
        self._loaded = None

    def job(self, seeds: range, *, own: bool) -> Job:
        """Its own spectrum, unless that is known, and those of its shuffles."""

        def stacks() -> Iterator[Tensor]:
            if self.failure is not None:
                return
            if own:
                core = self._core()
                yield self.weights().stack if core is None else core()
            for seed in seeds:
                yield shuffle(self.weights().stack, seed, self.matrix.name)

        m, base = self.matrix, self.base
        if base is None and (not m.deferred or (self._core() is not None and not seeds)):
            return Job(stacks, m.M, m.device, bool, self.release, self.retreat)
        size = math.prod(m.shape) * (m.dtype.itemsize if base is None else 8)
        return Job(
            stacks, m.M, m.device, self.load, self.release, self.retreat, size, self.collective
        )

    def _core(self) -> Callable[[], Tensor] | None:
        """Makes a small matrix of the same positive eigenvalues, where the layer has one."""
        weights = self.matrix.weights
        return weights.core if isinstance(weights, Deferred) and self.base is None else None

    def spectrum(self, slices: Tensor) -> Spectrum:
        """The pooled spectrum of some of the layer's slices, from their `(number, k)` eigenvalues.

        Where fewer than M of a slice were computed, the others are zero.
        """
        m = self.matrix
        evals: Array = np.zeros((len(slices), m.M))
        evals[:, m.M - slices.shape[1] :] = slices.numpy()
        return replace(m.spectrum(evals * m.scale**2), eps=self.eps)


def selected(
    model: Source, layers: Layers, types: str | tuple[str, ...]
) -> Iterator[tuple[int, WeightMatrix | Skipped]]:
    """Positions and layers of a model that `select` chooses."""
    found = list(weight_matrices(model))
    if layers is None and not types:
        yield from enumerate(found)
        return
    kinds = [m.layer_type if isinstance(m, WeightMatrix) else "skipped" for m in found]
    names = [m.name for m in found]
    for i, chosen in enumerate(select(list(zip(names, kinds, strict=True)), layers, types)):
        if chosen:
            yield i, found[i]


def by_name(model: Source, pool: bool) -> dict[str, WeightMatrix]:
    """The layers of a model by name, or their slices."""
    found = [m for m in weight_matrices(model) if isinstance(m, WeightMatrix)]
    return {part.name: part for m in found for part in ([m] if pool else slices(m))}


def plan_layer(
    layer_id: int,
    matrix: WeightMatrix | Skipped,
    base: dict[str, WeightMatrix] | None,
    min_evals: int,
    max_evals: int | None,
    max_N: int | None,
) -> Plan | Skipped:
    """What is to be decomposed of a layer, or why nothing; of `base` the layer of the same name."""
    if isinstance(matrix, Skipped):
        return matrix
    name, num = matrix.name, matrix.num_evals
    if base is None and matrix.max_rank < min(num, min_evals):
        return Skipped(
            name,
            f"{matrix.max_rank} positive eigenvalues by its rank, fewer than min_evals={min_evals}",
        )
    if num < min_evals:
        return Skipped(name, f"{num} eigenvalues, fewer than min_evals={min_evals}")
    if max_evals is not None and num > max_evals:
        return Skipped(name, f"{num} eigenvalues, more than max_evals={max_evals}")
    if max_N is not None and max_N < matrix.N:
        return Skipped(name, f"N = {matrix.N}, more than max_N={max_N}")
    if not has_float64(matrix.device):
        matrix = matrix.later(CPU)
    if base is None:
        return Plan(layer_id, matrix, None)
    partner = base.get(name)
    if partner is None:
        hint = ": it is a difference already, measure it without" if name.endswith(SUFFIX) else ""
        return Skipped(name, f"the base model has no layer of this name{hint}")
    if partner.shape != matrix.shape:
        shapes = f"{matrix.shape} here, {partner.shape} in the base model"
        return Skipped(name, f"shape {shapes}")
    return Plan(layer_id, matrix, partner)
