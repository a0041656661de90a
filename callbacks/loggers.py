"""Handing numbers to whatever takes them: TensorBoard, W&B, a Lightning logger, a file, a function.

To the monitor a logger is a callable of a dict of floats and a step. If it also has a method
`log_report(report, history, epoch, step, *, settings, seconds, last)`, that is called with the report
behind the numbers, and once more when training has ended: see `ww_train.callbacks.tensorboard.Board`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ww_train import Report

from .tensorboard import Board

Logger: TypeAlias = Callable[[Mapping[str, float], int], Any]
"""Takes tags with plain floats, and the step at which they were measured."""


class CSVLog:
    """Appends lines `step,tag,value` to a file; partial measurements make wide tables impossible."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __call__(self, scalars: Mapping[str, float], step: int) -> None:
        """Append one line a scalar, in one write; the file and its folder are made if needed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            if file.tell() == 0:
                rows.writerow(("step", "tag", "value"))
            rows.writerows((step, tag, repr(value)) for tag, value in scalars.items())


class WandbLog:
    """Logs to a W&B run, with the step as a number of its own, `ww/step`, on the x-axis.

    W&B drops what is logged at an earlier step than the latest one that the training loop used.
    """

    def __init__(self, run: Any) -> None:
        self.run = run
        define = getattr(run, "define_metric", None)
        if define is not None:
            define("ww/step")
            define("ww*", step_metric="ww/step")

    def __call__(self, scalars: Mapping[str, float], step: int) -> None:
        """Log all at once."""
        self.run.log({**scalars, "ww/step": step})


class LightningLog:
    """Logs to one of Lightning's loggers, past `log_dict`, which takes a second for 1500 tags.

    One that writes for TensorBoard gets a `Board`, unless it puts a prefix before every tag.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self._board: Board | None = None

    def __call__(self, scalars: Mapping[str, float], step: int) -> None:
        """Log all at once."""
        writer = getattr(self.logger, "experiment", None)
        prefix: str | None = getattr(self.logger, "_prefix", None)
        if prefix or not hasattr(writer, "add_custom_scalars"):
            self.logger.log_metrics(dict(scalars), step=step)
            return
        if self._board is None or self._board.writer is not writer:
            self._board = Board(writer)
        self._board(scalars, step)

    def log_report(self, *report: Any, **more: Any) -> None:
        """Draw it where that is possible."""
        if self._board is not None:
            self._board.log_report(*report, **more)


def logger_for(target: Any) -> Logger:
    """The logger for a target.

    Args:
        target: A callable of `(scalars, step)`; a `SummaryWriter`; a Lightning logger; a W&B run; a
            path: of a CSV file if it ends in .csv, else of a folder for TensorBoard.

    Raises:
        TypeError: If the target is none of these.
    """
    if callable(target):
        logger: Logger = target
        return logger
    if isinstance(target, str | os.PathLike):
        is_csv = os.fspath(target).endswith(".csv")
        return CSVLog(target) if is_csv else Board(target)
    if hasattr(target, "add_scalar"):
        return Board(target)
    if hasattr(target, "log_metrics"):
        return LightningLog(target)
    if hasattr(target, "log"):
        return WandbLog(target)
    raise TypeError(
        "log_to takes a SummaryWriter, a W&B run, a Lightning logger, a path (a .csv file, or a "
        f"folder for TensorBoard) or a callable of (scalars, step), got {type(target).__name__}"
    )


def send(
    logger: Logger,
    scalars: Mapping[str, float],
    report: Report | None,
    history: Sequence[Mapping[str, float]],
    *,
    epoch: int,
    step: int,
    **more: Any,
) -> None:
    """Hand over the numbers if there are any, and the report to a logger that can draw it."""
    if scalars:
        logger(scalars, step)
    log_report = getattr(logger, "log_report", None)
    if log_report is not None and report is not None:
        log_report(report, history, epoch, step, **more)
