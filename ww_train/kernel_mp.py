"""WeightWatcher's fit of the random bulk: the Marchenko-Pastur density nearest to a kernel density.

For comparison with published numbers. `ww_train.marchenko_pastur` is the fit to rely on: this one
cannot see a bulk narrower than its bandwidth or its grid, which one large spike is enough for, the
quarter circle of square layers has the wrong support, and the margin at the edge is the square root
of a Tracy-Widom scale, several times too wide for matrices of ordinary size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ww_train.marchenko_pastur import MPFit
from ww_train.spectrum import Array, Spectrum

GRID = 1000
"""Points at which the densities are compared."""

MIN_DENSITY = 0.01
"""Points with less kernel density than this are left out."""

PENALTY = 1000.0
"""Residual at every point if the bulk does not lie around the peak of the kernel density."""


@dataclass(frozen=True)
class KernelMP:
    """The fit of WeightWatcher 0.7.7 (`WeightWatcher.mp_fit`) to rounding, some 100 times faster.

    The eigenvalues at mean one, or the singular values if the layer is square, are smoothed with a
    triangular kernel; sigma minimises the squared difference to the Marchenko-Pastur density, or to
    the quarter circle. The minimum is searched on a grid of 195 values and polished by Nelder and
    Mead. The kernel density does not depend on sigma and is computed once.

    Attributes:
        bandwidth: Half-width of the kernel on the scale on which the eigenvalues have mean one.
    """

    bandwidth: float = 0.1

    def __call__(self, spectrum: Spectrum, /) -> MPFit:
        """Fit the bulk of a spectrum.

        Raises:
            ValueError: If the eigenvalues have no positive, finite sum, or their kernel density is
                too low everywhere (there WeightWatcher reports -1).

        Cost: some 250 evaluations of a density at 1000 points, a few milliseconds; no device work.
        """
        if not 0.0 < spectrum.norm < math.inf:
            raise ValueError(
                f"expected eigenvalues with a positive, finite sum, got the sum {spectrum.norm}"
            )
        mean = float(spectrum.evals.mean())
        evals, Q = spectrum.evals / mean, spectrum.Q
        width = 1.0 + 1.0 / math.sqrt(Q)
        x, density = self._smoothed(np.sqrt(evals) if Q == 1 else evals)
        cost = _quarter_circle_cost(x, density) if Q == 1 else _bulk_cost(x, density, Q)
        sigma = _minimize(cost, scale=math.sqrt(evals[-1]) / width)
        low, high = (sigma * (2.0 - width)) ** 2, (sigma * width) ** 2
        tracy_widom = high ** (2 / 3) * spectrum.M ** (-2 / 3) / math.sqrt(Q)
        threshold = high + math.sqrt(tracy_widom)
        return MPFit(
            sigma_mp=sigma,
            bulk_min=low * mean,
            bulk_max=high * mean,
            threshold=threshold * mean,
            num_spikes=int(np.count_nonzero(evals > threshold)),
        )

    def _smoothed(self, values: Array) -> tuple[Array, Array]:
        """The grid from zero to beyond the ascending values, and their kernel density on it."""
        x = np.linspace(0.0, values[-1] + 0.5, GRID)
        density = triangular_density(values, x, self.bandwidth)
        dense = density > MIN_DENSITY
        if not dense.any():
            raise ValueError(
                f"the kernel density of {len(values)} eigenvalues is below {MIN_DENSITY} on all of "
                "its grid: the spectrum is too wide for KernelMP, use EnergyMP"
            )
        return x[dense], density[dense]


def triangular_density(values: Array, x: Array, bandwidth: float) -> Array:
    """Kernel density `mean(max(0, 1 - |x - value| / h)) / h` of ascending values at the points x.

    Cost: O((len(x) + len(values)) log len(values)), by partial sums.
    """
    left, middle, right = (np.searchsorted(values, x + d) for d in (-bandwidth, 0.0, bandwidth))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    below = (middle - left) * (bandwidth - x) + sums[middle] - sums[left]
    above = (right - middle) * (bandwidth + x) - sums[right] + sums[middle]
    density: Array = (below + above) / (bandwidth**2 * len(values))
    return density


def _bulk_cost(x: Array, density: Array, Q: float) -> Callable[[Array], Array]:
    """Squared distance to the Marchenko-Pastur density, as a function of `(k, 1)` sigmas."""
    peak, last = x[density.argmax()], x[-1]

    def cost(sigma: Array) -> Array:
        low, high = ((sigma * (1.0 + side / math.sqrt(Q))) ** 2 for side in (-1, 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            fitted = Q / (2 * math.pi * sigma**2 * x) * np.sqrt((high - x) * (x - low))
        misplaced = (high < peak) | (high > last) | (low > peak)
        residual = np.where(misplaced, PENALTY, np.nan_to_num(fitted) - density)
        total: Array = (residual**2).sum(axis=-1)
        return total

    return cost


def _quarter_circle_cost(x: Array, density: Array) -> Callable[[Array], Array]:
    """Squared distance to `sqrt(4 - x²) / (pi sigma²)`, as a function of `(k, 1)` sigmas.

    The quarter circle of noise is `sqrt(4 sigma² - x²) / (pi sigma²)`; this one, WeightWatcher's,
    changes its mass instead of its width.
    """
    circle = np.sqrt(np.maximum(4.0 - x**2, 0.0)) / math.pi

    def cost(sigma: Array) -> Array:
        total: Array = ((circle / sigma**2 - density) ** 2).sum(axis=-1)
        return total

    return cost


def _minimize(cost: Callable[[Array], Array], scale: float) -> float:
    """Least cost: the best of a grid, `scipy.optimize.brute`'s, and from there Nelder and Mead."""
    from scipy.optimize import fmin  # here, because importing it takes longer than a fit

    sigmas = np.arange(0.05 * scale, 2.0 * scale, 0.01 * scale)
    start = sigmas[cost(sigmas[:, None]).argmin()]

    def at(sigma: Array) -> float:
        return float(cost(sigma))

    return float(fmin(at, start, disp=False)[0])
