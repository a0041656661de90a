"""Measuring copies of the weights in a thread of its own, while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from ww_train import Skipped, measure
from ww_train.cores import one_core
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
Entry: TypeAlias = "tuple[int, WeightMatrix | Skipped]"
"""Position of a layer in the model, and the layer."""


class BackgroundSurvey(Survey):
    """Measures in a thread: at most `COPY_BYTES` of layers at a time, each lot as of its own step.

    The first measurement of all is made in the foreground, so that there are numbers. Then, when one is
    due, as many layers as fit are copied where they are, the stalest first, and handed to the thread;
    the others follow as soon as it is free, of a later step. What is due while the thread is busy with
    the same layers is left out. Without CUDA it uses one core; with CUDA the copies are decomposed on
    a stream beside that of training.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._thread: ThreadPoolExecutor | None = None
        self._lot: _Lot | None = None
        self._wanted: list[str] = []
        self._due: Occasion | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has a thread of its own, and nothing to do yet."""
        return {**self.__dict__, "_thread": None, "_lot": None, "_wanted": [], "_due": None}

    @property
    def measuring(self) -> bool:  # type: ignore[override]
        """Whether the thread has something that was not fetched by `finished`."""
        return self._lot is not None

    @property
    def waiting(self) -> bool:  # type: ignore[override]
        """Whether `finished` or `take` has something to do though nothing is due."""
        return self._lot.done if self._lot else bool(self._wanted)

    def take(self, occasion: Occasion, timeline: Timeline, budget: Budget) -> Taken | None:
        """Copy what the thread is to measure; the first and the last time, measure here and now.

        See `Survey.take`. With several processes all must call this at the same steps.
        """
        if occasion.last:
            known = self._of_the_same_weights(occasion).known
            self.cancel()
            occasion = replace(occasion, known={**known, **occasion.known})
        if occasion.last or (occasion.due and timeline.report is None):
            return super().take(occasion, timeline, budget)
        if occasion.due:
            self._wanted = occasion.ranks.decide(lambda: self._order(occasion, timeline, budget))
            self._due = occasion
        if self._wanted and self._lot is None and occasion.begin:
            self._begin(occasion)
        return None

    def finished(self, ranks: Ranks, budget: Budget, *, wait: bool) -> Taken | None:
        """The lot that the thread has measured, if it has; a collective.

        Raises:
            Exception: Whatever went wrong in the thread, on every rank.
        """
        lot = self._lot
        if lot is None or not (wait or all(ranks.collect(lot.done))):
            return None
        self._lot = None
        parts = ranks.collect(lot.outcome(alone=ranks.group is None))
        failed = [part for part in parts if isinstance(part, str)]
        if failed:
            raise RuntimeError("; ".join(dict.fromkeys(failed)))
        reports = [part for part in parts if isinstance(part, Taken)]
        seconds = max(part.seconds for part in reports)
        budget.beside += seconds
        if lot.work:
            budget.learn(lot.work, seconds)
        return Taken(joined(part.report for part in reports), lot.moment, seconds)

    def cancel(self) -> None:
        """End the thread, which stops behind the layer that it is at, and forget its lot."""
        if self._lot is not None:
            self._lot.stop.set()
        self._wanted, self._lot, self._due = [], None, None
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None

    def _order(self, occasion: Occasion, timeline: Timeline, budget: Budget) -> list[str]:
        """All layers that are stale and not with the thread, the stalest first."""
        if budget.credit <= 0.0:
            return self._wanted
        busy = self._lot.names if self._lot else ()
        layers = sorted(self._stale(occasion, timeline), key=_staleness)
        names = {entry.layer_id: entry.name for entry in self._entries}
        return [name for layer in layers if (name := names[layer.layer_id]) not in busy]

    def _of_the_same_weights(self, occasion: Occasion) -> Occasion:
        """The occasion at which this was due, where the weights are still those."""
        due = self._due
        return due if due is not None and due.moment.step == occasion.moment.step else occasion

    def _begin(self, occasion: Occasion) -> None:
        """Copy the next lot and hand it to the thread; with several ranks each copies its part.

        Raises:
            RuntimeError: On every rank, if they hold different layers.
        """
        wanted, self._wanted = self._wanted, []  # for good, if this fails
        occasion = self._of_the_same_weights(occasion)
        ranks, model = occasion.ranks, list(weight_matrices(occasion.model))
        place = {matrix.name: i for i, matrix in enumerate(model)}
        entries = [(place[name], model[place[name]]) for name in wanted if name in place]
        known_by = [(i, matrix.name, _bytes(matrix)) for i, matrix in entries]
        if any(theirs != known_by for theirs in ranks.collect(known_by)):
            raise RuntimeError("the processes that are to share the layers hold different ones")
        lot = _lot_of(entries, ranks.size)
        self._wanted = [matrix.name for _, matrix in entries[len(lot) :]]
        owners = deal([_bytes(matrix) for _, matrix in lot], ranks.size)
        mine = [owner == ranks.rank for owner in owners]
        names = tuple(matrix.name for _, matrix in lot)
        effort = sum(work_of(matrix) for _, matrix in lot) * (1 + int(self.randomize))
        self._lot = _Lot(names, occasion.moment, effort)
        copies, failure = _copies(len(model), lot, mine)
        if failure is not None:  # told to all ranks by `finished`
            self._lot.future.set_exception(failure)
            return
        task = partial(self._measure, self._lot, copies, _streams(copies), occasion.known)
        self._pool().submit(self._lot.run, task)

    def _measure(
        self,
        lot: _Lot,
        copies: Layers,
        streams: Sequence[torch.cuda.Stream],
        known: Mapping[str, Spectrum],
    ) -> Taken:
        """In the thread: the report of the copies, on the CPU one after another."""
        started = time.perf_counter()
        there = [i for i, copy in enumerate(copies) if not isinstance(copy, _Elsewhere)]
        parts = []
        with _beside(streams):
            for layer_ids in [there] if streams else [[i] for i in there]:
                if lot.stop.is_set() or not threading.main_thread().is_alive():
                    raise RuntimeError("training ended before all layers were measured")
                part = measure(
                    copies,
                    layers=layer_ids,
                    randomize=self.randomize,
                    vectors=self.vectors,
                    replicates=self.replicates,
                    seed=self.seed,
                    spectra=known,
                )
                parts.append(part)
        return Taken(joined(parts), lot.moment, time.perf_counter() - started)

    def _pool(self) -> ThreadPoolExecutor:
        if self._thread is None:
            threads = torch.get_num_threads()
            self._thread = ThreadPoolExecutor(1, "ww_train")
            self._thread.submit(one_core).result()
            torch.set_num_threads(threads)  # new threads inherit the last number that was set
        return self._thread


@dataclass(frozen=True, eq=False)
class _Lot:
    """Layers that are with the thread.

    Attributes:
        names: Of all ranks' layers.
        moment: Of which moment they are.
        work: Operations of all.
        future: What this rank's thread makes of its part.
        stop: Set to let the thread stop.
    """

    names: tuple[str, ...]
    moment: Moment
    work: float
    future: Future[Taken] = field(default_factory=Future)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def done(self) -> bool:
        return self.future.done()

    def run(self, task: partial[Taken]) -> None:
        """Do the work, and keep what comes of it."""
        try:
            self.future.set_result(task())
        except BaseException as error:
            self.future.set_exception(error)

    def outcome(self, *, alone: bool) -> Taken | str:
        """What was measured; of several ranks one that failed tells why instead of raising."""
        try:
            return self.future.result()
        except Exception as error:
            if alone:
                raise
            return f"{type(error).__name__}: {error}"


class _Elsewhere(Skipped):
    """A layer that is not in the lot, or in that of another rank."""


def _staleness(layer: Candidate) -> tuple[int, int, int]:
    return layer.shuffled, layer.measured, layer.layer_id


def _bytes(matrix: WeightMatrix | Skipped) -> int:
    """Size of a layer's copy; 0 if it will be skipped, for which its weights are not needed."""
    if isinstance(matrix, Skipped) or not work_of(matrix):
        return 0
    return matrix.num_evals * matrix.N * matrix.dtype.itemsize


