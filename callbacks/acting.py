"""Acting on what was measured: warnings that say what to do, hooks, and whether to stop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ww_train import LayerReport, Report
from ww_train.weights.matrices import reasons

from .early_stopping import StopRule
from .timeline import Change

OnVerdict: TypeAlias = Callable[[LayerReport, str], Any]
"""Called with a layer whose verdict changed, and its verdict before."""


class WarnOnce:
    """Gives each warning once a run, and only in the process that writes.

    Attributes:
        given: Keys of the warnings that were given.
        silent: Whether another process gives them.
    """

    def __init__(self) -> None:
        self.given: set[str] = set()
        self.silent = False

    def __call__(self, key: str, message: str) -> None:
        """Warn unless the key was seen before."""
        if not self.silent and key not in self.given:
            self.given.add(key)
            warnings.warn(message, stacklevel=5)


def warn_of_layers(
    report: Report, fresh: Report, alarming: Sequence[LayerReport], warn: WarnOnce
) -> None:
    """Name what cannot be watched, and the layers that need something done, with advice.

    Args:
        report: The latest numbers of all layers.
        fresh: What was measured now.
        alarming: Layers that became over-trained or trapped.
        warn: Gives the warnings.
    """
    if not report.layers:
        warn("empty", f"no layer to watch ({reasons(report.skipped)})")
    for layer in fresh.skipped:
        if "NaN" in layer.reason:
            warn(layer.name, f"layer {layer.name} is not watched: {layer.reason}")
    for bad in alarming:
        warn(f"{bad.name} alarm", bad.advice)


def tell(changes: Sequence[Change], on_verdict: OnVerdict | None, warn: WarnOnce) -> None:
    """Call the hook for every layer whose verdict changed; a hook that raises gives a warning."""
    for change in changes if on_verdict else ():
        try:
            on_verdict(change.layer, change.previous)  # type: ignore[misc]
        except Exception as error:
            warn("on_verdict", f"on_verdict failed for layer {change.layer.name}: {error!r}")


def asks_to_stop(report: Report, early_stop: StopRule | None, warn: WarnOnce) -> bool:
    """What the rule says of a report; one that raises gives a warning and does not stop anything."""
    try:
        return early_stop is not None and bool(early_stop(report))
    except Exception as error:
        warn("early_stop", f"early_stop failed: {error!r}")
        return False
