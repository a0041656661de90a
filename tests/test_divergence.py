import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from ww_train.divergence import jensen_shannon_distance

from .oracles import evals_by_svd, gaussian, pareto, quick

FARTHEST = math.sqrt(math.log(2))

with_ties = st.lists(st.integers(0, 30), min_size=1, max_size=60).map(np.array)
spectra = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60).map(np.array)


def histograms(x, y):
    """Counts on bins of equal mass of the mixture, straight from the definition, exactly."""
    bins = 2
    while (bins // 2) ** 3 < min(len(x), len(y)):
        bins += 2

    def mass_up_to(z):
        shares = (Fraction(int(np.count_nonzero(v <= z)), len(v)) for v in (x, y))
        return sum(shares) / 2

    pooled = sorted({*x.tolist(), *y.tolist()})
    mass = {z: mass_up_to(z) for z in pooled}
    edges = [next(z for z in pooled if mass[z] >= Fraction(k, bins)) for k in range(1, bins)]
    counts = np.zeros((2, bins))
    for row, spectrum in enumerate((x, y)):
        for z in spectrum:
            counts[row, sum(edge < z for edge in edges)] += 1
    return counts


def oracle(x, y):
    p, q = (counts / counts.sum() for counts in histograms(x, y))
    total = 0.0
    for a, b in zip(p, q, strict=True):
        for u in (a, b):
            total += 0.5 * u * math.log(u / ((a + b) / 2)) if u > 0 else 0.0
    return math.sqrt(max(total, 0.0))


@pytest.mark.parametrize("lengths", [(1, 1), (7, 7), (8, 8), (9, 9), (64, 100), (200, 31)])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_the_definition_and_scipy(lengths, seed):
    n, m = lengths
    x, y = pareto(n, 2.5, seed), 1.3 * pareto(m, 3.0, seed + 10)
    distance = jensen_shannon_distance(x, y)
    assert distance == pytest.approx(oracle(x, y), abs=1e-7)
    assert distance == pytest.approx(jensenshannon(*histograms(x, y)), abs=1e-7)


@quick
@given(with_ties, with_ties)
def test_ties_against_the_definition(x, y):
    assert jensen_shannon_distance(x, y) == pytest.approx(oracle(x, y), abs=1e-7)


@quick
@given(spectra, spectra)
def test_is_symmetric_and_bounded(x, y):
    distance = jensen_shannon_distance(x, y)
    assert distance == jensen_shannon_distance(y, x)
    assert 0.0 <= distance <= FARTHEST


@quick
@given(spectra, st.integers(1, 4), st.randoms(use_true_random=False))
def test_is_zero_for_the_same_distribution(x, copies, random):
    shuffled = np.array(random.sample(x.tolist(), len(x)))
    assert jensen_shannon_distance(x, shuffled) == 0.0
    assert jensen_shannon_distance(x, np.repeat(x, copies)) == 0.0


@quick
@given(spectra, spectra)
def test_is_farthest_if_one_lies_above_the_other(x, y):
    above = y + x.max() + 1
    assert jensen_shannon_distance(x, above) == pytest.approx(FARTHEST, rel=1e-12)


@quick
@given(spectra, spectra, st.integers(-40, 40))
def test_does_not_change_under_a_common_scaling(x, y, exponent):
    factor = 2.0**exponent
    assert jensen_shannon_distance(factor * x, factor * y) == jensen_shannon_distance(x, y)


def test_does_not_change_under_a_common_logarithm():
    x, y = pareto(300, 2.5), pareto(200, 3.5, seed=1)
    assert jensen_shannon_distance(np.log(x), np.log(y)) == jensen_shannon_distance(x, y)


def test_grows_with_the_difference():
    x = pareto(500, 3.0)
    distances = [jensen_shannon_distance(x, factor * x) for factor in (1.0, 1.1, 1.5, 3.0, 10.0)]
    assert distances == sorted(distances)
    assert distances[0] == 0.0
    assert distances[-1] > 0.5


def test_where_the_peer_sees_nothing():
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 0.01, 500), rng.normal(5, 0.05, 500)
    assert jensen_shannon_distance(x, y) == pytest.approx(FARTHEST)  # WeightWatcher: 0.0005
    assert jensen_shannon_distance(x, 1000 * x) == pytest.approx(FARTHEST)  # WeightWatcher: nan


def test_two_random_matrices_are_closer_than_a_random_and_a_trained_one():
    noise = [evals_by_svd(gaussian(256, 128, seed)) for seed in (0, 1)]
    signal = 30.0 * gaussian(256, 4, 2) @ gaussian(4, 128, 3) / math.sqrt(256 * 128)
    trained = evals_by_svd(gaussian(256, 128, 4) + 3.0 * signal)
    alike = jensen_shannon_distance(*noise)
    assert alike < 0.1
    assert jensen_shannon_distance(noise[0], trained) > alike


def test_the_inputs_are_left_alone():
    x, y = np.array([3.0, 1.0, 2.0]), np.array([5.0, 4.0])
    jensen_shannon_distance(x, y)
    assert x.tolist() == [3.0, 1.0, 2.0]
    assert y.tolist() == [5.0, 4.0]


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf], [[1.0, 2.0]]])
def test_refuses_what_is_no_spectrum(bad):
    for pair in ((bad, [1.0]), ([1.0], bad)):
        with pytest.raises(ValueError, match="finite eigenvalues"):
            jensen_shannon_distance(*map(np.array, pair))
