"""Measuring as much of a model as a budget allows, by one process or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn

from ww_train import Report, Skipped, measure
from ww_train.calibration import costs_of
from ww_train.decomposition import work
from ww_train.measurement import FIT
from ww_train.planning import MAX_EVALS, MIN_EVALS
from ww_train.selection import Layers, select
from ww_train.spectrum import Spectrum
from ww_train.weights.matrices import WeightMatrix, weight_matrices

from .budget import Agenda, Budget, Candidate, plan, with_spectra
from .sharing import Ranks
from .timeline import Timeline


@dataclass(frozen=True)
class Moment:
    """When the weights were what they are.

    Attributes:
        epoch: Number of epochs finished.
        step: Number of optimizer steps done.
        x: The step of the loggers.
    """

    epoch: int
    step: int
    x: int


@dataclass(frozen=True, eq=False)
class Occasion:
    """A time at which a model could be measured.

    Attributes:
        model: The model.
        moment: When it is.
        ranks: Who measures; the first one plans.
        known: Spectra of this moment, by layer name.
        due: Whether to measure.
        last: Training is over: every spectrum is measured, whatever it costs.
        begin: Whether copies can be made now; else they are at the next step, of the same weights.
    """

    model: nn.Module
    moment: Moment
    ranks: Ranks
    known: Mapping[str, Spectrum]
    due: bool
    last: bool
    begin: bool


@dataclass(frozen=True, eq=False)
class Taken:
    """What was measured, when the weights were so, and how many seconds it took."""

    report: Report
    moment: Moment
    seconds: float


@dataclass(frozen=True)
class Entry:
    """A matrix of a model.

    Attributes:
        layer_id: Its position.
        name: Its name.
        work: Operations of its decomposition; 0 if it is skipped.
    """

    layer_id: int
    name: str
    work: float


class Survey:
    """What is measured of a model; the arguments are those of `ww_train.measure`."""

    measuring = False
    """Whether something is being measured beside training."""

    waiting = False
    """Whether there is more to do at the next step."""

    def __init__(
        self, *, layers: Layers, randomize: int, vectors: bool, replicates: int, seed: int
    ) -> None:
        for name, number in (("randomize", int(randomize)), ("replicates", replicates)):
            if number < 0:
                raise ValueError(f"{name} is a number of 0 or more, got {number}")
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed is a number from 0 to 2**63 - 1, got {seed}")
        self.layers = layers
        self.randomize = randomize
        self.vectors = vectors
        self.replicates = replicates
        self.seed = seed
        self._parameters: list[tuple[str, torch.Size]] = []
        self._entries: tuple[Entry, ...] = ()

    def take(self, occasion: Occasion, timeline: Timeline, budget: Budget) -> Taken | None:
        """Measure what is not of this step already and can be afforded; the same on all ranks.

        Args:
            occasion: What, when and by whom.
            timeline: When each layer was measured last.
            budget: Pays.

        Raises:
            Exception: Whatever went wrong, on every rank.
        """
        started = budget.clock()
        if not occasion.due:
            return None
        chosen = occasion.ranks.decide(lambda: self._plan(occasion, timeline, budget))
        if chosen is None:
            return None
        parts = [
            measure(
                occasion.model,
                layers=list(layer_ids),
                randomize=shuffles,
                vectors=self.vectors,
                replicates=self.replicates,
                seed=self.seed,
                spectra=occasion.known,
                group=occasion.ranks.group,
            )
            for layer_ids, shuffles in ((chosen.whole, self.randomize), (chosen.spectra, 0))
            if layer_ids
        ]
        if chosen.work:
            budget.learn(chosen.work, budget.clock() - started)
        return Taken(joined(parts), occasion.moment, budget.clock() - started)

    def finished(self, ranks: Ranks, budget: Budget, *, wait: bool) -> Taken | None:
        """What was measured beside training since the last call."""
        return None

    def cancel(self) -> None:
        """Training failed: measure nothing more."""

    def _plan(self, occasion: Occasion, timeline: Timeline, budget: Budget) -> Agenda | None:
        step = occasion.moment.step
        layers = self._stale(occasion, timeline)
        if self._entries and not layers:
            return None
        chosen = plan(layers, budget.affordable)
        if occasion.last:
            chosen = with_spectra(chosen, [layer for layer in layers if layer.measured != step])
        return chosen if chosen.whole or chosen.spectra or not self._entries else None

    def _stale(self, occasion: Occasion, timeline: Timeline) -> list[Candidate]:
        """The layers of which something was not measured at this step, or has changed since."""
        step, known = occasion.moment.step, occasion.known
        counted = timeline.shuffled if self.randomize else timeline.measured
        free = () if self.vectors else known  # localisation needs a decomposition of its own
        return [
            Candidate(
                entry.layer_id,
                0.0 if not entry.work else FIT if entry.name in free else FIT + entry.work,
                int(self.randomize) * entry.work,
                timeline.measured.get(entry.name, -1),
                counted.get(entry.name, -1),
            )
            for entry in self._look_up(occasion.model)
            if counted.get(entry.name) != step or entry.name in known
        ]

    def _look_up(self, model: nn.Module) -> tuple[Entry, ...]:
        """The matrices of the model, found again only when its parameters are others."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
        parameters = [(name, p.shape) for name, p in model.named_parameters()]
        if not self._entries or parameters != self._parameters:
            found = list(weight_matrices(model))
            chosen = select([(x.name, "") for x in found], self.layers)
            self._entries = tuple(
                Entry(i, x.name, work_of(x)) for i, x in enumerate(found) if chosen[i]
            )
            self._parameters = parameters
        return self._entries


@contextmanager
def undisturbed(model: nn.Module, *, wait: bool = True) -> Iterator[None]:
    """No gradients and no automatic casting, whatever the training loop has switched on.

    Args:
        model: The model being trained.
        wait: First await what an accelerator still has queued: it is not the cost of watching.
    """
    devices = {p.device for p in model.parameters()} if isinstance(model, nn.Module) else set()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", *(device.type for device in devices)}:
            if _casts(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        for device in devices if wait else ():
            if device.type not in ("cpu", "meta"):
                # at worst the account is off; where a device is lost, measuring will tell
                with suppress(Exception):
                    torch.accelerator.synchronize(device)
        yield


def _casts(kind: str) -> bool:
    """Whether automatic casting is switched on, which some kinds of devices do not know."""
    try:
        return torch.is_autocast_enabled(kind)
    except RuntimeError:
        return False


def acquaint(model: nn.Module) -> None:
    """Have the costs of the model's accelerators measured, which takes seconds, once a machine."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    for device in {p.device for p in parameters}:
        if device.type not in ("cpu", "meta"):
            costs_of(device)


def work_of(matrix: WeightMatrix | Skipped) -> float:
    """Operations of a layer's decomposition; 0 if it is skipped."""
    if isinstance(matrix, Skipped):
        return 0.0
    if matrix.max_rank < MIN_EVALS or matrix.num_evals > MAX_EVALS:
        return 0.0
    return work(matrix.N, matrix.M, matrix.rf)


def joined(parts: Iterable[Report]) -> Report:
    """One report of several, in the order of the model."""
    parts = list(parts)
    layers = [layer for part in parts for layer in part]
    skipped = [layer for part in parts for layer in part.skipped]
    return Report(tuple(sorted(layers, key=lambda layer: layer.layer_id)), tuple(skipped))
