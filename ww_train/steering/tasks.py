"""Projecting many layers at once: on all cores, in batches on an accelerator."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ww_train.batching import BATCH_BYTES, Shortage, warn_once
from ww_train.cores import one_core_each
from ww_train.decomposition import LARGE
from ww_train.linalg import all_finite, gram, has_float64, symmetric_eigenvectors
from ww_train.selection import Pattern, select
from ww_train.steering.manifold_projection import ManifoldProjection
from ww_train.steering.projection import (
    Operator,
    Projected,
    Projection,
    SpectralProjection,
)
from ww_train.steering.schedules import check_strength
from ww_train.steering.targets import Choice, chosen, projection_targets
from ww_train.weights.matrices import NOT_FINITE, Skipped, WeightMatrix, reasons
from ww_train.weights.stored import CPU

Projections: TypeAlias = "Projection | Mapping[Pattern, Projection]"
"""One projection for all layers, or by pattern: the first that matches a layer's name."""

Then: TypeAlias = Callable[[WeightMatrix, Operator], object]
"""Called after a matrix has changed, with the operator that was applied to it."""


@dataclass(frozen=True)
class Failed(Skipped):
    """A layer whose projection raised; its weights are as they were.

    Attributes:
        error: What was raised.
    """

    error: Exception


@dataclass(frozen=True, eq=False)
class Task:
    """A matrix and what to do to it."""

    matrix: WeightMatrix
    projection: Projection

    @property
    def cost(self) -> float:
        """Operations of the eigendecomposition and the products, up to a factor."""
        m = self.matrix
        return float(m.rf) * m.M * m.M * (5.0 * m.M + 2.0 * m.N)


Outcome: TypeAlias = "Projected | Skipped"

_Decomposed: TypeAlias = "tuple[dict[int, Outcome], dict[int, tuple[Tensor, Tensor]]]"


def assign(
    targets: Sequence[WeightMatrix | Skipped], projections: Projections
) -> list[Task | Skipped]:
    """Give every target its projection; layers that no pattern matches are skipped.

    Raises:
        ValueError: If a pattern matches no layer.
    """
    if not isinstance(projections, Mapping):
        return [t if isinstance(t, Skipped) else Task(t, projections) for t in targets]
    catalogue = [(target.name, "") for target in targets]
    flags = [(select(catalogue, pattern), p) for pattern, p in projections.items()]
    result: list[Task | Skipped] = []
    for i, target in enumerate(targets):
        matching = [projection for matches, projection in flags if matches[i]]
        if isinstance(target, WeightMatrix) and matching:
            result.append(Task(target, matching[0]))
        elif isinstance(target, WeightMatrix):
            result.append(Skipped(target.name, "no pattern of the projections matches it"))
        else:
            result.append(target)
    return result


@torch.no_grad()
def project_all_(tasks: Sequence[Task], strength: float, then: Then | None = None) -> list[Outcome]:
    """Project each matrix; one that fails is `Failed` and leaves the others alone.

    On the CPU small layers are spread over the cores, on an accelerator the Gram matrices of one
    size are decomposed as a batch; projections that are not spectral go one after another. On a
    device without float64, or without the memory, a copy on the CPU is projected and written back.
    """
    short = warn_once()
    results: dict[int, Outcome] = {}
    spectral = [i for i, t in enumerate(tasks) if isinstance(t.projection, SpectralProjection)]
    on_cpu = [i for i in spectral if tasks[i].matrix.stack.device.type == "cpu"]
    small = [i for i in on_cpu if tasks[i].matrix.M < LARGE]
    if len(small) > 1 and torch.get_num_threads() > 1:
        with one_core_each() as pool:
            done = pool.map(lambda i: _project(tasks[i], strength, then, short), small)
            results.update(zip(small, done, strict=True))
    elsewhere = [i for i in spectral if i not in on_cpu and has_float64(tasks[i].matrix.device)]
    for batch in _batches(tasks, elsewhere):
        outcomes = _project_batch([tasks[i] for i in batch], strength, then, short)
        results.update(zip(batch, outcomes, strict=True))
    for i, task in enumerate(tasks):
        if i not in results:
            results[i] = _project(task, strength, then, short)
    return [results[i] for i in range(len(tasks))]


