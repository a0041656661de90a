"""The other callbacks of a Hugging Face Trainer that report numbers, as loggers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)

from ww_train import Report

from .tensorboard import Board

CONSOLE = (DefaultFlowCallback, PrinterCallback, ProgressCallback)
"""Callbacks that do not get our numbers: they decide or print, and would print every layer."""


class Reporter:
    """A logger that hands numbers to another callback of the trainer, such as TensorBoard's.

    Args:
        callback: The other callback.
        event: Tells the arguments of the event that is being handled, with the trainer's state at a
            step; empty when training is over and reporters have closed.
    """

    def __init__(self, callback: TrainerCallback, event: Callable[[int], dict[str, Any]]) -> None:
        self.callback, self.event = callback, event
        self.__name__ = type(callback).__name__
        self._board: Board | None = None

    def __call__(self, scalars: Mapping[str, float], step: int) -> None:
        """Log all at once."""
        event = dict(self.event(step))
        board = self._open_board()
        if event and board is not None:
            board(scalars, step)  # by itself it would put all under "train/"
        elif event:
            # a copy of the flags: logging must not make the trainer skip its own
            control = copy.copy(event.pop("control"))
            args, state = event.pop("args"), event.pop("state")
            self.callback.on_log(args, state, control, logs=dict(scalars), **event)

    def log_report(
        self,
        report: Report,
        history: Sequence[Mapping[str, float]],
        epoch: int,
        step: int,
        **more: Any,
    ) -> None:
        """Draw it where that is possible."""
        board = self._open_board()
        if self.event(step) and board is not None:
            board.log_report(report, history, epoch, step, **more)

    def _open_board(self) -> Board | None:
        """For TensorBoard's callback as long as its writer is open."""
        writer = getattr(self.callback, "tb_writer", None)
        if writer is None:
            return None
        if self._board is None or self._board.writer is not writer:
            self._board = Board(writer)
        return self._board


def reports(callback: TrainerCallback) -> bool:
    """Whether a callback takes numbers, and not to the console."""
    own = getattr(callback.on_log, "__func__", None) is not TrainerCallback.on_log
    return own and not isinstance(callback, CONSOLE)


def calling_handler() -> CallbackHandler | None:
    """The handler that is calling a callback, which the Trainer does not pass on."""
    frame = sys._getframe(1)
    for _ in range(6):
        if frame is None:
            break
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            return handler
        frame = frame.f_back  # type: ignore[assignment]
    return None
