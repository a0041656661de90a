"""Which singular values of a layer stay when it is smoothed: the rules of `svd_smoothing_`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ww_train.erg import erg_tail
from ww_train.marchenko_pastur import BulkFit, fit_mp
from ww_train.power_law import TailFit, fit_power_law
from ww_train.spectrum import Spectrum

Kept: TypeAlias = npt.NDArray[np.bool_]

Rule: TypeAlias = Callable[[Spectrum], Kept]
"""Which of the ascending `Spectrum.evals` stay; ValueError, with the reason, to leave a layer alone."""


@dataclass(frozen=True)
class DetXTail:
    """Keep the ERG tail: the largest `detX_num` eigenvalues (WeightWatcher's "detX")."""

    def __call__(self, spectrum: Spectrum, /) -> Kept:
        """Flags of the eigenvalues that stay."""
        number = erg_tail(spectrum).detX_num
        if number is None:
            raise ValueError("all eigenvalues are equal: no ERG tail")
        return _largest(spectrum, number)


DETX_TAIL = DetXTail()


@dataclass(frozen=True)
class PowerLawTail:
    """Keep the power-law tail: the eigenvalues from xmin on (WeightWatcher's "alpha_min").

    Attributes:
        fit: How to fit the tail. Eigenvalues above its xmax stay too.
    """

    fit: TailFit = fit_power_law

    def __call__(self, spectrum: Spectrum, /) -> Kept:
        """Flags of the eigenvalues that stay."""
        tail = self.fit(spectrum.positive)
        if tail is None:
            raise ValueError("no power law fits its eigenvalues")
        kept: Kept = spectrum.evals >= tail.xmin
        return kept


@dataclass(frozen=True)
class AboveBulk:
    """Keep the spikes above the random bulk (WeightWatcher's "rmt").

    Attributes:
        bulk: How to fit the bulk.
    """

    bulk: BulkFit = fit_mp

    def __call__(self, spectrum: Spectrum, /) -> Kept:
        """Flags of the eigenvalues that stay."""
        return _largest(spectrum, self.bulk(spectrum).num_spikes)


@dataclass(frozen=True)
class Top:
    """Keep a share of the singular values, the largest (WeightWatcher's "svd" with that percent).

    Attributes:
        share: 0 to 1; the number kept is rounded down.
    """

    share: float

    def __post_init__(self) -> None:
        _check_share(self.share)

    def __call__(self, spectrum: Spectrum, /) -> Kept:
        """Flags of the eigenvalues that stay."""
        return _largest(spectrum, _floor(self.share * len(spectrum.evals)))


@dataclass(frozen=True)
class Bottom:
    """Keep a share of the singular values, the smallest: what is left without the signal.

    `Bottom(0.8)` is WeightWatcher's percent of -0.2.

    Attributes:
        share: 0 to 1; the number deleted is rounded down.
    """

    share: float

    def __post_init__(self) -> None:
        _check_share(self.share)

    def __call__(self, spectrum: Spectrum, /) -> Kept:
        """Flags of the eigenvalues that stay."""
        return ~_largest(spectrum, _floor((1.0 - self.share) * len(spectrum.evals)))


def kept_by(rule: Rule, spectrum: Spectrum) -> Kept:
    """What a rule keeps of a spectrum.

    Raises:
        ValueError: If the rule has no answer, or keeps nothing; with the reason.
        TypeError: If it returns something else than one flag an eigenvalue.
    """
    kept, n = rule(spectrum), len(spectrum.evals)
    kept = np.asarray(kept)
    if kept.dtype != np.bool_ or kept.shape != (n,):
        raise TypeError(
            f"a rule returns one flag an eigenvalue, {n} here, got {kept.dtype} of {kept.shape}"
        )
    if not kept.any():
        raise ValueError("the rule keeps none of its eigenvalues")
    return kept


def _largest(spectrum: Spectrum, number: int) -> Kept:
    n = len(spectrum.evals)
    kept: Kept = np.arange(n) >= n - number
    return kept


def _floor(number: float) -> int:
    """The integer part of a product such as 0.29 * 100, which is 28.999999999999996."""
    return math.floor(round(number, 9))


def _check_share(share: float) -> None:
    if not 0.0 < share < 1.0:
        raise ValueError(f"share is a fraction between 0 and 1, got {share}")
