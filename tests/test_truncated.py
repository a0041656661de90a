import math
import time

import mpmath
import numpy as np
import pytest
from scipy import integrate, optimize

from ww_train.fingers import XminPeak
from ww_train.power_law import PowerLaw, fit_power_law
from ww_train.truncated import TruncatedPowerLaw, _Law, sample

from .oracles import evals_by_svd, gaussian, heavy, named, pareto

ABOVE_ONE = TruncatedPowerLaw(PowerLaw(xmin=1.0))


def truncated(n, alpha, Lambda, seed=0):
    """Exact sorted sample of x^-alpha exp(-Lambda x) above one, by rejection (Clauset, app. D)."""
    generator = np.random.default_rng(seed)
    kept = np.empty(0)
    while len(kept) < n:
        if alpha < 0:
            x = generator.gamma(1 - alpha, 1 / Lambda, 4 * n)
            kept = np.append(kept, x[x > 1])
            continue
        uniform = generator.random((2, 4 * n))
        if alpha > 1 and Lambda < 0.3:
            x = (1 - uniform[0]) ** (-1 / (alpha - 1))
            accept = np.exp(-Lambda * (x - 1))
        else:
            x = 1 - np.log(1 - uniform[0]) / Lambda
            accept = x**-alpha
        kept = np.append(kept, x[uniform[1] < accept])
    return np.sort(kept[:n])


def log_likelihood(tail, alpha, Lambda):
    """Of a tail in units of xmin, with mpmath's normalisation."""
    norm = mpmath.expint(alpha, Lambda)
    return float(-alpha * np.log(tail).sum() - Lambda * tail.sum() - len(tail) * mpmath.log(norm))


# The law


@pytest.mark.parametrize("alpha", [-300, -20, -3.5, -1, 0, 0.5, 1, 1.001, 1.5, 2, 2 + 1e-7, 3, 80])
def test_the_normalisation_is_the_exponential_integral(alpha):
    for t in (1e-30, 1e-12, 1e-6, 1e-3, 0.1, 1, 3, 30, 500, 1e4):
        with mpmath.workdps(40):
            exact = float(mpmath.log(mpmath.expint(mpmath.mpf(alpha), mpmath.mpf(t))) + t)
        assert _Law(alpha, t).log_norm == pytest.approx(exact, rel=1e-13, abs=1e-14)


@pytest.mark.parametrize("alpha", [-3.5, 0.5, 1.0, 1.5, 2.0, 4.5])
@pytest.mark.parametrize("t", [1e-2, 1.0, 30.0])
def test_moments_and_survival_agree_with_quadrature(alpha, t):
    law = _Law(alpha, t)

    def mean(f, start=0.0):
        def integrand(u):
            return f(u) * math.exp((1 - alpha) * u - t * math.expm1(u) - law.log_norm)

        options = {"epsabs": 1e-13, "epsrel": 1e-12, "limit": 200, "points": [0.1, 1.0, 3.0]}
        return integrate.quad(integrand, start, max(law.high, start), **options)[0]

    assert mean(lambda u: 1.0) == pytest.approx(1, rel=1e-10)
    assert law.mean_log == pytest.approx(mean(lambda u: u), rel=1e-10)
    assert law.mean_decay == pytest.approx(mean(lambda u: t * math.expm1(u)), rel=1e-10)
    var_log = mean(lambda u: (u - law.mean_log) ** 2)
    assert law.var_log == pytest.approx(var_log, rel=1e-9)
    var_decay = mean(lambda u: (t * math.expm1(u) - law.mean_decay) ** 2)
    assert law.var_decay == pytest.approx(var_decay, rel=1e-9)
    cov = mean(lambda u: (u - law.mean_log) * (t * math.expm1(u) - law.mean_decay))
    assert law.cov == pytest.approx(cov, rel=1e-9)
    logs = np.array([0.0, 0.01, 0.3, 1.0, 2.5, 100.0])
    tails = [mean(lambda u: 1.0, start) for start in logs[:-1]]
    np.testing.assert_allclose(law.survival(logs), [*tails, 0.0], rtol=1e-9, atol=1e-12)


# The fit


@pytest.mark.parametrize(
    ("alpha", "Lambda"), [(2.5, 0.05), (1.5, 0.01), (1.2, 1.0), (0.5, 0.1), (-1.0, 0.2)]
)
def test_planted_parameters_are_recovered_within_the_statistical_error(alpha, Lambda):
    fits = [ABOVE_ONE(truncated(500, alpha, Lambda, seed)) for seed in range(40)]
    errors = [(fit.alpha - alpha) / fit.sigma for fit in fits]
    assert abs(np.mean(errors)) < 0.6
    assert 0.75 < np.std(errors) < 1.3
    assert np.median([fit.Lambda for fit in fits]) == pytest.approx(Lambda, rel=0.4)
    assert all(fit.num_pl_spikes == 500 for fit in fits)


