"""`WeightWatcherCallback` for Lightning: spectra of every layer in every logger, every epoch."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ww_train.callbacks.lightning needs Lightning: pip install 'ww-train[lightning]'"
    ) from error
except (ImportError, RuntimeError) as error:
    raise ImportError(
        "Lightning is installed but does not import; most often torchvision or torchaudio do not "
        "match the installed torch: install them together, or uninstall them"
    ) from error

from .boundary import BoundaryMonitor
from .loggers import LightningLog
from .sharing import Ranks, ranks_of

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from typing_extensions import Unpack

    from ww_train import Report

    from .options import MonitorOptions


PRESENTATION = ("background", "budget", "summary")
"""Settings that may differ when a training is resumed: the numbers are the same."""


class WeightWatcherCallback(pl.Callback):
    """Measures and logs the spectrum of every layer at the end of each training epoch.

    Every logger of the trainer gets `ww_alpha/<layer>`, `ww_erg_gap/<layer>`, `ww_trace_log/<layer>`,
    `ww_traps/<layer>` and the summaries under `ww/`; the latest summaries are also in
    `trainer.callback_metrics`, for `EarlyStopping(monitor="ww/alpha_mean")`. If an optimizer is a
    `WWPGD`, its epoch is ended here, after the last batch and before validation, so that validation
    and every checkpoint see the projected weights.

    An epoch that ends early (`max_steps`, `should_stop`) is measured but not projected. The first
    measurement is before the first step. Put this callback before those that average weights. With
    DistributedDataParallel the layers are dealt to the processes, and the replicas stay equal. Of two
    callbacks with the same settings the second does nothing. With `background` the numbers that
    `EarlyStopping` and `ModelCheckpoint` see are of an earlier step, and a warning says so.

    Args:
        **options: Those of `SpectralMonitor`: `budget`, `layers`, `randomize`, `every_n_epochs`,
            `every_n_steps`, `early_stop`, `on_verdict`, `log_to` and so on.
    """

    def __init__(self, **options: Unpack[MonitorOptions]) -> None:
        super().__init__()
        self.monitor = BoundaryMonitor(**options)
        self._last_step = -1
        self._phantom = False
        self._idle = False

    @property
    def history(self) -> list[dict[str, float]]:
        """One record of the new numbers for each measured epoch."""
        return self.monitor.history

    @property
    def report(self) -> Report | None:
        """The latest numbers of every layer."""
        return self.monitor.report

    @property
    def state_key(self) -> str:
        """Key of this callback in checkpoints; two with different settings do not clash."""
        every = self.monitor.settings
        told = {name: every[name] for name in every if name not in PRESENTATION}
        return self._generate_state_key(**told)

    # not by state_dict(): Lightning would refuse a callback that was given twice

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the history and the step it belongs to, among the states of callbacks."""
        if not self._idle:
            state = {"monitor": self.monitor.state_dict(), "last_step": self._last_step}
            checkpoint.setdefault("callbacks", {})[self.state_key] = copy.deepcopy(state)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue the history of a checkpoint."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            self.monitor.load_state_dict(copy.deepcopy(state["monitor"]))
            self._last_step = state["last_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the untrained model, unless this is a resumed run."""
        self._idle = self._is_second(trainer)
        if self._idle:
            return
        loggers = [LightningLog(logger) for logger in trainer.loggers]
        ranks = _ranks(trainer, pl_module)
        self.monitor.begin(step=trainer.global_step, log_to=loggers, ranks=ranks)
        self.monitor.decides(_followers(trainer))
        if not loggers and not self.monitor.logbook.loggers:
            warnings.warn(
                "the trainer has no logger: the spectra are only in the callback's .history "
                "(give the Trainer a logger=, or the callback log_to=)",
                stacklevel=2,
            )
        late = trainer.global_step > 0 > self._last_step
        if late:
            warnings.warn(
                f"the spectra are watched from step {trainer.global_step} on: the checkpoint, or "
                "the training so far, knows nothing of this callback",
                stacklevel=2,
            )
        if self.monitor.at_start and (late or trainer.global_step == 0):
            self._boundary(trainer, pl_module, epoch=trainer.current_epoch, project=False, due=True)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_args: Any, **_kwargs: Any
    ) -> None:
        """In the background: copy what is due, behind the checkpoint of the last step."""
        if self._idle or trainer.fit_loop._skip_backward:
            return
        epoch, step = trainer.current_epoch, trainer.global_step
        x = max(0, _x(trainer) - 1)  # what it was behind the last batch
        if self.monitor.advance(pl_module, epoch=epoch, step=step, log_step=x):
            self._publish(trainer, pl_module, on_step=True)
        if self.monitor.should_stop:
            self._obey(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_args: Any, **_kwargs: Any
    ) -> None:
        """After the last batch: project, measure, log; validation and checkpoints come later."""
        # StochasticWeightAveraging appends an epoch without training to update batch norms
        self._phantom = trainer.fit_loop._skip_backward
        if self._phantom or self._idle:
            return
        every, step = self.monitor.every_n_steps, trainer.global_step
        if trainer.is_last_batch:
            self._boundary(trainer, pl_module, epoch=trainer.current_epoch + 1, project=True)
            self._publish(trainer, pl_module, on_step=True)
        elif every and step % every == 0 and step != self._last_step:
            self._boundary(trainer, pl_module, epoch=trainer.current_epoch, project=False, due=True)
            self._publish(trainer, pl_module, on_step=True)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Log what is ready and end what runs in the background."""
        self.monitor.abort()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch cut short had no last batch: measure it, but do not project."""
        if not self._idle and not self._phantom and trainer.global_step != self._last_step:
            self._boundary(trainer, pl_module, epoch=trainer.current_epoch + 1, project=False)
            self._publish(trainer, pl_module, on_step=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what is stale, print the summary."""
        if not self._idle:
            self.monitor.finish(
                pl_module,
                epoch=trainer.current_epoch,
                step=trainer.global_step,
                log_step=_x(trainer),
            )

    def _boundary(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        *,
        epoch: int,
        project: bool,
        due: bool | None = None,
    ) -> None:
        self._last_step = trainer.global_step
        optimizers: list[Optimizer] = trainer.optimizers
        self.monitor.boundary(
            pl_module,
            optimizers,
            epoch=epoch,
            step=trainer.global_step,
            project=project,
            due=due,
            begin=False,
            log_step=_x(trainer),
        )
        self._obey(trainer)

    def _obey(self, trainer: pl.Trainer) -> None:
        """Stop if the monitor asks for it."""
        if self.monitor.early_stop is not None:
            stop = trainer.strategy.reduce_boolean_decision(self.monitor.should_stop, all=False)
            trainer.should_stop = trainer.should_stop or stop

    def _publish(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, on_step: bool
    ) -> None:
        """Put the latest summaries into `callback_metrics`, also those that are not new."""
        for tag, value in self.monitor.logbook.latest.items():
            # on_step: fresh in callback_metrics when this epoch's checkpoint looks at them
            pl_module.log(
                tag,
                value,
                on_step=on_step,
                on_epoch=not on_step,
                logger=False,
                batch_size=1,
                sync_dist=not on_step,
            )

    def _is_second(self, trainer: pl.Trainer) -> bool:
        same = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, WeightWatcherCallback) and callback.state_key == self.state_key
        ]
        if same and same[0] is not self:
            warnings.warn(
                "the trainer has two WeightWatcherCallbacks with the same settings: "
                "the second one does nothing",
                stacklevel=3,
            )
            return True
        return False


def _followers(trainer: pl.Trainer) -> list[str]:
    """What stops training or chooses checkpoints by a number of ours."""
    kinds = (pl.callbacks.EarlyStopping, pl.callbacks.ModelCheckpoint)
    return [
        f"{type(callback).__name__}(monitor={callback.monitor!r})"
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, kinds) and (callback.monitor or "").startswith("ww")
    ]


def _x(trainer: pl.Trainer) -> int:
    """The step that Lightning's own metrics are logged at."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _ranks(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Ranks:
    """The strategy holds the model in its wrapper, which tells how it is distributed."""
    ranks = ranks_of(trainer.strategy.model or pl_module)
    return ranks if ranks.group is not None else Ranks(main=trainer.is_global_zero)
