"""`BoundaryMonitor`: projects, measures and logs at the boundaries that a framework tells it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

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
from .steering import end_epochs, known_spectra, projection_scalars, wwpgds
from .summary import Summary
from .survey import Moment, Occasion, Survey, Taken, acquaint, undisturbed
from .timeline import Timeline


class BoundaryMonitor:
    """What `SpectralMonitor` does, for frameworks that say at which boundary of training they are.

    Args:
        options: See `SpectralMonitor`.

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

    def decides(self, whose: Sequence[str]) -> None:
        """Warn if numbers of ours that are of earlier weights choose a checkpoint, or stop training.

        Args:
            whose: What follows them, in words.
        """
        if self.background and whose:
            self._warn(
                "decides",
                f"{' and '.join(whose)}: with background=True the numbers that are there at a "
                "checkpoint or a decision to stop are of earlier weights; use background=False",
            )

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
                done = self._finished(ranks, wait=last)
                told = self._tell(done, spent) if done else {}
                same = last and done and done.moment.step == step and not self.projected
                part = done if same else None  # of the same weights: one record with the rest
                if done and not part:
                    self._note(done.moment, told, spent)
                begin = begin or ranks.group is not None  # `advance` is not for several ranks
                occasion = Occasion(model, moment, ranks, known, due, last, begin)
                take = partial(self.survey.take, occasion, self.timeline, self.budget)
                taken = self._attempt(take, f" in epoch {epoch}")
                now = self._tell(taken, spent) if taken else {}
                if part:
                    moment, now = part.moment, _together(told, now)
                now = {**projection_scalars(self.projected), **now}
                self._note(moment, now, spent)
                return told | now

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
        return Summary(
            report,
            line.first,
            line.measured,
            step,
            seconds=account.spent,
            overhead=account.overhead,
            beside=account.beside,
        )

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
            "warned": sorted(self._warn.given),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run of a checkpoint."""
        self.survey.cancel()
        self.logbook.restore(state["history"])
        self.timeline.load_state_dict(state["timeline"])
        self.budget.load_state_dict(state["budget"])
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
                done = self._finished(self._latest_ranks, wait=wait)
                if done:
                    self._note(done.moment, self._tell(done, spent), spent)

    def _finished(self, ranks: Ranks, *, wait: bool) -> Taken | None:
        """What was measured in the background."""
        return self._attempt(partial(self.survey.finished, ranks, self.budget, wait=wait))

    def _note(self, moment: Moment, scalars: dict[str, float], spent: Callable[[], float]) -> None:
        """Record and log what was projected and measured, if anything was."""
        if not scalars:
            return
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


def _together(earlier: Mapping[str, float], later: Mapping[str, float]) -> dict[str, float]:
    """The numbers of two parts of one measurement."""
    sums = ("ww/num_measured", "ww/seconds")
    return {**earlier, **later, **{t: earlier[t] + later.get(t, 0.0) for t in sums}}
