"""The truncated power law: rho(lambda) ~ lambda^-alpha exp(-Lambda lambda) above xmin.

Clauset, Shalizi and Newman, SIAM Review 51 (2009) 661, table 2.1 ("power law with cutoff").
Formulas are in units of xmin: `y = lambda / xmin >= 1`, `t = Lambda * xmin`, `u = ln y`. The
normalisation is then `E_alpha(t) = t^(alpha - 1) Gamma(1 - alpha, t)`, the exponential integral of
real order, whose series cancels near integer alpha. It is integrated instead: the integrand is
log-concave in u, so that Gauss-Legendre panels over the range where it matters give it, and its
moments, to about 1e-14 for every alpha and t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ww_train.power_law import PowerLawFit, TailFit, fit_power_law
from ww_train.spectrum import Array

NEGLIGIBLE = 1e-8
"""A cutoff whose exponent stays below this at the largest eigenvalue is none."""

INDEPENDENT = 1e-8
"""Least 1 - rho² of the statistics ln lambda and lambda for which alpha and Lambda are two."""


@dataclass(frozen=True)
class TruncatedPowerLaw:
    """Maximum likelihood for alpha and Lambda >= 0 above the xmin of another fit.

    alpha and Lambda form an exponential family: the log-likelihood is concave and its maximum
    unique. It lies at Lambda = 0, where the fit is the power law's with `Lambda=0.0`, if the mean
    of the tail is at least `xmin (alpha - 1) / (alpha - 2)`, the power law's. With Lambda > 0 any
    alpha can be normalised, also one below 1 or below 0: it says that the tail falls like an
    exponential from xmin on, and that alpha is then no measure of how heavy it is ("over-trained"
    in `warning` included). Tails of a few tens of eigenvalues seldom determine both: see `sigma`.

    `sigma` is the standard error of alpha from the observed information, Lambda being estimated
    too; `D` the distance of the tail from the truncated law. WeightWatcher's `fit="TPL"` is
    `TruncatedPowerLaw()`, its "E_TPL" `TruncatedPowerLaw(XminPeak())`; both searched xmin by the
    truncated law's own distance, with a package whose version 2.0 limits alpha to 0 to 3 and with
    which they always fail.

    Attributes:
        tail: Chooses the tail, hence xmin; its exponent is not used.
    """

    tail: TailFit = fit_power_law

    def __call__(self, evals: Array, /) -> PowerLawFit | None:
        """Fit positive eigenvalues, ascending.

        Returns:
            The fit, or None if there is no tail or its eigenvalues are so close to each other that
            alpha and Lambda cannot be told apart (relative spread below about 5e-4).

        Cost: that of `tail`, about 30 quadratures of 512 points (1 ms), and one of 16 points an
        eigenvalue for D.
        """
        power = self.tail(evals)
        if power is None:
            return None
        end = int(np.searchsorted(evals, power.xmax, side="right"))
        tail = evals[end - power.num_pl_spikes : end]
        logs, excess = np.log(tail / power.xmin), (tail - power.xmin) / power.xmin
        mean_log, mean_excess = float(logs.mean()), float(excess.mean())
        least = NEGLIGIBLE / float(excess[-1])
        law = _maximum_likelihood(mean_log, mean_excess, least)
        if law is None:
            return None
        if law.t <= least:
            return replace(power, Lambda=0.0)
        n = len(tail)
        gaps = np.abs(1.0 - law.survival(logs) - np.arange(n) / n)
        return replace(
            power,
            alpha=law.alpha,
            Lambda=law.t / power.xmin,
            D=float(gaps.max()),
            sigma=1.0 / math.sqrt(n * law.var_log * law.independence),
        )


def sample(fit: PowerLawFit, size: int, generator: np.random.Generator) -> Array:
    """Draw from the law of a fit, with its cutoff if it has one.

    A power law is drawn exactly; the cutoff law from a table of its distribution at 4096 points in
    between which ln lambda is uniform (an error of the distribution below 1e-4).
    """
    if fit.Lambda:
        law = _Law(fit.alpha, fit.Lambda * fit.xmin)
        grid = np.linspace(law.low, law.high, 4096)
        logs = np.interp(generator.random(size), 1.0 - law.survival(grid), grid)
    else:
        logs = generator.standard_exponential(size) / (fit.alpha - 1.0)
    # an exponent near 1 draws values beyond the range of floats
    drawn: Array = fit.xmin * np.exp(np.minimum(logs, _HIGHEST - max(0.0, math.log(fit.xmin))))
    return drawn


class _Law:
    """The truncated law at one (alpha, t): normalisation, moments of (u, t (y - 1)), survival."""

    def __init__(self, alpha: float, t: float) -> None:
        self.alpha, self.t = alpha, t
        self.low, self.high, self._top = _range(1.0 - alpha, t)
        u, weights = self._nodes(np.linspace(self.low, self.high, _PANELS + 1))
        total = float(weights.sum())
        self.log_norm = self._top + math.log(total)
        """ln of the integral of y^-alpha exp(-t (y - 1)) over y >= 1."""
        p, v = weights / total, t * np.expm1(u)
        self.mean_log, self.mean_decay = float((p * u).sum()), float((p * v).sum())
        du, dv = u - self.mean_log, v - self.mean_decay
        self.var_log, self.var_decay = float((p * du * du).sum()), float((p * dv * dv).sum())
        self.cov = float((p * du * dv).sum())

    @property
    def independence(self) -> float:
        """1 - rho² of u and y."""
        return 1.0 - self.cov**2 / (self.var_log * self.var_decay)

    def _nodes(self, edges: Array) -> tuple[Array, Array]:
        """Points of the cells between edges, and their weights relative to exp(top)."""
        half = np.diff(edges)[:, None] / 2.0
        u = edges[:-1, None] + half * (1.0 + _NODES)
        log_density = (1.0 - self.alpha) * u - self.t * np.expm1(u) - self._top
        return u, half * _WEIGHTS * np.exp(log_density)

    def survival(self, logs: Array) -> Array:
        """Probability of more than each of the ascending `logs`, u = ln y."""
        inside = np.clip(logs, self.low, self.high)
        panels = np.linspace(self.low, self.high, _PANELS + 1)
        edges = np.concatenate([inside, panels])
        order = np.argsort(edges, kind="stable")
        masses = self._nodes(edges[order])[1].sum(axis=1)
        above = np.append(np.cumsum(masses[::-1])[::-1], 0.0)
        survival = np.empty(len(edges))
        survival[order] = above / above[0]
        return survival[: len(logs)]


def _range(slope: float, t: float) -> tuple[float, float, float]:
    """Where exp(slope u - t (e^u - 1)), u >= 0, is above 1e-17 of its maximum; ln of the latter."""

    def log_density(u: float) -> float:
        return slope * u - t * math.expm1(u)

    mode = max(0.0, math.log(slope / t)) if slope > 0.0 else 0.0
    top = log_density(mode)
    curvature = t * math.exp(mode)
    step = 1.0 / (1.0 + abs(slope - curvature) + math.sqrt(curvature))
    high = mode + step
    while high < _HIGHEST and log_density(high) > top - 40.0:
        high = min(_HIGHEST, mode + 1.5 * (high - mode))
    low = mode - step
    while low > 0.0 and log_density(low) > top - 40.0:
        low = mode - 1.5 * (mode - low)
    return max(0.0, low), high, top


def _maximum_likelihood(mean_log: float, mean_excess: float, least: float) -> _Law | None:
    """The law whose means of u and y - 1 are these, with t at least `least`; None if degenerate.

    For each t the alpha that fits the first mean; of those laws the mean of y - 1 falls with t
    (the profile likelihood is concave), so that t is a root that can be bracketed.
    """
    law = _with_mean_log(mean_log, least, 1.0 + 1.0 / mean_log)
    if law.mean_decay <= least * mean_excess:
        return law
    low, high, log_t = math.log(least), math.inf, -math.log(mean_excess)
    for _ in range(_STEPS):
        law = _with_mean_log(mean_log, math.exp(log_t), law.alpha)
        if not law.independence > INDEPENDENT:
            return None
        off = math.log(law.mean_decay / mean_excess) - log_t
        if off > 0.0:
            low = log_t
        else:
            high = log_t
        step = off * law.mean_decay / (law.var_decay * law.independence)
        if abs(step) < 1e-12:
            break
        log_t += max(-3.0, min(3.0, step))
        if not low < log_t < high:
            log_t = (low + high) / 2.0
    return law


def _with_mean_log(mean_log: float, t: float, alpha: float) -> _Law:
    """The law of this t whose mean of u is `mean_log`, by Newton's method from `alpha`.

    In 1 / mean(u), which is `alpha - 1` if t = 0 and near linear otherwise; steps that increase the
    error are halved.
    """
    law = _Law(alpha, t)
    for _ in range(_STEPS):
        off = law.mean_log - mean_log
        step = off * law.mean_log / (mean_log * law.var_log)
        trial = _Law(law.alpha + step, t)
        while abs(trial.mean_log - mean_log) > abs(off):
            step /= 2.0
            if abs(step) < 1e-13 * (1.0 + abs(law.alpha)):
                return law
            trial = _Law(law.alpha + step, t)
        law = trial
        if abs(step) < 1e-10 * (1.0 + abs(law.alpha)):  # the next would be below rounding
            return law
    return law


_PANELS, _STEPS = 32, 60
_HIGHEST = 700.0  # e to this power is still a float
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
