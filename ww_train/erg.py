"""The ERG (trace-log) condition of SETOL: the tail's effective correlation matrix has determinant 1.

Martin and Hinrichs, "SETOL: A Semi-Empirical Theory of (Deep) Learning" (2025), section on the exact
renormalisation group: at the ideal state the eigenvalues of the tail, on the scale on which the
whole spectrum has mean one, satisfy `sum ln lambda = 0`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ww_train.power_law import PowerLawFit
from ww_train.spectrum import Spectrum


@dataclass(frozen=True)
class ErgTail:
    """The tail that the ERG condition selects, and how far the power-law tail is from it.

    Attributes:
        detX_num: Smallest number of top eigenvalues whose product is below one (mean-one scale);
            None if all eigenvalues are equal, when no product is.
        detX_val: The eigenvalue at that position, in original units.
        trace_log: `sum ln lambda` over the power-law tail, mean-one scale; zero at criticality,
            negative if the tail reaches into the bulk. None without a power-law fit.
        ERG_gap: `detX_num` minus the number of eigenvalues from xmin on; zero at criticality.
    """

    detX_num: int | None
    detX_val: float | None
    trace_log: float | None
    ERG_gap: int | None


def erg_tail(spectrum: Spectrum, fit: PowerLawFit | None = None) -> ErgTail:
    """Evaluate the ERG condition of a spectrum, in log space at any size.

    Args:
        spectrum: A spectrum with at least one positive eigenvalue.
        fit: The power-law fit of the same spectrum, for `trace_log` and `ERG_gap`.
    """
    with np.errstate(divide="ignore"):
        log_evals = np.log(spectrum.normalized()[::-1])
    log_det = np.cumsum(log_evals)
    # rounding of a sum of n logs: an exactly flat spectrum must not look like a tail
    below = np.flatnonzero(log_det < -4e-16 * len(log_det))
    detX_num = int(below[0]) + 1 if len(below) else None
    tail = 0
    if fit:  # a fit may leave out eigenvalues above its xmax, which the ERG tail does not
        tail = int(np.count_nonzero(spectrum.evals > fit.xmax)) + fit.num_pl_spikes
    return ErgTail(
        detX_num=detX_num,
        detX_val=float(spectrum.evals[-detX_num]) if detX_num else None,
        trace_log=float(log_det[tail - 1]) if fit else None,
        ERG_gap=detX_num - tail if fit and detX_num else None,
    )