def test_many_samples_give_the_parameters_themselves():
    fit = ABOVE_ONE(truncated(100_000, 1.8, 0.02))
    assert fit.alpha == pytest.approx(1.8, abs=4 * fit.sigma)
    assert fit.sigma < 0.01
    assert fit.Lambda == pytest.approx(0.02, rel=0.05)
    assert fit.D < 0.005


@pytest.mark.parametrize(
    "evals",
    [
        truncated(200, 2.2, 0.03),
        truncated(60, 0.0, 1.0),
        evals_by_svd(heavy(128, 64)),
        evals_by_svd(gaussian(128, 64)),
        np.linspace(1.0, 3.0, 50),
    ],
    ids=["truncated", "exponential", "heavy matrix", "gaussian matrix", "ladder"],
)
def test_it_is_the_maximum_of_the_likelihood(evals):
    xmin = float(np.median(evals))
    fit = TruncatedPowerLaw(PowerLaw(xmin=xmin))(evals)
    tail = evals[evals >= xmin] / xmin
    assert fit.Lambda > 0

    def loss(p):
        return -log_likelihood(tail, p[0], math.exp(p[1]))

    ours = [fit.alpha, math.log(fit.Lambda * xmin)]
    best = optimize.minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"maxfev": 300})
    assert loss(ours) <= best.fun + 1e-7
    assert fit.alpha == pytest.approx(best.x[0], abs=0.01 * fit.sigma)
    for step in ([1e-3, 0], [-1e-3, 0], [0, 1e-3], [0, -1e-3]):
        assert loss(np.add(ours, step)) >= loss(ours) - 1e-9


def test_sigma_is_the_inverse_of_the_information():
    tail = truncated(300, 2.0, 0.05)
    fit = ABOVE_ONE(tail)
    h, k = 1e-3, 1e-4

    def at(i, j):
        return log_likelihood(tail, fit.alpha + i * h, fit.Lambda + j * k)

    aa = (at(1, 0) + at(-1, 0) - 2 * at(0, 0)) / h**2
    tt = (at(0, 1) + at(0, -1) - 2 * at(0, 0)) / k**2
    at_ = (at(1, 1) + at(-1, -1) - at(1, -1) - at(-1, 1)) / (4 * h * k)
    assert fit.sigma == pytest.approx(math.sqrt(-tt / (aa * tt - at_**2)), rel=1e-3)


def test_the_distance_is_that_of_the_truncated_law():
    tail = truncated(100, 2.0, 0.05)
    fit = ABOVE_ONE(tail)
    norm = mpmath.expint(fit.alpha, fit.Lambda)
    cdf = [1 - x ** (1 - fit.alpha) * mpmath.expint(fit.alpha, fit.Lambda * x) / norm for x in tail]
    distance = max(abs(float(F) - j / 100) for j, F in enumerate(cdf))
    assert pytest.approx(distance, rel=1e-9) == fit.D


# The limit of a power law


def test_without_cutoff_it_is_the_power_law():
    zeros = 0
    for seed in range(40):
        evals = pareto(400, 3.5, seed)
        power, fit = PowerLaw(xmin=1.0)(evals), ABOVE_ONE(evals)
        # the mean of the tail decides which side of Lambda = 0 the maximum lies
        cutoff = evals.mean() < (power.alpha - 1) / (power.alpha - 2)
        assert (fit.Lambda > 0) == cutoff
        if not cutoff:
            zeros += 1
            assert (fit.alpha, fit.D, fit.sigma) == (power.alpha, power.D, power.sigma)
    assert 8 < zeros < 32


@pytest.mark.parametrize("alpha", [1.5, 2.0, 2.5])
def test_a_power_law_with_and_without_cutoff_agree_on_a_power_law(alpha):
    evals = pareto(2000, alpha, seed=3)
    power, fit = PowerLaw(xmin=1.0)(evals), ABOVE_ONE(evals)
    assert fit.alpha == pytest.approx(power.alpha, abs=4 * power.sigma)
    assert fit.Lambda * np.median(evals) < 0.02


def test_the_law_goes_over_into_the_power_law():
    logs = np.linspace(0, 8, 50)
    np.testing.assert_allclose(_Law(2.5, 1e-12).survival(logs), np.exp(-1.5 * logs), atol=1e-8)


# The tail is that of the other fit


