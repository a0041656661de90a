import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ww_train.power_law import PowerLawFit, fit_power_law

from .oracles import evals_by_svd, gaussian, heavy, pareto, power_law_scan, quick

SPECTRA = {
    "pareto 20": pareto(20, 2.5),
    "pareto 300": pareto(300, 2.2),
    "pareto 301 steep": pareto(301, 8.0, seed=1),
    "pareto 500 flat": pareto(500, 1.2, seed=2),
    "uniform": np.sort(np.random.default_rng(0).random(300)) + 0.01,
    "lognormal": np.sort(np.exp(2 * np.random.default_rng(1).standard_normal(400))),
    "gaussian matrix": evals_by_svd(gaussian(300, 200)),
    "square gaussian matrix": evals_by_svd(gaussian(150, 150)),
    "heavy matrix": evals_by_svd(heavy(256, 128)),
    "ladder": np.arange(1.0, 201.0),
    "geometric": np.geomspace(1e-12, 1e12, 200),
    "two clusters": np.sort(np.concatenate([pareto(100, 3.0), 1000 * pareto(100, 3.0, seed=4)])),
    "outlier": np.append(pareto(99, 4.0), 1e12),
    "ties": np.sort(np.random.default_rng(5).integers(1, 30, 200)).astype(float),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_pruned_scan_finds_what_the_full_scan_finds(name):
    evals = SPECTRA[name]
    _, i, alpha, distance = power_law_scan(evals)
    fit = fit_power_law(evals)
    assert fit.xmin == evals[i]
    assert fit.alpha == pytest.approx(alpha, rel=1e-9)
    assert pytest.approx(distance, rel=1e-9) == fit.D
    assert fit.xmax == evals[-1]
    assert fit.num_pl_spikes == len(evals) - i
    assert fit.sigma == pytest.approx((alpha - 1) / math.sqrt(len(evals) - i), rel=1e-9)


@pytest.mark.parametrize("n", range(8, 20))
@pytest.mark.parametrize("seed", range(5))
def test_small_samples_follow_the_small_sample_rule(n, seed):
    evals = pareto(n, 2.5, seed)
    _, i, alpha, distance = power_law_scan(evals)
    fit = fit_power_law(evals)
    assert (fit.xmin, fit.num_pl_spikes) == (evals[i], n - i)
    assert fit.num_pl_spikes >= 8
    assert fit.alpha == pytest.approx(alpha, rel=1e-9)
    assert pytest.approx(distance, rel=1e-9) == fit.D


@quick
@given(
    st.lists(st.floats(-12, 12), min_size=8, max_size=60, unique=True),
    st.sampled_from([1e-15, 1.0, 1e15]),
)
def test_any_spectrum_gets_the_least_distance(exponents, scale):
    evals = np.sort(10.0 ** np.array(exponents)) * scale
    least, *_ = power_law_scan(evals)
    fit = fit_power_law(evals)
    if fit is None:
        assert not math.isfinite(least)
        return
    penalty = 0.868 / math.sqrt(fit.num_pl_spikes) if len(evals) < 20 else 0.0
    assert fit.D - penalty == pytest.approx(least, abs=1e-6)
    assert fit.alpha > 1
    assert 0 <= fit.D <= 1
    assert fit.sigma > 0


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 5.0])
def test_alpha_of_a_power_law_is_recovered(alpha):
    errors = []
    for seed in range(20):
        fit = fit_power_law(pareto(1000, alpha, seed))
        errors.append((fit.alpha - alpha) / fit.sigma)
    # sigma ignores the choice of xmin: 0.224 against 0.173 by bootstrap (numerics.md)
    assert abs(np.mean(errors)) < 1.0
    assert np.sqrt(np.mean(np.square(errors))) < 2.5


@pytest.mark.parametrize("exponent", [-50, 50])
def test_a_power_of_two_changes_nothing_but_the_units(exponent):
    evals, factor = SPECTRA["heavy matrix"], 2.0**exponent
    fit, scaled = fit_power_law(evals), fit_power_law(evals * factor)
    assert (scaled.alpha, scaled.D, scaled.sigma) == (fit.alpha, fit.D, fit.sigma)
    assert scaled.num_pl_spikes == fit.num_pl_spikes
    assert (scaled.xmin, scaled.xmax) == (fit.xmin * factor, fit.xmax * factor)


@pytest.mark.parametrize("factor", [1e-200, 1e-30, 1e-15, 1e15, 1e30, 1e200])
@pytest.mark.parametrize("name", ["heavy matrix", "gaussian matrix", "pareto 300"])
def test_scale_invariance(name, factor):
    fit, scaled = fit_power_law(SPECTRA[name]), fit_power_law(SPECTRA[name] * factor)
    assert scaled.alpha == pytest.approx(fit.alpha, rel=1e-9)
    assert scaled.num_pl_spikes == fit.num_pl_spikes
    assert scaled.xmin == pytest.approx(fit.xmin * factor, rel=1e-12)


def test_the_input_is_left_alone_and_the_answer_stays_the_same():
    evals = pareto(100, 2.5)
    before = evals.copy()
    assert fit_power_law(evals) == fit_power_law(evals)
    np.testing.assert_array_equal(evals, before)


@pytest.mark.parametrize("n", [0, 1, 7])
def test_too_few_eigenvalues_have_no_fit(n):
    assert fit_power_law(pareto(n, 2.5)) is None


@pytest.mark.parametrize("n", [8, 19, 20, 300])
@pytest.mark.parametrize("value", [1e-300, 1.0, math.pi, 1e300])
def test_equal_eigenvalues_have_no_fit(n, value):
    assert fit_power_law(np.full(n, value)) is None


@pytest.mark.parametrize("n", [8, 19, 20, 300])
def test_eigenvalues_equal_but_for_the_last_bit_have_no_fit(n):
    evals = np.ones(n)
    evals[-1] = np.nextafter(1.0, 2.0)
    assert fit_power_law(evals) is None


@pytest.mark.parametrize(
    ("alpha", "warning"),
    [
        (1.99, "over-trained"),
        (2.0, ""),
        (4.0, ""),
        (6.0, ""),
        (6.01, "under-trained"),
    ],
)
def test_warning(alpha, warning):
    assert PowerLawFit(alpha, 1.0, 2.0, 0.1, 0.1, 50).warning == warning