def _lot_of(entries: Sequence[Entry], ranks: int) -> list[Entry]:
    """The first layers whose copies fit, at least one for each rank."""
    lot: list[Entry] = []
    held = 0
    for i, matrix in entries:
        held += _bytes(matrix)
        if len(lot) >= ranks and held > COPY_BYTES * ranks:
            break
        lot.append((i, matrix))
    return lot


def _copies(
    number: int, lot: Sequence[Entry], mine: Sequence[bool]
) -> tuple[Layers, Exception | None]:
    """Copies of this rank's layers at their places in the model, and what went wrong, if anything.

    Whatever happens, a rank takes part in gathering all that is sharded.
    """
    copies: Layers = [_Elsewhere("", "") for _ in range(number)]
    failure: Exception | None = None
    for (i, matrix), own in zip(lot, mine, strict=True):
        if not _bytes(matrix):
            copies[i] = matrix if own else copies[i]
        elif own or (isinstance(matrix, WeightMatrix) and matrix.collective):
            try:
                copy = _copied(matrix)
                copies[i] = copy if own else copies[i]
            except Exception as error:
                failure = failure or error
    return copies, failure


def _copied(matrix: WeightMatrix | Skipped) -> WeightMatrix:
    """A layer with weights of its own: on its CUDA device if there is room, else on the CPU."""
    assert isinstance(matrix, WeightMatrix)
    stack = matrix.stack.detach()
    device = stack.device if stack.device.type == "cuda" else torch.device("cpu")
    fresh = matrix.deferred and stack.device == device
    try:
        copy = stack if fresh else stack.to(device, copy=True)
    except torch.OutOfMemoryError:
        copy = stack.to("cpu")
    return replace(matrix, weights=copy, parameter=None)


def _streams(copies: Layers) -> list[torch.cuda.Stream]:
    """A stream for each CUDA device that has copies, which waits until they are made."""
    streams: dict[torch.device, torch.cuda.Stream] = {}
    for matrix in copies:
        if isinstance(matrix, WeightMatrix) and matrix.device.type == "cuda" and _bytes(matrix):
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
