"""`WeightWatcherCallback` for the Hugging Face Trainer, and a factory that hands it a `WWPGD`."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

try:
    from transformers.trainer_callback import (
        CallbackHandler,
        ExportableState,
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

import torch.distributed as dist
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers.training_args import ParallelMode

from ww_train import WWPGD

from .boundary import BoundaryMonitor
from .reporters import Reporter, calling_handler, reports
from .sharing import Ranks, ranks_of

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments
    from typing_extensions import Unpack

    from ww_train import Report

    from .options import MonitorOptions


class WeightWatcherCallback(TrainerCallback, ExportableState):
    """Measures and logs the spectrum of every layer at the end of each training epoch.

    TensorBoard gets `ww_alpha/<layer>`, `ww_erg_gap/<layer>`, `ww_trace_log/<layer>`,
    `ww_traps/<layer>` and the summaries under `ww/`; every other reporter of the trainer gets the same
    dictionary; the summaries also go to `state.log_history`, and into the metrics of each evaluation
    as `eval_ww_alpha_mean` and so on, for `metric_for_best_model`. If the optimizer is a `WWPGD`, its
    epoch is ended here, after the last step and before evaluation and saving.

    An epoch that ends early (`max_steps`, early stopping) is measured but not projected. The first
    measurement is before the first step. The trainer's control flags are left alone, unless
    `early_stop` asks to stop. With DistributedDataParallel the layers are dealt to the processes, and
    the replicas stay equal. A checkpoint keeps the history of one instance: a second one in the same
    trainer does nothing. Put it before an `EarlyStoppingCallback` that is to see its metrics. With
    `background` these are of an earlier step, as a warning says to `metric_for_best_model`, and if
    another callback stops the training, reporters do not get what was not ready.

    Args:
        **options: Those of `SpectralMonitor`: `budget`, `layers`, `randomize`, `every_n_epochs`,
            `every_n_steps`, `early_stop`, `on_verdict`, `log_to` and so on.
    """

    def __init__(self, **options: Unpack[MonitorOptions]) -> None:
        self.monitor = BoundaryMonitor(**options)
        self.last_step = -1
        self._training = False
        self._first: WeightWatcherCallback | None = None  # of two in one trainer
        self._handler: CallbackHandler | None = None
        self._event: dict[str, Any] = {}
        self._last_event: dict[str, Any] = {}

    @property
    def history(self) -> list[dict[str, float]]:
        """One record of the new numbers for each measured epoch."""
        return self.monitor.history

    @property
    def report(self) -> Report | None:
        """The latest numbers of every layer."""
        return self.monitor.report

    @property
    def watched(self) -> dict[str, Any]:
        """The monitor's state as plain JSON; the Trainer may restore it by assignment."""
        return self.monitor.state_dict(wait=False)

    @watched.setter
    def watched(self, state: dict[str, Any]) -> None:
        self.monitor.load_state_dict(copy.deepcopy(state))

    def attach(self, trainer: Trainer) -> WeightWatcherCallback:
        """Tell the callback its trainer. Only needed if a framework calls callbacks in its own way."""
        self._handler = trainer.callback_handler
        return self

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the settings, the monitor's state and the step it belongs to."""
        if self._first is not None:
            return self._first.state()
        self._event = self._last_event
        self.monitor.settle()
        self._event = {}
        return self._entry()

    def _entry(self) -> dict[str, Any]:
        return {
            "args": self.monitor.settings,
            "attributes": {"watched": self.watched, "last_step": self.last_step},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue the history of a checkpoint."""
        self._training = True
        self._handler = calling_handler() or self._handler
        callbacks = self._handler.callbacks if self._handler else []
        self._first = _earlier(self, callbacks)
        if self._first is not None:
            return
        saved = _states(state).setdefault(type(self).__name__, self._entry())
        self.last_step = -1
        if state.global_step > 0:
            attributes = (saved[0] if isinstance(saved, list) else saved)["attributes"]
            self.watched, self.last_step = attributes["watched"], attributes["last_step"]
        others = [c for c in callbacks if c is not self and reports(c)]
        reporters = [Reporter(c, self._event_of) for c in others]
        ranks = _ranks(args, state, kwargs.get("model"))
        self.monitor.begin(
            step=state.global_step, log_to=[self._to_log_history, *reporters], ranks=ranks
        )
        followed = args.metric_for_best_model or ""
        if followed.removeprefix("eval_").startswith("ww_"):
            self.monitor.decides([f"metric_for_best_model={followed!r}"])
        if not reporters and not self.monitor.logbook.loggers and state.is_world_process_zero:
            warnings.warn(
                "the trainer reports to nothing: the spectra are only in state.log_history and in "
                "the callback's .history (set report_to=, or give the callback log_to=)",
                stacklevel=2,
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the untrained model, now that every reporter has begun."""
        late = state.global_step > 0 > self.last_step
        if self._first or not (late or state.global_step == 0) or not self.monitor.at_start:
            return
        if late:
            warnings.warn(
                f"the spectra are watched from step {state.global_step} on: the checkpoint knows "
                "nothing of this callback",
                stacklevel=2,
            )
        epoch = math.floor(state.epoch or 0.0)
        self._boundary(args, state, control, epoch=epoch, project=False, due=True, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """In the background: copy what is due, behind the checkpoint of the last step."""
        if self._first is None and self.monitor.waiting:
            epoch = math.floor(state.epoch or 0.0)
            with self._at(args, state, control, **kwargs):
                self.monitor.advance(kwargs["model"], epoch=epoch, step=state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last step of an epoch: project, measure, log; evaluation and saving come later."""
        now, every = state.epoch or 0.0, self.monitor.every_n_steps
        if round(now) > 0 and abs(now - round(now)) < 1e-9:
            self._boundary(args, state, control, epoch=round(now), project=True, **kwargs)
        elif every and state.global_step % every == 0:
            epoch = math.floor(now)
            self._boundary(args, state, control, epoch=epoch, project=False, due=True, **kwargs)

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
            latest = self.monitor.logbook.latest.items()
            metrics.update({f"eval_{tag.replace('/', '_')}": value for tag, value in latest})

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure what is stale, print the summary; evaluations from now on are of other weights."""
        self._training = False
        if self._first or model is None:
            return
        self._event = {"args": args, "state": state, "control": control, "model": model}
        self.monitor.finish(
            model,
            epoch=math.floor(state.epoch or 0.0),
            step=state.global_step,
            due=not args.load_best_model_at_end,
        )
        self._event = {}

    def _boundary(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        epoch: int,
        project: bool,
        due: bool | None = None,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        if self._first or model is None or state.global_step == self.last_step:
            return
        self.last_step = state.global_step
        # reporters close before `on_train_end`: whatever they are to get must be ready now
        complete = state.global_step >= state.max_steps > 0
        over = complete or control.should_training_stop
        with self._at(args, state, control, model=model, **kwargs):
            self.monitor.boundary(
                model,
                optimizer or (),
                epoch=epoch,
                step=state.global_step,
                project=project,
                due=True if complete and self.monitor.at_end else due,
                last=over and self.monitor.background,
                begin=False,
            )
            if over:
                self.monitor.draw(epoch=epoch, step=state.global_step)

    @contextmanager
    def _at(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> Iterator[None]:
        """Reporters get what is logged within; afterwards the state is kept and the wish to stop."""
        self._event = {**kwargs, "args": args, "state": state, "control": control}
        yield
        self._last_event, self._event = self._event, {}
        # the saved state of a callback is whatever this entry holds when the trainer saves
        _states(state)[type(self).__name__] = self._entry()
        if self.monitor.should_stop:
            control.should_training_stop = True

    def _event_of(self, step: int) -> dict[str, Any]:
        """The present event, as if it were that of a step; empty if reporters have closed."""
        if not self._training or not self._event:
            return {}
        return {**self._event, "state": self._state_of(step)}

    def _state_of(self, step: int) -> TrainerState:
        """The trainer's state; of an earlier step a copy with that step and its epoch."""
        state: TrainerState = self._event["state"]
        if step != state.global_step:
            state = copy.copy(state)
            state.global_step, state.epoch = step, self.history[-1]["epoch"]
        return state

    def _to_log_history(self, scalars: Mapping[str, float], step: int) -> None:
        """The summaries, as a row of the trainer's own log."""
        state = self._state_of(step)
        summaries = {tag: value for tag, value in scalars.items() if tag.startswith("ww/")}
        state.log_history.append({**summaries, "epoch": state.epoch or 0, "step": step})


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


def _earlier(
    callback: WeightWatcherCallback, callbacks: Sequence[TrainerCallback]
) -> WeightWatcherCallback | None:
    """The first callback of the same type, if there is one before this."""
    first = next((other for other in callbacks if type(other) is type(callback)), callback)
    if first is callback:
        return None
    warnings.warn(
        f"the trainer has two callbacks of type {type(callback).__name__}, and its checkpoints "
        "keep the state of one: the second does nothing",
        stacklevel=3,
    )
    return first


def _ranks(args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> Ranks:
    """Callbacks are given the model without its wrapper: the arguments tell how it is distributed."""
    taken_over = any(getattr(args, x, None) for x in ("fsdp", "deepspeed", "parallelism_config"))
    if model is not None and any(hasattr(p, "full_tensor") for p in model.parameters()):
        return ranks_of(model)
    replicated = args.parallel_mode is ParallelMode.DISTRIBUTED and not taken_over
    if replicated and dist.is_available() and dist.is_initialized():
        return Ranks(dist.group.WORLD, replicated=True)
    return Ranks(main=state.is_world_process_zero)


def _states(state: TrainerState) -> dict[str, Any]:
    """Saved states of callbacks by class name; annotated otherwise in Transformers."""
    return cast("dict[str, Any]", state.stateful_callbacks)
