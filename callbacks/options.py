"""The options of `SpectralMonitor`, for the callbacks that pass them on to theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

from ww_train.selection import Layers

from .acting import OnVerdict
from .early_stopping import StopRule


class MonitorOptions(TypedDict, total=False):
    """Keyword arguments of a callback; `SpectralMonitor` documents them."""

    log_to: Any
    layers: Layers
    randomize: int
    vectors: bool
    replicates: int
    seed: int
    every_n_epochs: int | None
    every_n_steps: int | None
    at_start: bool
    at_end: bool
    background: bool
    budget: float | None
    early_stop: StopRule | None
    on_verdict: OnVerdict | None
    summary: bool
    clock: Callable[[], float]
