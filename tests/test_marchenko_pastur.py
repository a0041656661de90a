import math

import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp
from scipy.optimize import brentq
from scipy.special import airy
from scipy.stats import binom

from ww_train.marchenko_pastur import (
    fit_mp,
    mp_density,
    mp_edges,
    signal_energy,
    tracy_widom_edge,
    tracy_widom_quantile,
)
from ww_train.spectrum import Spectrum


def noise(N, M, rng):
    return rng.standard_normal((N, M))


def spectrum(*slices):
    evals = [np.linalg.svd(w, compute_uv=False) ** 2 for w in slices]
    N, M = slices[0].shape
    return Spectrum(np.sort(np.concatenate(evals)), N, M, len(slices))


def planted(N, M, strengths, seed):
    """Unit noise plus orthogonal signals, their strength in units of the detection limit."""
    rng = np.random.default_rng([seed, N, M])
    k = len(strengths)
    u = np.linalg.qr(rng.standard_normal((N, k)))[0]
    v = np.linalg.qr(rng.standard_normal((M, k)))[0]
    return noise(N, M, rng) + (u * np.array(strengths) * (N * M) ** 0.25) @ v.T


@pytest.fixture(scope="module")
def tracy_widom_cdf():
    """TW1 from the Hastings-McLeod solution of Painlevé II, q'' = s q + 2 q³ with q ~ Ai."""

    def slope(s, y):
        q, dq, _, square, _ = y
        return [dq, s * q + 2 * q**3, -square, -(q**2), -q]

    start, end = 8.0, -4.5
    q, dq, *_ = airy(start)
    y = [q, dq, 0, 0, 0]
    solution = solve_ivp(
        slope, (start, end), y, "DOP853", dense_output=True, rtol=1e-12, atol=1e-18
    ).sol

    def cdf(s):
        y = solution(s)
        return math.exp(-0.5 * (y[2] + y[4]))

    return cdf


def test_the_oracle_has_the_tabulated_quantiles(tracy_widom_cdf):
    for p, quantile in ((0.90, 0.4501), (0.95, 0.9793), (0.99, 2.0234)):
        assert tracy_widom_cdf(quantile) == pytest.approx(p, abs=1e-4)


@pytest.mark.parametrize(
    ("p", "error"), [*((p, 0.0) for p in (0.05, 0.1, 0.5, 0.9, 0.95, 0.99)), (0.999, -0.026)]
)
def test_tracy_widom_quantile_is_as_exact_as_stated(p, error, tracy_widom_cdf):
    exact = brentq(lambda s: tracy_widom_cdf(s) - p, -4.4, 6)
    assert tracy_widom_quantile(p) == pytest.approx(exact + error, abs=0.01)


@pytest.mark.parametrize(("N", "M"), [(200, 200), (200, 100), (500, 20)])
@pytest.mark.parametrize("sigma", [1e-3, 1.0, 30.0])
def test_density_has_mass_one_and_the_mean_of_the_matrix(N, M, sigma):
    low, high = (sigma**2 * edge for edge in mp_edges(N, M))

    def moment(k):
        # lambda = u² removes the inverse square root at zero of a square matrix
        def integrand(u):
            return mp_density(np.array([u * u]), N, M, sigma)[0] * u ** (2 * k) * 2 * u

        return quad(integrand, math.sqrt(low), math.sqrt(high), limit=200)[0]

    assert moment(0) == pytest.approx(1.0, abs=1e-6)
    assert moment(1) == pytest.approx(sigma**2 * N, rel=1e-6)


def test_density_is_zero_outside_its_edges():
    low, high = mp_edges(200, 100)
    assert not mp_density(np.array([0.0, 0.99 * low, 1.01 * high]), 200, 100, 1.0).any()


def test_density_is_the_histogram_of_a_random_matrix():
    N, M = 1600, 400
    evals = spectrum(noise(N, M, np.random.default_rng(0))).evals
    edges = np.linspace(*mp_edges(N, M), 11)
    counts, _ = np.histogram(evals, edges)
    for count, a, b in zip(counts, edges[:-1], edges[1:], strict=True):
        share = quad(lambda x: mp_density(np.array([x]), N, M, 1.0)[0], a, b)[0]
        assert count == pytest.approx(M * share, abs=3)  # eigenvalues are rigid


NULLS = [(64, 64, 1), (128, 32, 1), (64, 8, 1), (32, 16, 9), (12, 8, 9)]


