"""`WeightWatcherCallback` for the Hugging Face Trainer, and a factory that hands it a `WWPGD`."""

from __future__ import annotations

import copy
import math
import sys
from typing import TYPE_CHECKING, Any, cast

try:
    from transformers.trainer_callback import (
        CallbackHandler,
        DefaultFlowCallback,
        ExportableState,
        PrinterCallback,
        ProgressCallback,
        TrainerCallback,
        TrainerControl,
        TrainerState,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ww_train.callbacks.huggingface needs Transformers: pip install 'ww-train[huggingface]'"
    ) from error
except (ImportError, RuntimeError) as error:
    raise ImportError(
        "Transformers is installed but does not import; most often torchvision does not match the "
        "installed torch: install them together, or uninstall torchvision"
    ) from error

from torch import nn
from torch.optim import AdamW, Optimizer

from ww_train import WWPGD

from .monitor import SpectralMonitor

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from ww_train import Report

CONSOLE = (DefaultFlowCallback, PrinterCallback, ProgressCallback)
"""Callbacks that do not get our numbers: they decide or print, and would print every layer."""


class WeightWatcherCallback(TrainerCallback, ExportableState):
    """Measures and logs the spectrum of every layer at the end of each training epoch.

    TensorBoard gets `ww_alpha/<layer>`, `ww_erg_gap/<layer>`, `ww_trace_log/<layer>`,
    `ww_traps/<layer>` and the summaries under `ww/`; every other reporter of the trainer gets the same
    dictionary; the summaries also go to `state.log_history`, and into the metrics of each evaluation
    as `eval_ww_alpha_mean` and so on, for `metric_for_best_model`. If the optimizer is a `WWPGD`, its
    epoch is ended here, after the last step and before evaluation and saving.

    An epoch that ends early (`max_steps`, early stopping) is measured but not projected. The first
    measurement is before the first step. The trainer's control flags are left alone. A checkpoint
    keeps the history of one instance, so give a trainer only one; before an `EarlyStoppingCallback`
    that is to see its metrics.

    Args:
        randomize: Also count correlation traps, at about twice the cost.
        seed: Seed of the shuffles.
        every_n_epochs: Measure every n-th epoch; projections happen in each.
    """

    def __init__(self, *, randomize: bool = True, seed: int = 0, every_n_epochs: int = 1) -> None:
        self.monitor = SpectralMonitor(
            randomize=randomize, seed=seed, every_n_epochs=every_n_epochs
        )
        self.last_step = -1
        self._training = False
        self._handler: CallbackHandler | None = None

    @property
    def history(self) -> list[dict[str, float]]:
        """One record of all numbers for each measured epoch."""
        return self.monitor.history

    @history.setter
    def history(self, records: list[dict[str, float]]) -> None:
        self.monitor.history = list(records)

    @property
    def report(self) -> Report | None:
        """The last report."""
        return self.monitor.report

    def attach(self, trainer: Trainer) -> WeightWatcherCallback:
        """Tell the callback its trainer. Only needed if a framework calls callbacks in its own way."""
        self._handler = trainer.callback_handler
        return self

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the settings, the history and the step it belongs to."""
        m = self.monitor
        return {
            "args": {
                "randomize": m.randomize,
                "seed": m.seed,
                "every_n_epochs": m.every_n_epochs,
            },
            "attributes": {"history": m.history, "last_step": self.last_step},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue the history of a checkpoint."""
        name = type(self).__name__
        self._training = True
        self._handler = _calling_handler() or self._handler
        saved = _states(state).setdefault(name, self.state())
        if state.global_step > 0:
            attributes = (saved[0] if isinstance(saved, list) else saved)["attributes"]
            self.history, self.last_step = attributes["history"], attributes["last_step"]
        else:
            self.last_step = -1

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the untrained model, now that every reporter has begun."""
        if state.global_step == 0:
            self._boundary(args, state, control, epoch=0, project=False, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last step of an epoch: project, measure, log; evaluation and saving come later."""
        epoch = round(state.epoch or 0.0)
        if epoch > 0 and abs(state.epoch - epoch) < 1e-9:
            self._boundary(args, state, control, epoch=epoch, project=True, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch of unknown length ends here; one that was cut short is measured only."""
        whole = not (control.should_training_stop or control.should_epoch_stop)
        epoch = math.ceil(state.epoch or 1.0)
        self._boundary(args, state, control, epoch=epoch, project=whole, **kwargs)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the last summaries to the metrics, so that they can choose the best checkpoint."""
        if metrics is not None and self._training:
            for record in self.history:  # not every record has everything: see `every_n_epochs`
                summaries = {k: v for k, v in record.items() if k.startswith("ww/")}
                metrics.update({f"eval_{key.replace('/', '_')}": v for key, v in summaries.items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluations from now on are not of the measured weights (`load_best_model_at_end`)."""
        self._training = False

    def _boundary(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        epoch: int,
        project: bool,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        if model is None or state.global_step == self.last_step:
            return
        self.last_step = state.global_step
        scalars = self.monitor.boundary(
            model, optimizer or (), epoch=epoch, step=state.global_step, project=project
        )
        # the saved state of a callback is whatever this entry holds when the trainer saves
        _states(state)[type(self).__name__] = self.state()
        if not scalars or not state.is_world_process_zero:
            return
        summaries = {tag: value for tag, value in scalars.items() if tag.startswith("ww/")}
        state.log_history.append(
            {**summaries, "epoch": state.epoch or 0, "step": state.global_step}
        )
        handler = _calling_handler() or self._handler
        for callback in handler.callbacks if handler else ():
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:  # by itself TensorBoardCallback would put all under "train/"
                for tag, value in scalars.items():
                    writer.add_scalar(tag, value, state.global_step)
                writer.flush()
            elif callback is not self and not isinstance(callback, CONSOLE):
                # a copy of the flags: logging must not make the trainer skip its own
                callback.on_log(
                    args, state, copy.copy(control), logs=dict(scalars), model=model, **kwargs
                )


class WWPGDFactory:
    """Makes a `WWPGD` from the trainer's model, also where the trainer allows nothing else (FSDP).

        Trainer(..., optimizer_cls_and_kwargs=(WWPGDFactory, {"lr": 1e-3, "wwpgd": {"strength": 0.5}}))

    Needs Transformers 5; before, give the Trainer `optimizers=(WWPGD(...), None)`.
    Weight decay applies to all but biases and one-dimensional parameters, as in the Trainer.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        base: type[Optimizer] = AdamW,
        wwpgd: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> WWPGD:
        """Wrap `base(parameters, **options)` with the options `wwpgd` of `WWPGD`."""
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [(n, p) for n, p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [(n, p) for n, p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return WWPGD(base(groups, **options), model=model, **(wwpgd or {}))


def _states(state: TrainerState) -> dict[str, Any]:
    """Saved states of callbacks by class name; annotated otherwise in Transformers."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def _calling_handler() -> CallbackHandler | None:
    """The handler that is calling this callback, which the Trainer does not pass on."""
    frame = sys._getframe(1)
    for _ in range(6):
        if frame is None:
            break
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            return handler
        frame = frame.f_back  # type: ignore[assignment]
    return None