@pytest.mark.parametrize("tail", [fit_power_law, PowerLaw(drop_top=3), XminPeak()], ids=named)
def test_the_tail_is_that_of_the_fit_given(tail):
    evals = evals_by_svd(heavy(200, 100))
    power, fit = tail(evals), TruncatedPowerLaw(tail)(evals)
    assert (fit.xmin, fit.xmax) == (power.xmin, power.xmax)
    assert fit.num_pl_spikes == power.num_pl_spikes
    kept = evals[evals <= power.xmax]
    alone = TruncatedPowerLaw(PowerLaw(xmin=power.xmin))(kept)
    assert (fit.alpha, fit.Lambda) == pytest.approx((alone.alpha, alone.Lambda), rel=1e-9)


def test_the_default_tail_is_that_of_fit_power_law():
    evals = evals_by_svd(heavy(200, 100))
    assert TruncatedPowerLaw()(evals) == TruncatedPowerLaw(fit_power_law)(evals)
    assert TruncatedPowerLaw()(evals).xmin == fit_power_law(evals).xmin


# Laws and bad input


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60, 1e-200, 1e200])
def test_scale(factor):
    evals = evals_by_svd(heavy(200, 100))
    fit, scaled = TruncatedPowerLaw()(evals), TruncatedPowerLaw()(evals * factor)
    assert scaled.alpha == pytest.approx(fit.alpha, rel=1e-6)
    assert scaled.Lambda == pytest.approx(fit.Lambda / factor, rel=1e-6)
    assert pytest.approx(fit.D, rel=1e-6) == scaled.D


@pytest.mark.parametrize("n", [0, 1, 7])
def test_few_eigenvalues_have_no_fit(n):
    assert TruncatedPowerLaw()(pareto(n, 2.5)) is None


@pytest.mark.parametrize("n", [8, 20, 200])
def test_equal_eigenvalues_have_no_fit(n):
    assert TruncatedPowerLaw()(np.full(n, math.pi)) is None


@pytest.mark.parametrize("spread", [1e-12, 1e-6, 1e-4])
def test_a_tail_too_narrow_for_two_parameters_has_no_fit(spread):
    assert ABOVE_ONE(1 + spread * np.linspace(0, 1, 50)) is None


@pytest.mark.parametrize("n", [8, 12, 19, 20, 21, 60])
@pytest.mark.parametrize("seed", range(8))
def test_any_spectrum_gets_finite_numbers_or_none(n, seed):
    generator = np.random.default_rng([n, seed])
    evals = np.sort(10.0 ** generator.uniform(-12, 12, n))
    for values in (
        evals,
        np.append(evals, 1e15),
        np.repeat(evals, 2),
        1 + 1e-2 * evals / evals[-1],
    ):
        fit = TruncatedPowerLaw()(values)
        if fit is not None:
            assert all(map(math.isfinite, (fit.alpha, fit.Lambda, fit.sigma)))
            assert fit.Lambda >= 0
            assert fit.sigma > 0
            assert 0 <= fit.D <= 1


# Samples


def test_a_sample_of_a_power_law_is_exact():
    fit = PowerLaw(xmin=2.0)(2 * pareto(300, 2.5))
    drawn = np.sort(sample(fit, 20_000, np.random.default_rng(0))) / 2.0
    gaps = 1 - drawn ** (1 - fit.alpha) - np.arange(20_000) / 20_000
    assert drawn[0] >= 1
    assert np.abs(gaps).max() < 1.63 / math.sqrt(20_000)  # 99 % point of the KS statistic


@pytest.mark.parametrize(("alpha", "Lambda"), [(1.5, 0.001), (2.5, 0.3), (-1.0, 2.0)])
def test_a_sample_of_the_truncated_law_follows_it(alpha, Lambda):
    fit = ABOVE_ONE(truncated(300, alpha, Lambda))
    assert fit.Lambda > 0
    drawn = np.sort(sample(fit, 20_000, np.random.default_rng(0)))
    law = _Law(fit.alpha, fit.Lambda)
    gaps = 1 - law.survival(np.log(drawn)) - np.arange(20_000) / 20_000
    assert drawn[0] >= 1
    assert np.abs(gaps).max() < 1.63 / math.sqrt(20_000)


def test_a_sample_of_the_flattest_law_is_finite():
    evals = np.geomspace(1e-140, 1e140, 12)
    fit = PowerLaw(xmin=float(evals[0]))(evals)
    assert fit.alpha < 1.01
    assert np.isfinite(sample(fit, 10_000, np.random.default_rng(0))).all()


def test_a_fit_is_fast():
    evals = evals_by_svd(heavy(512, 256))
    TruncatedPowerLaw()(evals)
    start = time.process_time()
    for _ in range(10):
        TruncatedPowerLaw()(evals)
    assert time.process_time() - start < 0.2  # 1.2 ms each, with room for a busy machine
