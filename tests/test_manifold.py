import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from ww_train.erg import erg_tail
from ww_train.power_law import fit_power_law
from ww_train.spectrum import Spectrum
from ww_train.steering import manifold
from ww_train.steering.manifold import (
    EPSILON,
    critical_spectrum,
    feasible_tail_sizes,
    partial_step,
    template_exponent,
)

from .oracles import detx_num, evals_by_svd, gaussian, heavy, pareto, power_law_scan, quick

ALPHAS = [1.5, 2.0, 3.0, 4.0]  # 1.5 has a critical spectrum at some n only

SPECTRA = {
    "pareto": pareto(120, 2.5)[::-1],
    "steep pareto": pareto(64, 6.0, seed=1)[::-1],
    "gaussian": evals_by_svd(gaussian(100, 40))[::-1],
    "square gaussian": evals_by_svd(gaussian(64, 64))[::-1],
    "heavy": evals_by_svd(heavy(90, 60))[::-1],
    "flat": np.full(50, 3.0),
    "one outlier": np.append(1e4, np.ones(49)),
    "twelve decades": np.geomspace(1e6, 1e-6, 80),
    "eighteen": pareto(18, 2.5)[::-1],  # the small-sample rule reads no tail size back
    "eighteen, wide": pareto(18, 1.5)[::-1],
}

CASES = [(s, a) for s in SPECTRA for a in ALPHAS if len(feasible_tail_sizes(len(SPECTRA[s]), a))]


def template(n, k, alpha):
    """Tail of size k of a critical spectrum with mean one, by plain loops."""
    q = k / ((alpha - 1) * (k * math.log(k) - math.fsum(math.log(i) for i in range(1, k + 1))))
    logs = [-q * math.log(i) for i in range(1, k + 1)]
    shift = (-EPSILON - math.fsum(logs)) / k  # trace-log of -EPSILON
    return np.exp(np.array(logs) + shift)


def literal_band(n, alpha, rank):
    """Tail sizes with a bulk between zero and the tail's last eigenvalue, one by one."""
    band = []
    for k in range(2, n):
        tail = template(n, k, alpha)
        bulk = n - math.fsum(tail)
        if 0 <= bulk <= (rank - k) * tail[-1]:
            band.append(k)
    return band


def assert_critical(evals, k, alpha):
    """Conditions 1 to 3 of the manifold, as they are stated."""
    mean = evals.mean()
    q = k / ((alpha - 1) * (k * math.log(k) - math.lgamma(k + 1)))
    for i in range(1, k + 1):
        assert evals[i - 1] == pytest.approx(evals[0] * i**-q, rel=1e-9)
    assert math.fsum(np.log(evals[:k] / mean)) == pytest.approx(-EPSILON, abs=1e-8)
    assert np.all(evals[k:] >= 0)
    assert np.all(evals[k:] <= evals[k - 1] * (1 + 1e-9))


def distance(evals, other):
    return float(np.linalg.norm(np.sqrt(evals) - np.sqrt(other)))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("k", [2, 8, 32, 217])
def test_the_estimator_reads_alpha_off_the_template(k, alpha):
    q = template_exponent(np.array([float(k)]), alpha)[0]
    tail = [i**-q for i in range(1, k + 1)]
    read = 1 + k / math.fsum(math.log(x / tail[-1]) for x in tail)
    assert read == pytest.approx(alpha, rel=1e-12)


def test_the_template_tends_to_the_textbook_exponent():
    sizes = np.array([10.0, 1e3, 1e6, 1e9])
    errors = np.abs(template_exponent(sizes, 3.0) - 0.5)
    assert np.all(np.diff(errors) < 0)
    assert errors[-1] < 1e-7


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", [*range(14), 20, 33, 64, 100])
def test_the_band_is_that_of_the_literal_loop(n, alpha):
    assert feasible_tail_sizes(n, alpha).tolist() == literal_band(n, alpha, n)


@pytest.mark.parametrize("rank", [10, 20, 33, 50, 63])
def test_the_band_of_a_matrix_that_lacks_rank(rank):
    band = feasible_tail_sizes(64, 2.0, rank).tolist()
    assert band == literal_band(64, 2.0, rank)
    assert set(band) <= set(feasible_tail_sizes(64).tolist())


@pytest.mark.parametrize(
    ("n", "first", "last"), [(20, 11, 12), (64, 29, 35), (128, 53, 65), (512, 174, 221)]
)
def test_bands_that_the_theory_prints(n, first, last):
    np.testing.assert_array_equal(feasible_tail_sizes(n), np.arange(first, last + 1.0))


