"""When to stop training, judged by the spectra: predicates on a report for `early_stop=`.

Any function of a `Report` that tells whether to stop will do. It is called at every measurement, from
the one before the first step on, whose answer is ignored.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TypeAlias

from ww_train import Report
from ww_train.power_law import OVER_TRAINED

StopRule: TypeAlias = Callable[[Report], bool]


def alpha_below(limit: float = OVER_TRAINED) -> StopRule:
    """Stop when the mean alpha of the layers falls below a limit: the network begins to over-fit."""

    def stop(report: Report) -> bool:
        alphas = [layer.alpha for layer in report if layer.alpha is not None]
        return bool(alphas) and statistics.fmean(alphas) < limit

    return stop


def traps_appear() -> StopRule:
    """Stop when a layer has correlation traps that it had not when it was first measured.

    Only traps whose cause is known count: one shuffle in a hundred shows a trap by chance. The rule
    remembers the first report it was shown, so that each training needs one of its own.
    """
    first: dict[str, bool] = {}

    def stop(report: Report) -> bool:
        trapped = {layer.name: bool(layer.trap_causes) for layer in report}
        for name, now in trapped.items():
            first.setdefault(name, now)
        return any(now and not first[name] for name, now in trapped.items())

    return stop
