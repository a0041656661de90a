"""The history of a run and the loggers that get its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ww_train import Report

from .acting import WarnOnce
from .loggers import Logger, logger_for, send


class Logbook:
    """Keeps what was measured and hands it to loggers; one that fails warns once.

    Args:
        log_to: Targets: see `ww_train.callbacks.loggers.logger_for`.
        warn: Gives the warnings.

    Attributes:
        history: What was logged, in order: `{"epoch": …, "step": …, **scalars}`.
        latest: The last value of every summary, `ww/…`, whenever it was measured.
        loggers: Those of `log_to`.
        of_framework: Those of the framework that trains.
    """

    def __init__(self, log_to: Any, warn: WarnOnce) -> None:
        targets = log_to if isinstance(log_to, list | tuple) else [log_to]
        self.history: list[dict[str, float]] = []
        self.latest: dict[str, float] = {}
        self.loggers = [logger_for(target) for target in targets]
        self.of_framework: tuple[Logger, ...] = ()
        self._warn = warn

    def record(self, record: dict[str, float]) -> None:
        """Add a record to the history."""
        self.history.append(record)
        self.latest |= {tag: x for tag, x in record.items() if tag.startswith("ww/")}

    def restore(self, records: Sequence[Mapping[str, float]]) -> None:
        """Continue the history of a checkpoint."""
        self.history, self.latest = [], {}
        for record in records:
            self.record(dict(record))

    def log(self, scalars: Mapping[str, float], report: Report | None, **more: Any) -> None:
        """Hand numbers to every logger, those of the framework first.

        Args:
            scalars: Tags and plain floats; may be empty.
            report: The report behind them.
            **more: The rest of what `log_report` takes.
        """
        for logger in (*self.of_framework, *self.loggers):
            try:
                send(logger, scalars, report, self.history, **more)
            except Exception as error:
                self._failed(logger, error)

    def close(self) -> None:
        """Close the files that were opened here."""
        for logger in self.loggers:
            close = getattr(logger, "close", None)
            try:
                if close is not None:
                    close()
            except Exception as error:
                self._failed(logger, error)

    def _failed(self, logger: Logger, error: Exception) -> None:
        name = getattr(logger, "__name__", type(logger).__name__)
        message = f"{name} does not take the spectra, they are in .history: {error!r}"
        self._warn(f"log {name}", message)
