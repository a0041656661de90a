"""`SpectralMonitor`: watches the spectra of a model in any training loop, within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from .boundary import BoundaryMonitor
from .steering import find_wwpgd

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from .options import MonitorOptions

__all__ = ["SpectralMonitor", "find_wwpgd"]


class SpectralMonitor(BoundaryMonitor):
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
        **options: Unpack[MonitorOptions],
    ) -> None:
        super().__init__(**options)
        self.model = model
        self.optimizers = optimizers
        self._epochs = self._steps = 0

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

    def state_dict(self, *, wait: bool = True) -> dict[str, Any]:
        """As of `BoundaryMonitor`, and how many epochs and steps were counted."""
        return {**super().state_dict(wait=wait), "counts": [self._epochs, self._steps]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run of a checkpoint."""
        super().load_state_dict(state)
        self._epochs, self._steps = state["counts"]