def _project(task: Task, strength: float, then: Then | None, short: Shortage) -> Outcome:
    device = task.matrix.device
    if not has_float64(device):
        return _project_on_host(task, strength, then)
    outcome = _project_there(task, strength, then)
    return _project_on_host(task, strength, then) if _starved(outcome, task, short) else outcome


def _starved(outcome: Outcome, task: Task, short: Shortage) -> bool:
    """Whether a projection failed because memory did not suffice, which is told."""
    if not (isinstance(outcome, Failed) and isinstance(outcome.error, torch.OutOfMemoryError)):
        return False
    short(task.matrix.device)
    return True


def _project_there(task: Task, strength: float, then: Then | None) -> Outcome:
    """Project where the weights are."""
    matrix, projection = task.matrix, task.projection
    if then is None or not isinstance(projection, SpectralProjection):
        return _guarded(matrix, partial(projection.project_, matrix, strength))
    after = partial(then, matrix)
    return _guarded(matrix, partial(projection.project_, matrix, strength, then=after))


def _project_on_host(task: Task, strength: float, then: Then | None) -> Outcome:
    """Project a copy on the CPU, and write it back."""
    matrix = task.matrix
    of_original = None if then is None else lambda _copy, operator: then(matrix, operator)
    try:
        here = replace(task, matrix=matrix.to(CPU))
        outcome = _project_there(here, strength, of_original)
        if isinstance(outcome, Projected):
            matrix.stack.copy_(here.matrix.stack)
    except Exception as error:
        return _failed(matrix, error)
    return outcome


@torch.no_grad()  # a property of the thread
def _guarded(matrix: WeightMatrix, step: Callable[[], Outcome]) -> Outcome:
    """What a step returns; if it raises, however far it came, the weights are put back."""
    before: Tensor | None = None
    try:
        before = matrix.stack.clone()
        return step()
    except Exception as error:
        if before is not None:
            matrix.stack.copy_(before)
        return _failed(matrix, error)


def _failed(matrix: WeightMatrix, error: Exception) -> Failed:
    # not the traceback: its frames would keep weights and eigenvectors
    where = "".join(traceback.format_tb(error.__traceback__))
    error = error.with_traceback(None)
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(f"while projecting {matrix.name}:\n{where}")
    reason = f"the projection failed: {type(error).__name__}: {error}"
    return Failed(matrix.name, reason, error)


def _batches(tasks: Sequence[Task], chosen: Sequence[int]) -> Iterator[list[int]]:
    """Matrices of one Gram size and device, at most `BATCH_BYTES` of Gram matrices at a time."""
    sizes: dict[tuple[torch.device, int], list[int]] = {}
    for i in chosen:
        matrix = tasks[i].matrix
        sizes.setdefault((matrix.stack.device, matrix.M), []).append(i)
    for (_, M), indices in sizes.items():
        batch: list[int] = []
        slices = 0
        for i in indices:
            if batch and (slices + tasks[i].matrix.rf) * M * M * 8 > BATCH_BYTES:
                yield batch
                batch, slices = [], 0
            batch.append(i)
            slices += tasks[i].matrix.rf
        yield batch


def _project_batch(
    tasks: Sequence[Task], strength: float, then: Then | None, short: Shortage
) -> list[Outcome]:
    """Decompose together; if that fails, one by one, so that one bad layer spoils only itself."""
    decomposed = _attempt(tasks)
    if decomposed is None:
        return [_project(task, strength, then, short) for task in tasks]
    results, ready = decomposed
    for i, (evals, vectors) in ready.items():
        results[i] = _apply(tasks[i], strength, evals, vectors, then)
        if _starved(results[i], tasks[i], short):
            results[i] = _project_on_host(tasks[i], strength, then)
    return [results[i] for i in range(len(tasks))]


