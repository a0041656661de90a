"""The overhead budget: what watching may cost, what it did cost, and what to measure within it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

GRANT = 1.0
"""Seconds that may be spent before they are earned, so that short runs are measured in full."""


class Budget:
    """Keeps the cost of watching within a fraction of the training time.

    After t seconds of training at most `max(fraction * t, GRANT + fraction * t / 2)` may have been
    spent: one second at once, which half of what is earned later pays back, so that after
    `2 * GRANT / fraction` seconds (200 at 1 %) the total is within the fraction. A measurement is
    allowed if its predicted cost fits; what it really cost is charged, so that only the error of
    one prediction can be overdrawn, and it is earned back before anything else is measured.

    Args:
        fraction: Of the training time; None for no limit.
        clock: Seconds that only increase.

    Attributes:
        trained: Seconds of training seen so far: all the time between boundaries.
        spent: Seconds spent on watching so far.
        beside: Seconds that a thread in the background has measured; no part of the others.
    """

    def __init__(
        self, fraction: float | None, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if fraction is not None and not 0.0 < fraction <= 1.0:
            raise ValueError(
                f"budget is a fraction of the training time, above 0 and up to 1, got {fraction}; "
                "None is for no limit"
            )
        self.fraction = fraction
        self.clock = clock
        self.trained = 0.0
        self.spent = 0.0
        self.beside = 0.0
        self._rate: float | None = None  # seconds an operation
        self._since: float | None = None

    def start(self) -> None:
        """Training begins, or begins again: what passed since the last boundary does not count."""
        self._since = self.clock()

    @contextmanager
    def interruption(self) -> Iterator[None]:
        """A boundary: the time before it was training, the time in it is neither."""
        now = self.clock()
        self.trained += 0.0 if self._since is None else now - self._since
        try:
            yield
        finally:
            self._since = self.clock()

    @contextmanager
    def watching(self) -> Iterator[Callable[[], float]]:
        """Charge the time within; gives a function that tells the seconds so far."""
        started = self.clock()
        try:
            yield lambda: self.clock() - started
        finally:
            self.spent += self.clock() - started

    @property
    def credit(self) -> float:
        """Seconds that may be spent now."""
        if self.fraction is None:
            return float("inf")
        earned = self.fraction * self.trained
        return max(earned, GRANT + earned / 2) - self.spent

    def learn(self, work: float, seconds: float) -> None:
        """Remember what a measurement of so many operations took."""
        rate = seconds / work
        self._rate = rate if self._rate is None else (self._rate + rate) / 2

    @property
    def affordable(self) -> float:
        """Operations that may be spent now; no limit as long as nothing was measured."""
        if not self._rate or self.fraction is None:
            return float("inf")
        return max(0.0, self.credit) / self._rate

    @property
    def overhead(self) -> float | None:
        """What watching cost so far as a fraction of the training time; None before any."""
        return self.spent / self.trained if self.trained else None

    def state_dict(self) -> dict[str, float | None]:
        """Plain numbers for a checkpoint."""
        return {
            "trained": self.trained,
            "spent": self.spent,
            "beside": self.beside,
            "rate": self._rate,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the account of a checkpoint."""
        self.trained, self.spent, self._rate = state["trained"], state["spent"], state["rate"]
        self.beside = state.get("beside", 0.0)  # not in older checkpoints


@dataclass(frozen=True)
class Candidate:
    """A layer that could be measured.

    Attributes:
        layer_id: Its position in the model.
        spectrum: Operations of its decomposition and fits.
        shuffles: Operations of the decompositions that count its traps.
        measured: When it was last measured, in steps; -1 for never.
        shuffled: When its traps were last counted.
    """

    layer_id: int
    spectrum: float
    shuffles: float
    measured: int = -1
    shuffled: int = -1

    @property
    def work(self) -> float:
        """Operations of both."""
        return self.spectrum + self.shuffles


@dataclass(frozen=True)
class Agenda:
    """What to measure now, by position in the model.

    Attributes:
        whole: Layers to measure with their traps.
        spectra: Layers to measure without.
        work: Operations in all.
    """

    whole: tuple[int, ...] = ()
    spectra: tuple[int, ...] = ()
    work: float = 0.0


def plan(candidates: Sequence[Candidate], affordable: float) -> Agenda:
    """Choose what to measure for so many operations.

    Everything if it fits. Else the spectra of all layers, and the traps of those whose count is the
    oldest, as far as they fit. If not a single one does, whole layers, the stalest first. A layer that
    costs more than what is left waits until it can be afforded, and those behind it with it, so that
    none starves.
    """
    total = sum(layer.work for layer in candidates)
    if total <= affordable:
        return Agenda(tuple(layer.layer_id for layer in candidates), (), total)
    stalest = sorted(candidates, key=lambda layer: (layer.shuffled, layer.measured, layer.layer_id))
    spectra = sum(layer.spectrum for layer in candidates)
    chosen, work = _first(stalest, [layer.shuffles for layer in stalest], affordable - spectra)
    if chosen:
        rest = {layer.layer_id for layer in candidates} - chosen
        return Agenda(tuple(sorted(chosen)), tuple(sorted(rest)), spectra + work)
    chosen, work = _first(stalest, [layer.work for layer in stalest], affordable)
    return Agenda(tuple(sorted(chosen)), (), work)


def with_spectra(chosen: Agenda, candidates: Sequence[Candidate]) -> Agenda:
    """The same plan with the spectra of all these layers, affordable or not."""
    missing = [c for c in candidates if c.layer_id not in {*chosen.whole, *chosen.spectra}]
    spectra = (*chosen.spectra, *(layer.layer_id for layer in missing))
    work = chosen.work + sum(layer.spectrum for layer in missing)
    return Agenda(chosen.whole, tuple(sorted(spectra)), work)


def _first(
    layers: Sequence[Candidate], costs: Sequence[float], affordable: float
) -> tuple[set[int], float]:
    """As many of the first layers as can be afforded, and what they cost."""
    chosen, work = set[int](), 0.0
    for layer, cost in zip(layers, costs, strict=True):
        if work + cost > affordable:
            break
        chosen.add(layer.layer_id)
        work += cost
    return chosen, work
