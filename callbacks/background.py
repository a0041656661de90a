"""Measuring copies of the weights in a thread of its own, while training goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from ww_train import Report, Skipped, measure
from ww_train.ranks import deal
from ww_train.spectrum import Spectrum
from ww_train.weights.matrices import WeightMatrix, weight_matrices

from .budget import Budget, Candidate
from .sharing import Ranks
from .survey import Moment, Occasion, Survey, Taken, joined, work_of
from .timeline import Timeline

COPY_BYTES = 1 << 30
"""Copies of weights that a process may hold for the thread; a larger layer comes alone."""

Layers: TypeAlias = "list[WeightMatrix | Skipped]"


class BackgroundSurvey(Survey):
    """Measures in a thread: at most `COPY_BYTES` of layers at a time, each lot as of its own step.

    When a measurement is due as many layers as fit, the stalest first, are copied where they are and
    handed to the thread; the others follow at the next steps, as soon as it is free. Without CUDA it
    uses one core; with CUDA the copies are decomposed on a stream beside that of training.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._thread: ThreadPoolExecutor | None = None
        self._lot: _Lot | None = None
        self._wanted: list[int] = []

    @property
    def waiting(self) -> bool:  # type: ignore[override]
        """Whether `take` has something to do though nothing is due."""
        return self._lot.done if self._lot else bool(self._wanted)

    def take(self, occasion: Occasion, timeline: Timeline, budget: Budget) -> Taken | None:
        """Copy what the thread is to measure next; the last measurement is made here and now.

        See `Survey.take`. With several processes all must call this at the same steps.
        """
        if occasion.last:
            self.cancel()
            return super().take(occasion, timeline, budget)
        if occasion.due:
            self._wanted = occasion.ranks.decide(lambda: self._order(occasion, timeline, budget))
        if self._wanted and self._lot is None:
            self._begin(occasion)
        return None

    def finished(self, ranks: Ranks, *, wait: bool) -> Taken | None:
        """The lot that the thread has measured, if it has; a collective.

        Raises:
            Exception: Whatever went wrong in the thread, on every rank.
        """
        lot = self._lot
        if lot is None:
            return None
        if not wait and not all(ranks.collect(lot.done)):
            return None
        self._lot = None
        parts = ranks.collect(lot.outcome(alone=ranks.group is None))
        failed = [part for part in parts if isinstance(part, str)]
        if failed:
            raise RuntimeError("; ".join(dict.fromkeys(failed)))
        reports = [part for part in parts if isinstance(part, Taken)]
        seconds = max(part.seconds for part in reports)
        return Taken(joined(part.report for part in reports), lot.moment, seconds)

    def cancel(self) -> None:
        """Wait for the thread, at most until it has done its lot, and end it."""
        self._wanted, self._lot = [], None
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None

    def _order(self, occasion: Occasion, timeline: Timeline, budget: Budget) -> list[int]:
        """Positions of all layers that are stale and not with the thread, the stalest first."""
        if budget.credit <= 0.0:
            return self._wanted
        busy = self._lot.layer_ids if self._lot else ()
        layers = sorted(self._stale(occasion, timeline), key=_staleness)
        return [layer.layer_id for layer in layers if layer.layer_id not in busy]

    def _begin(self, occasion: Occasion) -> None:
        """Copy the next lot and hand it to the thread; with several ranks each copies its part."""
        found, ranks = list(weight_matrices(occasion.model)), occasion.ranks
        layer_ids = _lot_of(self._wanted, found, ranks.size)
        self._wanted = [i for i in self._wanted if i not in layer_ids]
        owners = deal([work_of(found[i]) for i in layer_ids], ranks.size)
        mine = [i for i, owner in zip(layer_ids, owners, strict=True) if owner == ranks.rank]
        copies = _copies(found, layer_ids, mine)
        streams = _streams(copies, mine)
        task = partial(self._measure, copies, mine, occasion.known, streams, occasion.moment)
        self._lot = _Lot(tuple(layer_ids), occasion.moment, self._pool().submit(task))

    def _measure(
        self,
        copies: Layers,
        layer_ids: list[int],
        known: Mapping[str, Spectrum],
        streams: Sequence[torch.cuda.Stream],
        moment: Moment,
    ) -> Taken:
        """In the thread: the report of the copies."""
        started = time.perf_counter()
        if not layer_ids:
            return Taken(Report((), ()), moment, 0.0)
        with _beside(streams):
            report = measure(
                copies,
                layers=layer_ids,
                randomize=self.randomize,
                vectors=self.vectors,
                replicates=self.replicates,
                seed=self.seed,
                spectra=known,
            )
        return Taken(report, moment, time.perf_counter() - started)

    def _pool(self) -> ThreadPoolExecutor:
        if self._thread is None:
            threads = torch.get_num_threads()
            self._thread = ThreadPoolExecutor(1, "ww_train")
            self._thread.submit(torch.set_num_threads, 1).result()
            # a property of each thread, but new ones inherit the last one set
            torch.set_num_threads(threads)
        return self._thread