def _attempt(tasks: Sequence[Task]) -> _Decomposed | None:
    """As `_decomposed`; None, with nothing of it held, if it fails."""
    try:
        return _decomposed(tasks)
    except Exception:  # no convergence, no memory, or a projection of one's own
        return None


def _decomposed(tasks: Sequence[Task]) -> _Decomposed:
    """Which are skipped, and eigenvalues, on the host, and vectors of the others."""
    skipped: dict[int, Outcome] = {}
    grams: dict[int, Tensor] = {}
    for i, task in enumerate(tasks):
        assert isinstance(task.projection, SpectralProjection)
        if refusal := task.projection.refusal(task.matrix):
            skipped[i] = Skipped(task.matrix.name, refusal)
        else:
            grams[i] = gram(task.matrix.stack, task.matrix.scale)
    if grams:  # one synchronisation for all
        finite = torch.stack([all_finite(g) for g in grams.values()]).tolist()
        for i in [i for i, ok in zip(grams, finite, strict=True) if not ok]:
            del grams[i]
            skipped[i] = Skipped(tasks[i].matrix.name, NOT_FINITE)
    if not grams:
        return skipped, {}
    evals, vectors = symmetric_eigenvectors(torch.cat(list(grams.values())))
    sizes = [len(g) for g in grams.values()]
    pairs = zip(torch.split(evals.cpu(), sizes), torch.split(vectors, sizes), strict=True)
    return skipped, dict(zip(grams, pairs, strict=True))


def _apply(
    task: Task, strength: float, evals: Tensor, vectors: Tensor, then: Then | None
) -> Outcome:
    matrix, projection = task.matrix, task.projection
    assert isinstance(projection, SpectralProjection)
    apply_, after = projection.apply_, None if then is None else partial(then, matrix)
    return _guarded(matrix, partial(apply_, matrix, strength, evals, vectors, then=after))


def project_(
    model: nn.Module,
    strength: float = 1.0,
    *,
    projection: Projections | None = None,
    include: Choice = None,
    exclude: Choice = None,
) -> tuple[Outcome, ...]:
    """Project a model once, in place, without an optimizer.

    A finished model pays for a hard projection with accuracy; during training let `WWPGD` raise the
    strength slowly instead. A warning says so; others name layers that failed, or say why there was
    none to project.

    Args:
        model: Its matrices are the targets of `WWPGD`: no embeddings, norms, LoRA factors.
        strength: 0 (stay) to 1 (arrive).
        projection: What to do; `ManifoldProjection()` by default, or one for each pattern.
        include: Only these layers: patterns or a predicate on the `WeightMatrix`.
        exclude: Not these layers.

    Returns:
        What was done to each layer, or why not.

    Raises:
        TypeError: If model is not a module.
        ValueError: If strength is not in 0..1 or a pattern matches no layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    check_strength(strength)
    targets = chosen(projection_targets(None, model), include, exclude)
    tasks = assign(targets, ManifoldProjection() if projection is None else projection)
    if strength > MILD:
        warnings.warn(
            f"a projection of strength {strength:g} costs a finished model accuracy; measure it, or "
            "let WWPGD raise the strength during training",
            stacklevel=2,
        )
    done = iter(project_all_([task for task in tasks if isinstance(task, Task)], strength))
    results = tuple(next(done) if isinstance(task, Task) else task for task in tasks)
    failed = [result for result in results if isinstance(result, Failed)]
    for layer in failed:
        warnings.warn(f"layer {layer.name} is left as it is, {layer.reason}", stacklevel=2)
    if not failed and not any(isinstance(result, Projected) for result in results):
        why = reasons([result for result in results if isinstance(result, Skipped)])
        warnings.warn(f"no layer is projected ({why})", stacklevel=2)
    return results


MILD = 0.1
"""Strength up to which a single projection of a trained network hardly costs anything."""
