"""Projecting many layers at once: on all cores, in batches on an accelerator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ww_train.linalg import BATCH_BYTES, LARGE, gram
from ww_train.manifold_projection import ManifoldProjection
from ww_train.matrices import Skipped, WeightMatrix
from ww_train.projection import NOT_FINITE, Operator, Projected, Projection, SpectralProjection
from ww_train.schedules import check_strength
from ww_train.selection import Pattern, select
from ww_train.targets import Choice, chosen, projection_targets

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
    size are decomposed as a batch; projections that are not spectral go one after another.
    """
    results: dict[int, Outcome] = {}
    spectral = [i for i, t in enumerate(tasks) if isinstance(t.projection, SpectralProjection)]
    on_cpu = [i for i in spectral if tasks[i].matrix.stack.device.type == "cpu"]
    small = [i for i in on_cpu if tasks[i].matrix.M < LARGE]
    if len(small) > 1 and torch.get_num_threads() > 1:
        threads = torch.get_num_threads()
        # the number of threads is a property of each thread; new ones inherit the last one set
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            done = pool.map(lambda i: _project(tasks[i], strength, then), small)
            results.update(zip(small, done, strict=True))
        torch.set_num_threads(threads)
    for batch in _batches(tasks, [i for i in spectral if i not in set(on_cpu)]):
        outcomes = _project_batch([tasks[i] for i in batch], strength, then)
        results.update(zip(batch, outcomes, strict=True))
    for i, task in enumerate(tasks):
        if i not in results:
            results[i] = _project(task, strength, then)
    return [results[i] for i in range(len(tasks))]


def _project(task: Task, strength: float, then: Then | None) -> Outcome:
    matrix, projection = task.matrix, task.projection
    try:
        if then is None or not isinstance(projection, SpectralProjection):
            return projection.project_(matrix, strength)
        with torch.no_grad():  # a property of the thread
            return projection.project_(matrix, strength, then=lambda op: then(matrix, op))
    except Exception as error:
        return _failed(matrix, error)


def _failed(matrix: WeightMatrix, error: Exception) -> Failed:
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


def _project_batch(tasks: Sequence[Task], strength: float, then: Then | None) -> list[Outcome]:
    """Decompose together; if that fails, one by one, so that one bad layer spoils only itself."""
    results: dict[int, Outcome] = {}
    grams: list[tuple[int, Tensor]] = []
    for i, task in enumerate(tasks):
        assert isinstance(task.projection, SpectralProjection)
        refusal = task.projection.refusal(task.matrix)
        if refusal:
            results[i] = Skipped(task.matrix.name, refusal)
            continue
        grams.append((i, gram(task.matrix.stack, task.matrix.scale)))
    finite = torch.stack([g.isfinite().all() for _, g in grams]).tolist() if grams else []
    for (i, _), ok in zip(grams, finite, strict=True):
        if not ok:
            results[i] = Skipped(tasks[i].matrix.name, NOT_FINITE)
    grams = [pair for pair, ok in zip(grams, finite, strict=True) if ok]
    try:
        evals, vectors = torch.linalg.eigh(torch.cat([g for _, g in grams]))
        host = evals.cpu()
    except RuntimeError:  # no convergence, no memory, or nothing to do
        return [results.get(i) or _project(task, strength, then) for i, task in enumerate(tasks)]
    sizes = [len(g) for _, g in grams]
    for (i, _), e, v in zip(grams, host.split(sizes), vectors.split(sizes), strict=True):
        results[i] = _apply(tasks[i], strength, e, v, then)
    return [results[i] for i in range(len(tasks))]


def _apply(
    task: Task, strength: float, evals: Tensor, vectors: Tensor, then: Then | None
) -> Outcome:
    matrix, projection = task.matrix, task.projection
    assert isinstance(projection, SpectralProjection)
    after = None if then is None else (lambda operator: then(matrix, operator))
    try:
        return projection.apply_(matrix, strength, evals, vectors, then=after)
    except Exception as error:
        return _failed(matrix, error)


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
    strength slowly instead. A warning says so.

    Args:
        model: Its matrices are the targets of `WWPGD`: no embeddings, norms, LoRA factors.
        strength: 0 (stay) to 1 (arrive).
        projection: What to do; `ManifoldProjection()` by default, or one for each pattern.
        include: Only these layers: patterns or a predicate on the `WeightMatrix`.
        exclude: Not these layers.

    Returns:
        What was done to each layer, or why not.

    Raises:
        ValueError: If strength is not in 0..1 or a pattern matches no layer.
    """
    check_strength(strength)
    targets = chosen(projection_targets(None, model), include, exclude)
    tasks = assign(targets, projection or ManifoldProjection())
    if strength > MILD:
        warnings.warn(
            f"a projection of strength {strength:g} costs a finished model accuracy; measure it, or "
            "let WWPGD raise the strength during training",
            stacklevel=2,
        )
    done = iter(project_all_([task for task in tasks if isinstance(task, Task)], strength))
    return tuple(next(done) if isinstance(task, Task) else task for task in tasks)


MILD = 0.1
"""Strength up to which a single projection of a trained network hardly costs anything."""
