"""Measuring copies of the weights in a thread of its own, while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ww_train import measure
from ww_train.cores import one_core
from ww_train.ranks import deal
from ww_train.spectrum import Spectrum
from ww_train.weights.matrices import WeightMatrix, weight_matrices

from .budget import Budget, Candidate
from .copies import Elsewhere, Entry, Layers, copies_of, copy_bytes, makers, without_frames
from .sharing import Ranks
from .survey import Moment, Occasion, Survey, Taken, joined, work_of
from .timeline import Timeline

COPY_BYTES = 1 << 30
"""Copies of weights that a process may hold for the thread; a larger layer comes alone."""


class BackgroundSurvey(Survey):
    """Measures in a thread: at most `COPY_BYTES` of layers at a time, each lot as of its own step.

    The first measurement of all is made in the foreground, so that there are numbers. Then, when one is
    due, as many layers as fit are copied where they are, the stalest first, and handed to the thread;
    the others follow as soon as it is free, of a later step. What is due while the thread is busy with
    the same layers is left out. Without CUDA it uses one core; with CUDA the copies are decomposed on
    a stream beside that of training, if the device has room for it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._thread: ThreadPoolExecutor | None = None
        self._lot: _Lot | None = None
        self._wanted: list[str] = []
        self._due: Occasion | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy has a thread of its own, and nothing to do yet."""
        idle: dict[str, Any] = {
            "_thread": None,
            "_lot": None,
            "_wanted": [],
            "_due": None,
            "_streams": {},
        }
        return {**self.__dict__, **idle}

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
        self._measured(lot)
        reports = [part for part in parts if isinstance(part, Taken)]
        seconds = max(part.seconds for part in reports)
        budget.beside += seconds
        if lot.work:
            budget.learn(lot.work, seconds)
        return Taken(joined(part.report for part in reports), lot.moment, seconds)

    def cancel(self) -> None:
        """End the thread, which stops behind the layers that it is at, and forget its lot."""
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

    def _measured(self, lot: _Lot) -> None:
        """What a projection left of these layers is known from now on: not to be measured again."""
        due = self._due
        if due is not None and due.moment is lot.moment:
            known = {name: own for name, own in due.known.items() if name not in lot.names}
            self._due = replace(due, known=known)

    @property
    def _whole(self) -> bool:
        """Whether all entries of a low-rank product are needed, and not its spectrum alone."""
        return bool(self.randomize or self.vectors)

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
        sizes = {i: copy_bytes(matrix, self._whole) for i, matrix in entries}
        known_by = [(i, matrix.name, sizes[i]) for i, matrix in entries]
        if any(theirs != known_by for theirs in ranks.collect(known_by)):
            raise RuntimeError("the processes that are to share the layers hold different ones")
        lot = _lot_of(entries, sizes, ranks.size)
        self._wanted = [matrix.name for _, matrix in entries[len(lot) :]]
        owners = deal([sizes[i] for i, _ in lot], ranks.size)
        mine = [owner == ranks.rank for owner in owners]
        names = tuple(matrix.name for _, matrix in lot)
        effort = sum(work_of(matrix) for _, matrix in lot) * (1 + int(self.randomize))
        self._lot = _Lot(names, occasion.moment, effort)
        try:
            copies = copies_of(len(model), lot, mine, whole=self._whole)
            streams = self._streams_of(copies)
            task = partial(self._measure, self._lot, copies, streams, occasion.known)
            self._pool().submit(self._lot.run, task)
        except Exception as error:  # told to all ranks by `finished`
            self._lot.future.set_exception(without_frames(error))

    def _streams_of(self, copies: Layers) -> list[torch.cuda.Stream]:
        """The stream of each CUDA device that has copies, which waits until they are made.

        Always the same ones: memory that was freed serves the stream again that it was used on.
        """
        streams: dict[torch.device, torch.cuda.Stream] = {}
        for matrix in copies:
            if not isinstance(matrix, WeightMatrix) or matrix.device.type != "cuda":
                continue
            if not copy_bytes(matrix, self._whole):
                continue
            device = matrix.device
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream = self._streams[device]
            if device not in streams:
                stream.wait_stream(torch.cuda.current_stream(device))
                streams[device] = stream
            for make in makers(matrix, whole=self._whole):
                make().record_stream(stream)  # not to be reused before it is through
        return list(streams.values())

    def _measure(
        self,
        lot: _Lot,
        copies: Layers,
        streams: Sequence[torch.cuda.Stream],
        known: Mapping[str, Spectrum],
    ) -> Taken:
        """In the thread: the report of the copies, on the CPU one after another."""
        started = time.perf_counter()
        parts = []
        with _beside(streams):
            for layer_ids in _turns(copies, together=bool(streams)):
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
            self.future.set_exception(without_frames(error))

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


def _lot_of(entries: Sequence[Entry], sizes: Mapping[int, int], ranks: int) -> list[Entry]:
    """The first layers whose copies fit, at least one for each rank."""
    lot: list[Entry] = []
    held = 0
    for i, matrix in entries:
        held += sizes[i]
        if len(lot) >= ranks and held > COPY_BYTES * ranks:
            break
        lot.append((i, matrix))
    return lot


def _turns(copies: Layers, *, together: bool) -> list[list[int]]:
    """Positions of the copies that are measured in one go: of one size together, or each alone."""
    turns: dict[int, list[int]] = {}
    for i, copy in enumerate(copies):
        if not isinstance(copy, Elsewhere):
            size = copy.M if isinstance(copy, WeightMatrix) else 0
            turns.setdefault(size if together else i, []).append(i)
    return list(turns.values())


@contextmanager
def _beside(streams: Sequence[torch.cuda.Stream]) -> Iterator[None]:
    """Work on these streams, in this thread."""
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(torch.cuda.stream(stream))
        yield
