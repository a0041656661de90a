"""Fingers: a few top eigenvalues off the power law of the tail (Dragon Kings), and fits past them.

WeightWatcher's `fix_fingers`: "clip_xmax" is `ClipXmax`, "xmin_peak" is `XminPeak`. Both are
`TailFit`s: called with the positive eigenvalues, ascending.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ww_train.power_law import MIN_TAIL, SMALL_N, PowerLaw, PowerLawFit, fit_power_law
from ww_train.spectrum import Array

PEAK_BINS = 100
"""Bins of the histogram of log10 eigenvalues whose fullest is the peak (WeightWatcher)."""

BELOW_PEAK, ABOVE_PEAK = 0.95, 1.5
"""Range of xmin around the peak, relative to it (WeightWatcher)."""


@dataclass(frozen=True)
class ClipXmax:
    """Remove top eigenvalues one by one until alpha falls; if it does not fall, remove none.

    The first removal that lowers alpha by more than `finger_thresh` is taken, and `xmin` is
    searched anew at each. The number removed is in `num_fingers`, the exponent without removal in
    `raw_alpha`; `num_pl_spikes` and `xmax` are those of the eigenvalues that are left.

    What this finds is an alpha that is high because the least distance lies in a short tail. A few
    eigenvalues far above a long power law lower alpha, so that their removal raises it and none is
    taken: for those use `PowerLaw(drop_top=k)`.

    Where WeightWatcher 0.7.7 differs (and this does not follow it): it never tries one removal,
    nor `max_fingers`; it replaces `max_fingers` by 10 if it is less than half the number of
    eigenvalues; it reports one removal less than it made; it counts the removed in `num_pl_spikes`;
    it gives up at the first removal with alpha at or below 2.

    Attributes:
        max_fingers: Most eigenvalues that may be removed; never more than half of them, and never
            so many that the small-sample rule of `fit_power_law` takes over, because alpha falls by
            that change of rule alone.
        finger_thresh: Fall of alpha that makes a finger.

    Raises:
        ValueError: If `max_fingers` or `finger_thresh` is negative.
    """

    max_fingers: int = 10
    finger_thresh: float = 1.0

    def __post_init__(self) -> None:
        if self.max_fingers < 0 or not self.finger_thresh >= 0:
            raise ValueError(f"max_fingers and finger_thresh must not be negative, got {self}")

    def __call__(self, evals: Array, /) -> PowerLawFit | None:
        """Fit positive eigenvalues, ascending; None without a power law before any removal.

        Cost: `1 + max_fingers` power-law fits at most.
        """
        raw = fit_power_law(evals)
        if raw is None:
            return None
        for k in range(1, self.max_fingers + 1):
            if len(evals) - k < SMALL_N <= len(evals):
                break
            fit = PowerLaw(drop_top=k)(evals)
            if fit is None:
                break
            if fit.alpha + self.finger_thresh < raw.alpha:
                return replace(fit, num_fingers=k, raw_alpha=raw.alpha)
        return replace(raw, num_fingers=0, raw_alpha=raw.alpha)


@dataclass(frozen=True)
class XminPeak:
    """Search xmin around the peak of the log-density of the spectrum only.

    The peak is the lower edge of the fullest of 100 equal bins of log10 lambda, the lowest among
    equals; xmin is searched among all eigenvalues from 0.95 to 1.5 times the peak.

    WeightWatcher 0.7.7 mixes units (its lower limit is log10 of 0.95 times the peak, compared with
    eigenvalues) and needs a version of the `powerlaw` package below 2.0 (all fits fail otherwise).

    Attributes:
        xmin_max: Upper limit of xmin in units of the eigenvalues, instead of 1.5 times the peak.

    Raises:
        ValueError: If `xmin_max` is not positive.
    """

    xmin_max: float | None = None

    def __post_init__(self) -> None:
        if self.xmin_max is not None and not self.xmin_max > 0:
            raise ValueError(f"xmin_max must be positive, got {self.xmin_max}")

    def __call__(self, evals: Array, /) -> PowerLawFit | None:
        """Fit positive eigenvalues, ascending; None as `PowerLaw`, or if no xmin is in the range.

        An `xmin_max` below 0.95 times the peak leaves no range.
        """
        if len(evals) < MIN_TAIL:
            return None
        # relative to the largest, so that the bins do not depend on the scale
        counts, edges = np.histogram(np.log10(evals / evals[-1]), bins=PEAK_BINS)
        peak = float(evals[-1]) * 10.0 ** float(edges[counts.argmax()])
        low = BELOW_PEAK * peak
        high = ABOVE_PEAK * peak if self.xmin_max is None else self.xmin_max
        return PowerLaw(xmin=(low, high))(evals) if low <= high else None
