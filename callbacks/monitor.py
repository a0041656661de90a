"""`SpectralMonitor`: watches the spectra of a model in any training loop, within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from ww_train import Projected, Report, Skipped
from ww_train.selection import Layers

from .acting import OnVerdict, WarnOnce, asks_to_stop, tell, warn_of_layers
from .background import BackgroundSurvey
from .budget import Budget
from .early_stopping import StopRule
from .logbook import Logbook
from .loggers import Logger
from .sharing import Ranks, ranks_of
from .steering import end_epochs, find_wwpgd, known_spectra, projection_scalars, wwpgds
from .summary import Summary
from .survey import Moment, Occasion, Survey, Taken, acquaint, undisturbed
from .timeline import Timeline

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SpectralMonitor", "find_wwpgd"]


class SpectralMonitor:
    """Projects with every `WWPGD` among the optimizers, measures the model, logs, keeps a history.

        with SpectralMonitor(model, optimizer, log_to="runs/mine") as monitor:
            for epoch in range(epochs):
                ...  # train for an epoch
                monitor.epoch_end()

    The callbacks for Lightning and Hugging Face do the same by `boundary`. Measuring keeps to a budget:
    the first measurement is made in any case; then, if not everything can be afforded, traps are
    counted for a part of the layers at a time, or whole layers are measured in turn, the stalest
    first. Nothing here raises: whatever fails warns once and training goes on. No global random
    generator is used, and only a WWPGD changes weights. Under DistributedDataParallel the layers are
    dealt to the processes, and the first one writes.

    Args:
        model: The model being trained; with frameworks it comes with each boundary instead.
        optimizers: Its optimizers, in whatever wrappers a framework put them.
        log_to: Where to log: see `ww_train.callbacks.loggers.logger_for`; one target or a list.
        layers: Which layers to watch, as in `ww_train.measure`; None for all.
        randomize: Also count correlation traps, at about twice the cost; how many shuffles.
        vectors: Also measure the localisation of the eigenvectors.
        replicates: Also give alpha an interval from this many bootstrap replicates.
        seed: Seed of the shuffles and the bootstrap.
        every_n_epochs: Measure every n-th epoch; None for not at all. Projections happen in each.
        every_n_steps: Also measure every n-th optimizer step.
        at_start: Measure before the first step.
        at_end: Measure after the last step what has not been measured since, every spectrum even
            beyond the budget.
        background: Measure copies of the weights in a thread, while training goes on: see
            `ww_train.callbacks.background`. What was measured is logged, with the step of the copy,
            when it is ready, at the earliest at the next step or boundary; the budget is then that of
            the copies. Where no core or no part of the GPU is idle, training is slowed all the same.
        budget: What watching may cost as a fraction of the training time: see
            `ww_train.callbacks.budget.Budget`. None to always measure everything.
        early_stop: When to stop: see `ww_train.callbacks.early_stopping`. Sets `should_stop`.
        on_verdict: Called with a `LayerReport` and its previous verdict when the verdict changes; on
            all processes, with the same reports.
        summary: Print a table when training ends.
        clock: Seconds that only increase.

    Attributes:
        report: The latest numbers of every layer, or None; with a budget they need not all be of the
            same step: `timeline.measured` tells.
        projected: What the last boundary's projections did.
        should_stop: Whether `early_stop` asked to stop.
        timeline: First and latest numbers, steps and verdicts of each layer.
        budget: What was trained and spent.
        logbook: History and loggers.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If `log_to` holds something that takes no numbers.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizers: Sequence[Optimizer] | Optimizer = (),
        *,
        log_to: Any = (),
        layers: Layers = None,
        randomize: int = True,
        vectors: bool = False,
        replicates: int = 0,
        seed: int = 0,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        at_start: bool = True,
        at_end: bool = True,
        background: bool = False,
        budget: float | None = 0.01,
        early_stop: StopRule | None = None,
        on_verdict: OnVerdict | None = None,
        summary: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, number in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {number}")
        self.model = model
        self.optimizers = optimizers
        self._warn = WarnOnce()
        self.logbook = Logbook(log_to, self._warn)
        self.background = background
        self.survey = (BackgroundSurvey if background else Survey)(
            layers=layers,
            randomize=randomize,
            vectors=vectors,
            replicates=replicates,
            seed=seed,
        )
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.at_start = at_start
        self.at_end = at_end
        self.budget = Budget(budget, clock=clock)
        self.early_stop = early_stop
        self.on_verdict = on_verdict
        self.summary = summary
        self.timeline = Timeline()
        self.projected: tuple[Projected | Skipped, ...] = ()
        self.should_stop = False
        self._ranks: Ranks | None = None
        self._latest_ranks = Ranks()
        self._epochs = self._steps = 0
        self.budget.start()

    @property
    def report(self) -> Report | None:
        """The latest numbers of every layer."""
        return self.timeline.report

    @property
    def history(self) -> list[dict[str, float]]:
        """A record of everything that was projected and measured together, in the order of logging.

        With `background` what was measured comes later than a projection of the same step.
        """
        return self.logbook.history

    @property
    def settings(self) -> dict[str, Any]:
        """The options that are plain JSON: what a checkpoint tells of them."""
        survey = self.survey
        return {
            "layers": survey.layers if isinstance(survey.layers, str | int | None) else None,
            "randomize": survey.randomize,
            "vectors": survey.vectors,
            "replicates": survey.replicates,
            "seed": survey.seed,
            "every_n_epochs": self.every_n_epochs,
            "every_n_steps": self.every_n_steps,
            "at_start": self.at_start,
            "at_end": self.at_end,
            "background": self.background,
            "budget": self.budget.fraction,
            "summary": self.summary,
        }

    @property
    def changes(self) -> dict[str, float]:
        """Alpha of each layer now minus alpha when it was first measured."""
        return self.timeline.changes

    @property
    def verdict(self) -> str:
        """The verdicts of all layers in one line."""
        return self.report.verdict if self.report else "no layer was measured"

    @property
    def waiting(self) -> bool:
        """Whether `advance` has something to do; never with several processes."""
        return self.survey.waiting and self._latest_ranks.group is None

    # A loop of one's own

    def start(self) -> dict[str, float]:
        """Measure the model before the first step; a `with` block does so."""
        self.begin(step=self._x)
        if not self.at_start:
            return {}
        return self._own_boundary(project=False, due=True)

    def step(self) -> dict[str, float]:
        """Count an optimizer step, and measure if one is due.

        Needed for `every_n_steps` only; with `background` what is ready is logged the sooner.
        """
        self._steps += 1
        if not self.every_n_steps or self._steps % self.every_n_steps:
            return self._own_boundary(project=False, due=False) if self.waiting else {}
        return self._own_boundary(project=False, due=True)

    def epoch_end(self, *, project: bool = True) -> dict[str, float]:
        """End an epoch: project, measure, log.

        Args:
            project: False if the epoch was cut short: it is measured only.

        Returns:
            See `boundary`. The steps are the calls of `step`, or epochs if there were none.
        """
        self._epochs += 1
        return self._own_boundary(project=project)

    def close(self) -> None:
        """End the training: measure what is stale, print the summary, close files opened here."""
        self.finish(self._own_model(), epoch=self._epochs, step=self._x)
        self.logbook.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
            self.logbook.close()

    @property
    def _x(self) -> int:
        return self._steps or self._epochs

    def _own_model(self) -> nn.Module:
        if self.model is None:
            raise ValueError("give the model: SpectralMonitor(model, optimizer)")
        return self.model

    def _own_boundary(self, *, project: bool, due: bool | None = None) -> dict[str, float]:
        return self.boundary(
            self._own_model(),
            self.optimizers,
            epoch=self._epochs,
            step=self._x,
            project=project,
            due=due,
        )

    # For frameworks

    def begin(
        self, *, step: int, log_to: Sequence[Logger] = (), ranks: Ranks | None = None
    ) -> None:
        """Training begins, or goes on after a break.

        Args:
            step: Number of optimizer steps done; with 0 changes are counted from here.
            log_to: Loggers of the framework.
            ranks: The processes that train the model, where the model itself does not tell.
        """
        self.survey.cancel()
        self.logbook.of_framework, self._ranks = tuple(log_to), ranks
        self.should_stop = False
        if step == 0:
            self.timeline = Timeline()
        self.budget.start()

    def boundary(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer] | Optimizer = (),
        *,
        epoch: int,
        step: int,
        project: bool = True,
        due: bool | None = None,
        last: bool = False,
        begin: bool = True,
        log_step: int | None = None,
    ) -> dict[str, float]:
        """Project, measure, log and record, at the end of an epoch or at any other time.

        Layers that were measured at this very step, and not projected since, are not measured again.

        Args:
            model: The model being trained.
            optimizers: Its optimizers.
            epoch: Number of epochs finished.
            step: Number of optimizer steps done.
            project: False to only measure.
            due: Whether to measure; by default at every n-th epoch.
            last: Training is over: measure every spectrum, also beyond the budget.
            begin: With `background`, False if `advance` will be called before the next step: the
                weights are copied then, and a checkpoint in between has nothing to wait for.
            log_step: The x of the loggers, if it is not the step.

        Returns:
            Tags and plain floats for any logger: those of `Report.scalars`, layers only if they were
            measured now, summaries over the latest numbers of all; `ww/num_measured`, `ww/seconds`
            and `ww/overhead`, what measuring took now (with `background`, its thread) and what
            watching took of the training time so far;
            after a projection `ww/distance_mean`, `ww/strength` and `ww_distance/<layer>` (distance
            to criticality before it). Empty if nothing was due or affordable.
        """
        ranks = self._latest_ranks = self._ranks or ranks_of(model)
        self._warn.silent = not ranks.first
        moment = Moment(epoch, step, step if log_step is None else log_step)
        if due is None:
            due = self.every_n_epochs is not None and epoch % self.every_n_epochs == 0
        with self.budget.interruption(), undisturbed(model, wait=not self.background):
            found = list(wwpgds(optimizers)) if project else []
            warn = partial(self._warn, "project")
            self.projected = end_epochs(found, model, ranks, warn)
            known = known_spectra(self.projected, found, model)
            if due:
                self._attempt(partial(acquaint, model))  # not the cost of watching this training
            with self.budget.watching() as spent:
                earlier = self._finished(ranks, spent, wait=last)
                begin = begin or ranks.group is not None  # `advance` is not for several ranks
                occasion = Occasion(model, moment, ranks, known, due, last, begin)
                take = partial(self.survey.take, occasion, self.timeline, self.budget)
                taken = self._attempt(take, f" in epoch {epoch}")
                projection = projection_scalars(self.projected)
                return earlier | self._note(moment, taken, projection, spent)

    def advance(
        self, model: nn.Module, *, epoch: int, step: int, log_step: int | None = None
    ) -> dict[str, float]:
        """Before any step: with `background`, log what is ready and copy what is to be measured next.

        Costs nothing where there is neither, and waits for nothing. With several processes only
        boundaries do this.

        Returns:
            See `boundary`.
        """
        if not self.waiting:
            return {}
        return self.boundary(
            model, epoch=epoch, step=step, project=False, due=False, log_step=log_step
        )

    def settle(self) -> None:
        """With `background`, wait for what is being measured and log it, as before a checkpoint.

        With several processes only what was logged is in a checkpoint; the rest is measured again.
        """
        self._fetch(wait=True)

    def abort(self) -> None:
        """Training failed: log what is ready and end what runs in the background."""
        self._fetch(wait=False)
        self.survey.cancel()

    def finish(
        self,
        model: nn.Module,
        *,
        epoch: int,
        step: int,
        due: bool = True,
        log_step: int | None = None,
    ) -> dict[str, float]:
        """Training has ended: measure what is stale, draw, print the summary.

        Args:
            model: The model.
            epoch: Number of epochs finished.
            step: Number of optimizer steps done.
            due: False if the model now holds other weights than those of the last step.
            log_step: The x of the loggers, if it is not the step.
        """
        due = due and self.at_end
        scalars = self.boundary(
            model, epoch=epoch, step=step, project=False, due=due, last=True, log_step=log_step
        )
        self.draw(epoch=epoch, step=step if log_step is None else log_step)
        if self.summary and not self._warn.silent and self.report:
            self.summarise(step).show()
        return scalars

    def draw(self, *, epoch: int, step: int) -> None:
        """Let the loggers draw the end of the training; `finish` does so while they are open.

        Args:
            epoch: Number of epochs finished.
            step: The x of the loggers.
        """
        if not self._warn.silent:
            more = {"settings": self.settings, "seconds": float("inf"), "last": True}
            self.logbook.log({}, self.report, epoch=epoch, step=step, **more)

    def summarise(self, step: int) -> Summary:
        """The training so far as a table: `print(monitor.summarise(step).text())`."""
        line, account = self.timeline, self.budget
        report = line.report or Report((), ())
        return Summary(report, line.first, line.measured, step, account.spent, account.overhead)

    def state_dict(self, *, wait: bool = True) -> dict[str, Any]:
        """History, first and latest verdicts, steps and cost as plain JSON; reports are not kept.

        Args:
            wait: See `settle`; otherwise what is being measured now is not in it.
        """
        if wait:
            self.settle()
        return {
            "history": list(self.history),
            "timeline": self.timeline.state_dict(),
            "budget": self.budget.state_dict(),
            "counts": [self._epochs, self._steps],
            "warned": sorted(self._warn.given),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run of a checkpoint."""
        self.survey.cancel()
        self.logbook.restore(state["history"])
        self.timeline.load_state_dict(state["timeline"])
        self.budget.load_state_dict(state["budget"])
        self._epochs, self._steps = state["counts"]
        self._warn.given = set(state["warned"])

    def _attempt(self, take: Callable[[], Taken | None], when: str = "") -> Taken | None:
        try:
            return take()
        except Exception as error:
            self._warn("measure", f"no spectra{when}: {error!r}")
            return None

    def _fetch(self, *, wait: bool) -> None:
        if self.survey.measuring and self._latest_ranks.group is None:
            with self.budget.interruption(), self.budget.watching() as spent:
                self._finished(self._latest_ranks, spent, wait=wait)

    def _finished(
        self, ranks: Ranks, spent: Callable[[], float], *, wait: bool
    ) -> dict[str, float]:
        """Record and log what was measured in the background."""
        taken = self._attempt(partial(self.survey.finished, ranks, self.budget, wait=wait))
        return self._note(taken.moment, taken, {}, spent) if taken else {}

    def _note(
        self,
        moment: Moment,
        taken: Taken | None,
        projection: Mapping[str, float],
        spent: Callable[[], float],
    ) -> dict[str, float]:
        """Record and log what was projected and measured, if anything was."""
        scalars = {**projection, **(self._tell(taken, spent) if taken else {})}
        if not scalars:
            return {}
        self.logbook.record({"epoch": float(moment.epoch), "step": float(moment.step), **scalars})
        if not self._warn.silent:
            self.logbook.log(
                scalars,
                self.report,
                epoch=moment.epoch,
                step=moment.x,
                settings=self.settings,
                seconds=self.budget.credit - spent(),
                last=False,
            )
        return scalars

    def _tell(self, taken: Taken, spent: Callable[[], float]) -> dict[str, float]:
        """Take over what was measured, act on it, and give its numbers."""
        fresh, step, line = taken.report, taken.moment.step, self.timeline
        changes = line.update(fresh, step)
        report = line.report
        assert report is not None
        warn_of_layers(report, fresh, line.alarms(fresh), self._warn)
        tell(changes, self.on_verdict, self._warn)
        if asks_to_stop(report, self.early_stop, self._warn):
            self.should_stop = step > 0
        latest = report.scalars()
        scalars = {tag: value for tag, value in latest.items() if tag.startswith("ww/")}
        scalars |= {t: v for t, v in fresh.scalars().items() if not t.startswith("ww/")}
        scalars |= {"ww/num_measured": float(len(fresh)), "ww/seconds": taken.seconds}
        if step > 0 and self.budget.trained:
            scalars["ww/overhead"] = (self.budget.spent + spent()) / self.budget.trained
        return scalars
