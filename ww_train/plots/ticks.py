"""Logarithmic axes whose labels do not overlap, also within one decade."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatterMathtext, LogLocator, MaxNLocator, NullFormatter

DECADES = 3.0
"""An axis of fewer decades has labels within them, and plain numbers."""


class LogTicks(LogLocator):
    """Powers of ten; with 2 and 5 between them below `DECADES`, round numbers below one."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        """Positions between two positive limits."""
        decades = math.log10(vmax / vmin) if 0.0 < vmin < vmax else math.inf
        if decades < 1.0:
            return MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(vmin, vmax)
        self.set_params(subs=(1.0, 2.0, 5.0) if decades < DECADES else (1.0,))
        return super().tick_values(vmin, vmax)


class LogLabels(LogFormatterMathtext):
    """Plain numbers below `DECADES`, powers of ten above."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of one position."""
        low, high = (1.0, 1.0) if self.axis is None else self.axis.get_view_interval()
        return f"{x:g}" if high < 10.0**DECADES * low else super().__call__(x, pos)


def log_scale(ax: Axes, which: Literal["x", "y"] = "x") -> None:
    """Make this axis logarithmic, with labels at `LogTicks`."""
    ax.set(**{f"{which}scale": "log"})
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(LogTicks())
    axis.set_major_formatter(LogLabels())
    axis.set_minor_formatter(NullFormatter())


def log_counts(ax: Axes) -> None:
    """Both axes logarithmic, for bars that count one and more."""
    log_scale(ax, "x")
    log_scale(ax, "y")
    ax.set_ylim(bottom=0.5)
