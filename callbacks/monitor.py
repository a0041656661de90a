"""`SpectralMonitor`: what happens at an epoch boundary, for any training loop."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ww_train import WWPGD, Projected, Report, Skipped, measure
from ww_train.matrices import reasons


class SpectralMonitor:
    """Projects with every `WWPGD` among the optimizers, measures the model, keeps a history.

    A plain loop calls `boundary` once an epoch and hands the numbers to its logger; the callbacks for
    Lightning and others do the same. Nothing here raises: whatever fails warns once and training
    goes on. No global random generator is used, and only a WWPGD changes weights.

    Args:
        randomize: Also count correlation traps, at about twice the cost.
        seed: Seed of the shuffles.
        every_n_epochs: Measure at every n-th boundary; projections happen at each.

    Attributes:
        report: The last report, or None.
        projected: What the last boundary's projections did.
        history: One record a measured boundary: `{"epoch": …, "step": …, **scalars}`.
    """

    def __init__(self, *, randomize: bool = True, seed: int = 0, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        self.randomize = randomize
        self.seed = seed
        self.every_n_epochs = every_n_epochs
        self.report: Report | None = None
        self.projected: tuple[Projected | Skipped, ...] = ()
        self.history: list[dict[str, float]] = []
        self._warned: set[str] = set()

    def boundary(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer] | Optimizer = (),
        *,
        epoch: int,
        step: int,
        project: bool = True,
    ) -> dict[str, float]:
        """Project, measure and record, at the end of an epoch or at the start of training.

        Args:
            model: The model being trained.
            optimizers: Its optimizers, in whatever wrappers a framework put them.
            epoch: Number of epochs finished.
            step: Number of optimizer steps done.
            project: False to only measure.

        Returns:
            Tags and plain floats for any logger, those of `Report.scalars` and, after a projection,
            `ww/distance_mean`, `ww/strength` and `ww_distance/<layer>` (distance to criticality
            before it); and `ww/seconds`, what all this took. Empty if nothing was due.
        """
        started = time.perf_counter()
        scalars = self._project(model, optimizers) if project else {}
        if epoch % self.every_n_epochs == 0:
            try:
                self.report = measure(model, randomize=self.randomize, seed=self.seed)
                scalars |= self.report.scalars()
                self._check(self.report)
            except Exception as error:
                self._warn_once("measure", f"no spectra in epoch {epoch}: {error!r}")
        if scalars:
            scalars["ww/seconds"] = time.perf_counter() - started
            self.history.append({"epoch": float(epoch), "step": float(step), **scalars})
        return scalars

    def _project(
        self, model: nn.Module, optimizers: Sequence[Optimizer] | Optimizer
    ) -> dict[str, float]:
        scalars: dict[str, float] = {}
        results: list[Projected | Skipped] = []
        for optimizer in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
            wwpgd = find_wwpgd(optimizer)
            if wwpgd is None:
                continue
            if wwpgd.model is None:
                wwpgd.model = model
            try:
                results += wwpgd.end_epoch()
            except Exception as error:
                if wwpgd.strict:
                    raise
                self._warn_once("project", f"no projection: {error!r}")
        self.projected = tuple(results)
        done = [result for result in results if isinstance(result, Projected)]
        if done:
            scalars["ww/distance_mean"] = statistics.fmean(layer.distance for layer in done)
            scalars["ww/strength"] = done[0].strength
            scalars |= {f"ww_distance/{layer.name}": layer.distance for layer in done}
        return scalars

    def _check(self, report: Report) -> None:
        if not report.layers:
            self._warn_once("empty", f"no layer to watch ({reasons(report.skipped)})")
        for layer in report.skipped:
            if "NaN" in layer.reason:
                self._warn_once(layer.name, f"layer {layer.name} is not watched: {layer.reason}")

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=4)


def find_wwpgd(optimizer: Any) -> WWPGD | None:
    """The WWPGD inside a framework's wrappers (`.optimizer`, `._optimizer`), or None."""
    while optimizer is not None:
        if type(optimizer) is WWPGD:
            return optimizer
        inner = optimizer.__dict__.get("optimizer", optimizer.__dict__.get("_optimizer"))
        if inner is None and isinstance(optimizer, WWPGD):  # a subclass of one's own
            return optimizer
        optimizer = inner
    return None
