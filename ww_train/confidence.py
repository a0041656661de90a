"""How far to trust alpha: bootstrap interval and goodness of fit.

Clauset, Shalizi and Newman, SIAM Review 51 (2009) 661, sections 3.3 and 4.1. Both treat eigenvalues
as independent draws, which they are not: they repel. What the numbers then mean was found by
simulation, on spectra with 128 and with 512 eigenvalues (200 and 120 of each kind, 100 replicates;
`tests/test_confidence.py` repeats the main lines):

* Independent draws from a power law, alone or above another body: p is at most 0.1 in 4 to 13 % of
  the spectra (10 % expected); the 95 % interval holds the true alpha in 94 to 98 %.
* Gaussian matrices, Q = 1, 2 and 8: p is at most 0.1 in 52 to 64 % with 128 and 76 to 84 % with 512
  eigenvalues. So a small p speaks against a power law although eigenvalues repel, and a large one
  does not prove it: many a small layer without any tail passes.
* Entries of Student's t with 1, 1.5 or 2.5 degrees of freedom: p is at most 0.1 in 3 to 14 %, as for
  independent draws.
* Gaussian matrices whose covariance has a power-law spectrum without randomness: here repulsion
  rules. p is above 0.9 in 76 to 100 % and never at most 0.1, and the interval is 4 to 9 times as
  wide as alpha varies from matrix to matrix.
* In all other kinds the interval holds the alpha of another random matrix of its kind in 83 to 96 %.
  It tells how alpha varies when the layer is drawn again, or scatters between minima of the
  distance. It does not hold the bias of the fit: of t entries with 2.5 degrees of freedom, whose
  largest eigenvalues have exponent 1 + 2.5 / 2 in the limit (Auffinger, Ben Arous and Peche, AIHP
  45 (2009) 589), it holds that exponent in 57 % with 128 and 1 % with 512 eigenvalues.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ww_train.power_law import PowerLawFit, TailFit, fit_power_law
from ww_train.spectrum import Array
from ww_train.truncated import sample


@dataclass(frozen=True)
class Confidence:
    """What `confidence` found.

    Attributes:
        low: Lower end of the interval of alpha.
        high: Upper end.
        p_value: Share of spectra drawn from the fit that lie at least as far from their own fit.
        level: Share of the bootstrap's alphas inside the interval.
        replicates: Spectra drawn for the interval, and as many for the p-value.
        seed: Seed of both.
    """

    low: float
    high: float
    p_value: float
    level: float
    replicates: int
    seed: int


def confidence(
    evals: Array,
    fit: TailFit = fit_power_law,
    *,
    replicates: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Confidence | None:
    """`alpha_interval` and `goodness_of_fit` of one spectrum; None if either is."""
    interval = alpha_interval(evals, fit, replicates=replicates, level=level, seed=seed)
    p_value = goodness_of_fit(evals, fit, replicates=replicates, seed=seed)
    if interval is None or p_value is None:
        return None
    return Confidence(*interval, p_value, level, replicates, seed)


def alpha_interval(
    evals: Array,
    fit: TailFit = fit_power_law,
    *,
    replicates: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of alpha over spectra resampled with replacement, xmin refitted in each.

    Args:
        evals: Positive eigenvalues, ascending.
        fit: The fit in question.
        replicates: Spectra drawn.
        level: Share of their alphas inside the interval.
        seed: Seed of an own generator; the global one is not used.

    Returns:
        Lower and upper end, or None if the spectrum, or most of the drawn, have no fit.

    Raises:
        ValueError: If `replicates` is below 1, `level` not between 0 and 1, or `seed` negative.

    Cost: `replicates` fits.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is a share between 0 and 1, got {level}")
    if fit(evals) is None:
        return None
    generator = _generator(seed, replicates, stream=0)
    spectra = (np.repeat(evals, _counts(len(evals), generator)) for _ in range(replicates))
    alphas = [replicate.alpha for replicate in _fits(fit, spectra)]
    if 2 * len(alphas) <= replicates:
        return None
    low, high = np.quantile(alphas, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def goodness_of_fit(
    evals: Array,
    fit: TailFit = fit_power_law,
    *,
    replicates: int = 200,
    seed: int = 0,
) -> float | None:
    """p-value of the tail's law: share of spectra drawn from it that are fitted no better.

    A drawn spectrum has as many eigenvalues. Each comes from the fitted law with the probability of
    the tail, otherwise from the eigenvalues below xmin with replacement; the drawn spectrum is
    fitted anew, xmin included, and its distance D compared. Eigenvalues that `fit` dropped from the
    top stay as they are.

    Args:
        evals: Positive eigenvalues, ascending.
        fit: The fit in question.
        replicates: Spectra drawn; the p-value is uncertain by up to `0.5 / sqrt(replicates)`.
        seed: Seed of an own generator; the global one is not used.

    Returns:
        The p-value, or None if the spectrum, or most of the drawn, have no fit.

    Raises:
        ValueError: If `replicates` is below 1 or `seed` negative.

    Cost: `replicates` fits.
    """
    observed = fit(evals)
    if observed is None:
        return None
    generator = _generator(seed, replicates, stream=1)
    spectra = (_drawn(evals, observed, generator) for _ in range(replicates))
    distances = [replicate.D for replicate in _fits(fit, spectra)]
    if 2 * len(distances) <= replicates:
        return None
    return float(np.mean(np.array(distances) >= observed.D))


def _drawn(evals: Array, fit: PowerLawFit, generator: np.random.Generator) -> Array:
    end = int(np.searchsorted(evals, fit.xmax, side="right"))
    below, dropped = evals[: end - fit.num_pl_spikes], evals[end:]
    size = int(generator.binomial(end, fit.num_pl_spikes / end))
    tail = sample(fit, size, generator)
    rest = below[generator.integers(len(below), size=end - size)] if size < end else below[:0]
    return np.sort(np.concatenate([rest, tail, dropped]))


def _counts(n: int, generator: np.random.Generator) -> npt.NDArray[np.intp]:
    """How often each of n eigenvalues is drawn; keeps the order, so that nothing is sorted."""
    return np.bincount(generator.integers(n, size=n), minlength=n)


def _fits(fit: TailFit, spectra: Iterator[Array]) -> Iterator[PowerLawFit]:
    for evals in spectra:
        found = fit(evals)
        if found is not None:
            yield found


def _generator(seed: int, replicates: int, stream: int) -> np.random.Generator:
    if replicates < 1:
        raise ValueError(f"at least one replicate is needed, got {replicates}")
    return np.random.default_rng([seed, stream])