@pytest.mark.parametrize(("name", "alpha"), CASES)
def test_the_three_conditions_hold(name, alpha):
    evals = SPECTRA[name]
    critical = critical_spectrum(evals, alpha)
    assert critical.tail_size in feasible_tail_sizes(len(evals), alpha)
    assert_critical(critical.evals, critical.tail_size, alpha)
    assert np.all(np.diff(critical.evals) <= 1e-12 * critical.evals[0])
    assert critical.evals.sum() == pytest.approx(evals.sum(), rel=1e-12)
    relative = distance(evals, critical.evals) / math.sqrt(evals.sum())
    assert critical.distance == pytest.approx(relative, rel=1e-9, abs=1e-12)


def by_slsqp(source, k, alpha):
    """Least distance from `source` (mean one) to spectra with tail size k, numerically.

    Variables are the square roots. Several starts: the problem is not convex.
    """
    n, roots = len(source), np.sqrt(source)
    q = k / ((alpha - 1) * (k * math.log(k) - math.lgamma(k + 1)))
    ratio = np.arange(1.0, k + 1) ** (-q / 2)
    constraints = [
        {"type": "eq", "fun": lambda s: s[1:k] - s[0] * ratio[1:]},
        {"type": "eq", "fun": lambda s: 2 * np.log(np.maximum(s[:k], 1e-12)).sum() + EPSILON},
        {"type": "eq", "fun": lambda s: s @ s - n},
        {"type": "ineq", "fun": lambda s: s[k - 1] - s[k:]},
    ]
    top = math.exp((q * math.lgamma(k + 1) - EPSILON) / k / 2)
    cap = top * ratio[-1]
    level = math.sqrt(max(0.0, n - (top * ratio) @ (top * ratio)) / (n - k))
    least = math.inf
    for bulk in (np.minimum(roots[k:], cap), np.full(n - k, level), np.linspace(cap, 0, n - k)):
        found = minimize(
            lambda s: ((s - roots) ** 2).sum(),
            np.append(top * ratio, bulk),
            jac=lambda s: 2 * (s - roots),
            method="SLSQP",
            bounds=[(0, None)] * n,
            constraints=constraints,
            options={"maxiter": 200, "ftol": 1e-13},
        )
        s = found.x
        residuals = [np.abs(c["fun"](s)).max() for c in constraints if c["type"] == "eq"]
        if max(residuals) < 1e-7 and (s[k - 1] - s[k:]).min() > -1e-7:
            least = min(least, found.fun)
    return least


SMALL = {
    "pareto": pareto(16, 2.5)[::-1],
    "gaussian": evals_by_svd(gaussian(20, 14))[::-1],
    "flat": np.ones(15),
    "one outlier": np.append(60.0, np.ones(14)),
    "gap in the bulk": np.append(np.full(9, 2.0), np.full(6, 1e-3)),
}


@pytest.mark.parametrize("alpha", [2.0, 3.0])
@pytest.mark.parametrize("name", SMALL)
def test_nothing_that_slsqp_finds_is_nearer(name, alpha):
    evals = SMALL[name]
    source = evals / evals.mean()
    band = feasible_tail_sizes(len(source), alpha).astype(int)
    assert len(band) > 0
    for k in band:
        nearest = manifold._nearest_with_tail(source, k, alpha, len(source))
        assert_critical(nearest, k, alpha)
        assert nearest.sum() == pytest.approx(len(source), rel=1e-12)
        cost = distance(source, nearest) ** 2
        assert cost == pytest.approx(by_slsqp(source, k, alpha), abs=2e-6)


def literal_choice(evals, alpha):
    """Of the nearest spectrum for each k, the nearest that is read with k in the tail, or at all."""
    n, mean = len(evals), evals.mean()
    candidates = []
    for k in literal_band(n, alpha, n):
        nearest = mean * manifold._nearest_with_tail(evals / mean, k, alpha, n)
        read = n - power_law_scan(nearest[::-1])[1] == k
        candidates.append((not read, distance(evals, nearest), k))
    return min(candidates)


@pytest.mark.parametrize(("name", "alpha"), CASES)
def test_the_choice_among_tail_sizes(name, alpha):
    evals = SPECTRA[name]
    critical = critical_spectrum(evals, alpha)
    _, least, k = literal_choice(evals, alpha)
    assert distance(evals, critical.evals) == pytest.approx(least, rel=1e-9)
    assert critical.tail_size == k


