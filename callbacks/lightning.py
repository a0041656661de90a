"""`WeightWatcherCallback` for Lightning: spectra of every layer in every logger, every epoch."""

from __future__ import annotations

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

from .monitor import SpectralMonitor

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ww_train import Report


class WeightWatcherCallback(pl.Callback):
    """Measures and logs the spectrum of every layer at the end of each training epoch.

    Every logger of the trainer gets `ww_alpha/<layer>`, `ww_erg_gap/<layer>`, `ww_trace_log/<layer>`,
    `ww_traps/<layer>` and the summaries under `ww/`; the summaries are also in
    `trainer.callback_metrics`, for `EarlyStopping(monitor="ww/alpha_mean")`. If an optimizer is a
    `WWPGD`, its epoch is ended here, after the last batch and before validation, so that validation
    and every checkpoint see the projected weights.

    An epoch that ends early (`max_steps`, `should_stop`) is measured but not projected. The first
    measurement is before the first step. Put this callback before those that average weights.

    Args:
        randomize: Also count correlation traps, at about twice the cost.
        seed: Seed of the shuffles.
        every_n_epochs: Measure every n-th epoch; projections happen in each.
    """

    def __init__(self, *, randomize: bool = True, seed: int = 0, every_n_epochs: int = 1) -> None:
        super().__init__()
        self.monitor = SpectralMonitor(
            randomize=randomize, seed=seed, every_n_epochs=every_n_epochs
        )
        self._last_step = -1
        self._phantom = False

    @property
    def history(self) -> list[dict[str, float]]:
        """One record of all numbers for each measured epoch."""
        return self.monitor.history

    @property
    def report(self) -> Report | None:
        """The last report."""
        return self.monitor.report

    @property
    def state_key(self) -> str:
        """Key of this callback in checkpoints; two with different settings do not clash."""
        m = self.monitor
        return self._generate_state_key(
            randomize=m.randomize, seed=m.seed, every_n_epochs=m.every_n_epochs
        )

    def state_dict(self) -> dict[str, Any]:
        """The history and the step it belongs to."""
        return {"history": self.monitor.history, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint."""
        self.monitor.history = list(state_dict["history"])
        self._last_step = state_dict["last_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the untrained model, unless this is a resumed run."""
        if trainer.global_step == 0:
            self._boundary(trainer, pl_module, epoch=0, project=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_args: Any, **_kwargs: Any
    ) -> None:
        """After the last batch: project, measure, log; validation and checkpoints come later."""
        # StochasticWeightAveraging appends an epoch without training to update batch norms
        self._phantom = trainer.fit_loop._skip_backward
        if trainer.is_last_batch and not self._phantom:
            self._boundary(trainer, pl_module, epoch=trainer.current_epoch + 1, project=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch cut short had no last batch: measure it, but do not project."""
        if trainer.global_step != self._last_step and not self._phantom:
            self._boundary(trainer, pl_module, epoch=trainer.current_epoch + 1, project=False)

    def _boundary(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, epoch: int, project: bool
    ) -> None:
        self._last_step = trainer.global_step
        optimizers: list[Optimizer] = trainer.optimizers
        scalars = self.monitor.boundary(
            pl_module, optimizers, epoch=epoch, step=trainer.global_step, project=project
        )
        if not scalars:
            return
        for tag, value in scalars.items():
            if tag.startswith("ww/") and epoch > 0:
                # on_step: fresh in callback_metrics when this epoch's checkpoint looks at them
                pl_module.log(
                    tag, value, on_step=project, on_epoch=not project, logger=False, batch_size=1
                )
        # straight to the loggers: log_dict with hundreds of keys takes a second
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)