@pytest.mark.parametrize("shape", NULLS)
@pytest.mark.parametrize("false_alarm", [0.01, 0.1])
def test_a_random_matrix_shows_a_spike_no_more_often_than_asked(shape, false_alarm):
    N, M, rf = shape
    trials, alarms = 300, 0
    for seed in range(trials):
        rng = np.random.default_rng([seed, N, M])
        s = spectrum(*(noise(N, M, rng) for _ in range(rf)))
        alarms += fit_mp(s, false_alarm).num_spikes > 0
    # the formula is asymptotic: allow 1.5 times the nominal rate, and then chance
    assert alarms <= binom.ppf(0.9999, trials, 1.5 * false_alarm)
    if false_alarm == 0.1:  # a test that never fires would pass the bound above
        assert alarms >= binom.ppf(0.0001, trials, 0.4 * false_alarm)


@pytest.mark.parametrize(("N", "M"), [(256, 128), (200, 200), (512, 64)])
@pytest.mark.parametrize(
    "strengths",
    [[3], [3, 2.5], [5, 4, 3, 2.5], [100, 3], [20, 10, 5, 3], [3] * 10],
    ids=str,
)
def test_planted_spikes_are_counted_and_do_not_move_sigma(N, M, strengths):
    for seed in range(3):
        weight = planted(N, M, strengths, seed)
        fit = fit_mp(spectrum(weight))
        assert fit.num_spikes == len(strengths)
        rms = math.sqrt((weight**2).mean())
        assert fit.sigma_mp * rms == pytest.approx(1.0, abs=0.02)
        assert fit.bulk_max == pytest.approx(mp_edges(N, M)[1], rel=0.04)


@pytest.mark.parametrize(("N", "M"), [(256, 128), (200, 200), (512, 64)])
@pytest.mark.parametrize("strength", [0.3, 0.6])
def test_signals_under_the_detection_limit_are_not_spikes(N, M, strength):
    counts = [fit_mp(spectrum(planted(N, M, [strength], s))).num_spikes for s in range(5)]
    assert counts == [0] * 5


def test_weak_spikes_are_not_invented_beside_a_strong_one():
    counts = [fit_mp(spectrum(planted(256, 128, [50, 0.5, 0.5], s))).num_spikes for s in range(5)]
    assert counts == [1] * 5


@pytest.mark.parametrize("theta", [2.0, 5.0, 50.0])
def test_signal_energy_inverts_the_position_of_a_spike(theta):
    N, M, variance = 256, 128, 0.7
    strength = (theta**2) * variance * math.sqrt(N * M)
    position = (strength + variance * N) * (strength + variance * M) / strength
    assert signal_energy(np.array([position]), N, M, variance)[0] == pytest.approx(strength)


def test_edges_order_and_threshold():
    low, high = mp_edges(256, 128)
    assert low == pytest.approx((16 - 128**0.5) ** 2)
    assert high == pytest.approx((16 + 128**0.5) ** 2)
    strict, loose = tracy_widom_edge(256, 128, 0.001), tracy_widom_edge(256, 128, 0.1)
    assert high < loose < strict < 1.1 * high
    fit = fit_mp(spectrum(planted(256, 128, [3], 0)))
    assert fit.bulk_min < fit.bulk_max < fit.threshold


@pytest.mark.parametrize("factor", [1e-15, 1e15])
@pytest.mark.parametrize("strengths", [[], [5, 3]], ids=str)
def test_scale_law(factor, strengths):
    s = spectrum(planted(128, 64, strengths, 0))
    scaled = Spectrum(s.evals * factor**2, s.N, s.M)
    a, b = fit_mp(s), fit_mp(scaled)
    assert a.num_spikes == b.num_spikes == len(strengths)
    assert b.sigma_mp == pytest.approx(a.sigma_mp, rel=1e-9)
    for name in ("bulk_min", "bulk_max", "threshold"):
        assert getattr(b, name) == pytest.approx(getattr(a, name) * factor**2, rel=1e-9)


@pytest.mark.parametrize("rf", [1, 4])
def test_spikes_are_the_eigenvalues_above_the_threshold(rf):
    slices = [planted(128, 64, [5, 3], seed) for seed in range(rf)]
    s = spectrum(*slices)
    fit = fit_mp(s)
    assert fit.num_spikes == 2 * rf == np.count_nonzero(s.evals > fit.threshold)


def test_a_rank_one_matrix_is_one_spike_without_noise():
    weight = np.outer(np.arange(1.0, 41), np.ones(30))
    fit = fit_mp(spectrum(weight))
    assert fit.num_spikes == 1
    assert fit.sigma_mp < 1e-6