def test_the_choice_is_sometimes_not_the_nearest():
    evals = pareto(33, 2.5)[::-1]
    distances = {
        k: distance(
            evals, evals.mean() * manifold._nearest_with_tail(evals / evals.mean(), k, 2.0, 33)
        )
        for k in literal_band(33, 2.0, 33)
    }
    assert critical_spectrum(evals).tail_size != min(distances, key=distances.get)
    assert critical_spectrum(evals).tail_size == literal_choice(evals, 2.0)[2]


@quick
@given(
    st.lists(st.floats(-4, 4), min_size=12, max_size=40),
    st.sampled_from(ALPHAS),
    st.integers(0, 100),
)
def test_no_other_spectrum_with_the_same_tail_is_nearer(exponents, alpha, seed):
    evals = np.sort(10.0 ** np.array(exponents))[::-1]
    n, mean = len(evals), evals.mean()
    critical = critical_spectrum(evals, alpha)
    if critical is None:
        assert literal_band(n, alpha, n) == []
        return
    k = critical.tail_size
    tail = template(n, k, alpha)
    bulk = np.random.default_rng(seed).random(n - k)
    bulk *= (n - tail.sum()) / bulk.sum()
    # mix with the flat bulk, which is feasible, until nothing exceeds the cap
    flat, excess = bulk.mean(), bulk.max() - bulk.mean()
    mix = 1.0 if excess <= 0 else min(1.0, (tail[-1] - flat) / excess)
    other = np.append(tail, np.sort(flat + mix * (bulk - flat))[::-1])
    assert_critical(other, k, alpha)
    slack = 1e-9 * math.sqrt(evals.sum())
    assert distance(evals, mean * other) >= distance(evals, critical.evals) - slack


@pytest.mark.parametrize(("name", "alpha"), CASES)
def test_projecting_twice_changes_nothing(name, alpha):
    once = critical_spectrum(SPECTRA[name], alpha)
    twice = critical_spectrum(once.evals, alpha)
    assert twice.tail_size == once.tail_size
    np.testing.assert_allclose(twice.evals, once.evals, rtol=1e-9)
    assert twice.distance < 1e-9


@pytest.mark.parametrize("factor", [1e-30, 2.0**-7, 1e30])
@pytest.mark.parametrize("name", ["heavy", "gaussian"])
def test_scale(name, factor):
    critical = critical_spectrum(SPECTRA[name])
    scaled = critical_spectrum(SPECTRA[name] * factor)
    assert scaled.tail_size == critical.tail_size
    assert scaled.distance == pytest.approx(critical.distance, rel=1e-9)
    np.testing.assert_allclose(scaled.evals, critical.evals * factor, rtol=1e-11)


def read_back(evals):
    """Alpha and ERG gap of a spectrum, as the library measures them."""
    ascending = evals[::-1]
    fit = fit_power_law(ascending)
    return fit.alpha, erg_tail(Spectrum(ascending, len(evals), len(evals)), fit).ERG_gap


@pytest.mark.parametrize("alpha", [2.0, 3.0, 4.0])
@pytest.mark.parametrize("n", [64, 100, 200])
@pytest.mark.parametrize("matrix", [gaussian, heavy])
def test_the_library_reads_alpha_and_a_closed_gap(matrix, n, alpha):
    critical = critical_spectrum(evals_by_svd(matrix(2 * n, n))[::-1], alpha)
    assert detx_num(critical.evals) == critical.tail_size
    read, gap = read_back(critical.evals)
    assert read == pytest.approx(alpha, abs=1e-9)
    assert gap == 0


@pytest.mark.parametrize(
    ("evals", "alpha"),
    [
        (np.ones(128), 2.0),
        (np.ones(128), 3.0),
        (pareto(33, 2.5)[::-1], 2.0),
    ],
    ids=["flat, 2", "flat, 3", "small pareto, 2"],
)
def test_alpha_is_read_back_where_the_bulk_touches_the_tail(evals, alpha):
    read, gap = read_back(critical_spectrum(evals, alpha).evals)
    assert read == pytest.approx(alpha, abs=0.01)
    assert gap == 0


def test_where_no_tail_size_is_read_back_the_conditions_hold_all_the_same():
    # alpha 1.5 needs a tail of 10, next to a flat bulk
    evals = evals_by_svd(gaussian(1000, 64))[::-1]
    unread, *_ = literal_choice(evals, 1.5)
    assert unread
    critical = critical_spectrum(evals, 1.5)
    assert_critical(critical.evals, critical.tail_size, 1.5)
    assert read_back(critical.evals)[0] == pytest.approx(1.5, abs=0.02)


