"""Whether a spectrum is that of a random matrix: the random-like phase, in which nothing is learned.

The first of the phases of training of Martin and Mahoney (JMLR 22 (2021) 165): the
eigenvalues follow the Marchenko-Pastur law of the matrix's shape up to its own fluctuations, and
none lies above its edge.
"""

from __future__ import annotations

import math

import numpy as np

from ww_train.marchenko_pastur import FALSE_ALARM, fit_mp, mp_distribution
from ww_train.power_law import MIN_TAIL
from ww_train.spectrum import Spectrum

FIELD = math.sqrt(2.0) / math.pi
"""Growth with ln M of the largest deviation of the number of eigenvalues below any point.

`sqrt(2 / beta) / pi` at beta = 1, real entries: the maximum of the log-correlated field that this
number is (proved for beta = 2 by Claeys, Fahs, Lambert and Webb, Duke Math. J. 170 (2021) 2085).
"""

SPREAD, BIAS = 1.0, 0.5
"""Eigenvalues to add, by simulation: for chance, and for what no average over slices takes away.

The bias is the correction of the law at finite M, up to a quarter of an eigenvalue, and that of the
kurtosis of the entries.
"""


def random_like(spectrum: Spectrum, false_alarm: float = FALSE_ALARM) -> bool:
    """Whether the spectrum is that of a matrix of independent entries of one variance and mean zero.

    Needs no shuffling: the distance to the Marchenko-Pastur law must be within `random_bound`, and
    `fit_mp` must find no spike. A fresh initialisation passes in 99 of 100 cases, Gaussian, uniform
    or truncated, pooled, rounded to 16 bits or not; the one fails because of a spike. One spike is
    seen when `fit_mp` sees it, many weak ones or a bulk of another shape by the distance.

    Not random-like are independent entries with heavy tails (Student's t with fewer than 4 degrees
    of freedom; most matrices with 90 % zeros), with a mean, or of several variances. What was learned
    is not seen while it is weaker than the spikes that `fit_mp` can find.

    Args:
        spectrum: Eigenvalues of a layer, possibly pooled over `rf` slices.
        false_alarm: Probability of a spike in a random matrix, see `EnergyMP`.

    Returns:
        False too for fewer than 8 eigenvalues, or slices that are vectors: too few to tell.

    Cost: one pass over the eigenvalues, and if they follow the law, a fit of a bulk without spikes;
    no device work.
    """
    if len(spectrum.evals) < MIN_TAIL or spectrum.M < 2 or not 0.0 < spectrum.norm < math.inf:
        return False
    if random_distance(spectrum) > random_bound(spectrum.M, spectrum.rf):
        return False
    return fit_mp(spectrum, false_alarm).num_spikes == 0


def random_distance(spectrum: Spectrum) -> float:
    """Kolmogorov-Smirnov distance of the eigenvalues, at mean one, to the Marchenko-Pastur law."""
    evals = spectrum.normalized() * spectrum.N
    law = mp_distribution(evals, spectrum.N, spectrum.M)
    steps = np.arange(len(evals) + 1) / len(evals)
    return float(max((steps[1:] - law).max(), (law - steps[:-1]).max()))


def random_bound(M: int, rf: int = 1) -> float:
    """Distance that the spectrum of a random matrix exceeds in hardly one of a thousand cases.

    `((FIELD ln M + SPREAD) / sqrt(rf) + BIAS) / M`. Eigenvalues repel, hence 1/M where independent
    numbers have 1/sqrt(M); slices are independent of each other, hence sqrt(rf).
    """
    return ((FIELD * math.log(M) + SPREAD) / math.sqrt(rf) + BIAS) / M