@dataclass(frozen=True, eq=False)
class _Lot:
    """Layers that are with the thread."""

    layer_ids: tuple[int, ...]
    moment: Moment
    future: Future[Taken]

    @property
    def done(self) -> bool:
        return self.future.done()

    def outcome(self, *, alone: bool) -> Taken | str:
        """What was measured; of several ranks one that failed tells why instead of raising."""
        try:
            return self.future.result()
        except Exception as error:
            if alone:
                raise
            return f"{type(error).__name__}: {error}"


def _staleness(layer: Candidate) -> tuple[int, int, int]:
    return layer.shuffled, layer.measured, layer.layer_id


def _lot_of(wanted: Sequence[int], found: Layers, ranks: int) -> list[int]:
    """The first layers whose copies fit, at least one for each rank."""
    lot: list[int] = []
    held = 0
    for i in wanted:
        matrix = found[i]
        size = 0
        if isinstance(matrix, WeightMatrix):
            size = matrix.num_evals * matrix.N * matrix.dtype.itemsize
        if len(lot) >= ranks and held + size > COPY_BYTES * ranks:
            break
        lot.append(i)
        held += size
    return lot


def _copies(found: Layers, layer_ids: Sequence[int], mine: Sequence[int]) -> Layers:
    """The layers of a model with copies of some; those that are sharded are gathered by all."""
    copies = list(found)
    for i in layer_ids:
        matrix = found[i]
        if isinstance(matrix, WeightMatrix) and (i in mine or matrix.collective):
            copied = _copied(matrix)
            copies[i] = copied if i in mine else found[i]
    return copies


def _copied(matrix: WeightMatrix) -> WeightMatrix:
    """A layer with weights of its own: on its CUDA device if there is room, else on the CPU."""
    stack = matrix.stack.detach()
    device = stack.device if stack.device.type == "cuda" else torch.device("cpu")
    fresh = matrix.deferred and stack.device == device
    try:
        copy = stack if fresh else stack.to(device, copy=True)
    except torch.OutOfMemoryError:
        copy = stack.to("cpu")
    return replace(matrix, weights=copy, parameter=None)


def _streams(copies: Layers, layer_ids: Sequence[int]) -> list[torch.cuda.Stream]:
    """A stream for each CUDA device that has copies, which waits until they are made."""
    streams: dict[torch.device, torch.cuda.Stream] = {}
    for i in layer_ids:
        matrix = copies[i]
        if isinstance(matrix, WeightMatrix) and matrix.device.type == "cuda":
            device = matrix.device
            if device not in streams:
                streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                streams[device].wait_stream(torch.cuda.current_stream(device))
            matrix.stack.record_stream(streams[device])  # not to be reused before it is through
    return list(streams.values())


@contextmanager
def _beside(streams: Sequence[torch.cuda.Stream]) -> Iterator[None]:
    """Work on these streams, in this thread."""
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(torch.cuda.stream(stream))
        yield