@pytest.mark.parametrize("rank", [40, 50, 63])
def test_rounding_below_the_rank_becomes_zero(rank):
    evals = pareto(64, 2.5)[::-1].copy()
    evals[rank:] = 1e-14 * evals[0]
    critical = critical_spectrum(evals, 2.0, rank)
    assert np.all(critical.evals[rank:] == 0)
    assert np.all(critical.evals[:rank] > 0)
    assert_critical(critical.evals, critical.tail_size, 2.0)
    assert critical.tail_size in literal_band(64, 2.0, rank)


@pytest.mark.parametrize(
    ("evals", "alpha", "rank"),
    [
        (pareto(4, 2.5)[::-1], 2.0, None),
        (pareto(64, 2.5)[::-1], 1.2, None),
        (pareto(40, 2.5)[::-1], 20.0, None),
        (pareto(64, 2.5)[::-1], 2.0, 28),
        (np.zeros(64), 2.0, None),
    ],
    ids=["few", "flat template", "steep template", "low rank", "zero"],
)
def test_no_critical_spectrum_without_room(evals, alpha, rank):
    assert critical_spectrum(evals, alpha, rank) is None


def test_zeros_are_a_lack_of_rank():
    evals = np.append(pareto(50, 2.5)[::-1], np.zeros(14))
    critical, given = critical_spectrum(evals), critical_spectrum(evals, 2.0, 50)
    np.testing.assert_array_equal(critical.evals, given.evals)
    np.testing.assert_array_equal(critical.evals > 0, evals > 0)
    assert_critical(critical.evals, critical.tail_size, 2.0)
    assert critical_spectrum(np.append(np.ones(20), np.zeros(20))) is None


@pytest.mark.parametrize("alpha", [1.0, 0.5, -2.0, 0.0, math.nan, math.inf])
def test_alpha_must_be_above_one(alpha):
    with pytest.raises(ValueError, match="alpha must be a finite number above 1"):
        critical_spectrum(pareto(64, 2.5)[::-1], alpha)


def test_inputs_are_left_alone_and_answers_stay_the_same():
    evals = SPECTRA["heavy"].copy()
    first = critical_spectrum(evals)
    first_evals = first.evals.copy()
    first.evals[:] = 0  # what a caller does with the answer must not reach the cached templates
    np.testing.assert_array_equal(evals, SPECTRA["heavy"])
    np.testing.assert_array_equal(critical_spectrum(evals).evals, first_evals)


def test_the_band_does_not_hand_out_the_cache():
    band = feasible_tail_sizes(64)
    band[:] = 0
    np.testing.assert_array_equal(feasible_tail_sizes(64), np.arange(29.0, 36.0))


class TestPartialStep:
    evals = SPECTRA["heavy"]
    target = critical_spectrum(SPECTRA["heavy"]).evals

    def test_the_ends(self):
        start = partial_step(self.evals, self.target, 0.0)
        end = partial_step(self.evals, self.target, 1.0)
        np.testing.assert_array_equal(start, self.evals)
        np.testing.assert_array_equal(end, self.target)
        assert start is not self.evals
        assert end is not self.target

    @pytest.mark.parametrize("strength", [0.01, 0.25, 0.5, 0.99])
    def test_it_moves_the_logarithm_of_sigma_and_keeps_the_norm(self, strength):
        moved = partial_step(self.evals, self.target, strength)
        sigma, goal = np.sqrt(self.evals), np.sqrt(self.target)
        literal = np.exp((1 - strength) * np.log(sigma) + strength * np.log(goal))
        literal *= math.sqrt(self.evals.sum() / (literal**2).sum())
        np.testing.assert_allclose(np.sqrt(moved), literal, rtol=1e-12)
        assert moved.sum() == pytest.approx(self.evals.sum(), rel=1e-12)

    def test_a_longer_step_ends_nearer(self):
        left = [
            distance(partial_step(self.evals, self.target, s), self.target)
            for s in np.linspace(0, 1, 21)
        ]
        assert np.all(np.diff(left) < 0)
        assert left[-1] == 0

    def test_two_half_steps_are_one_three_quarter_step(self):
        half = partial_step(self.evals, self.target, 0.5)
        np.testing.assert_allclose(
            partial_step(half, self.target, 0.5),
            partial_step(self.evals, self.target, 0.75),
            rtol=1e-12,
        )

    def test_zero_stays_zero(self):
        evals = np.append(self.evals, 0.0)
        moved = partial_step(evals, np.append(self.target, 0.0), 0.3)
        assert moved[-1] == 0
        assert np.all(moved[:-1] > 0)
