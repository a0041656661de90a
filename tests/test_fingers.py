import logging
import math
import warnings

import numpy as np
import pytest

from ww_train.fingers import ClipXmax, XminPeak
from ww_train.power_law import PowerLaw, PowerLawFit, fit_power_law

from .oracles import evals_by_svd, gaussian, heavy, pareto, power_law_scan
from .peer import contained, import_peer

SPECTRA = {
    "pareto": pareto(300, 2.5),
    "gaussian matrix": evals_by_svd(gaussian(200, 100)),
    "heavy matrix": evals_by_svd(heavy(200, 100)),
    "lognormal": np.sort(np.exp(2 * np.random.default_rng(1).standard_normal(200))),
}

KINGS = np.append(pareto(100, 3.0, seed=3), [300.0, 310.0, 320.0])
"""A power law of exponent 3 and three eigenvalues that do not belong to it."""


def fields(fit):
    return fit.alpha, fit.D, fit.sigma, fit.xmin, fit.xmax, fit.num_pl_spikes


# PowerLaw: dropped eigenvalues, fixed and restricted xmin


@pytest.mark.parametrize("name", SPECTRA)
def test_the_default_is_fit_power_law(name):
    assert PowerLaw()(SPECTRA[name]) == fit_power_law(SPECTRA[name])
    assert fit_power_law(SPECTRA[name]).Lambda is None
    assert fit_power_law(SPECTRA[name]).num_fingers is None
    assert fit_power_law(SPECTRA[name]).raw_alpha is None


@pytest.mark.parametrize("k", [0, 1, 7, 50])
def test_dropping_the_top_fits_the_rest(k):
    evals = SPECTRA["heavy matrix"]
    assert PowerLaw(drop_top=k)(evals) == fit_power_law(evals[: len(evals) - k])


def test_more_than_half_dropped_is_no_fit():
    evals = pareto(40, 2.5)
    assert PowerLaw(drop_top=20)(evals) is not None
    assert PowerLaw(drop_top=21)(evals) is None
    assert PowerLaw(drop_top=41)(evals) is None


@pytest.mark.parametrize("evals", [pareto(300, 2.5), pareto(15, 2.5)], ids=["large", "small"])
def test_fixing_xmin_where_the_search_found_it_is_the_same_fit(evals):
    found = fit_power_law(evals)
    assert fields(PowerLaw(xmin=found.xmin)(evals)) == pytest.approx(fields(found), rel=1e-12)


@pytest.mark.parametrize("xmin", [0.5, 1.5, 7.1])
def test_a_fixed_xmin_is_taken_literally(xmin):
    evals = pareto(200, 2.2)
    fit = PowerLaw(xmin=xmin)(evals)
    tail = [x / xmin for x in evals if x >= xmin]
    n = len(tail)
    alpha = 1 + n / math.fsum(math.log(x) for x in tail)
    distance = max(abs(1 - x ** (1 - alpha) - j / n) for j, x in enumerate(tail))
    assert (fit.xmin, fit.xmax, fit.num_pl_spikes) == (xmin, evals[-1], n)
    assert fit.alpha == pytest.approx(alpha, rel=1e-12)
    assert pytest.approx(distance, rel=1e-12) == fit.D
    assert fit.sigma == pytest.approx((alpha - 1) / math.sqrt(n), rel=1e-12)


def test_a_fixed_xmin_includes_the_eigenvalue_at_it():
    evals = np.arange(1.0, 41.0)
    assert PowerLaw(xmin=21.0)(evals).num_pl_spikes == 20
    assert PowerLaw(xmin=21.0 + 1e-12)(evals).num_pl_spikes == 19


def test_alpha_above_the_true_xmin_is_unbiased():
    fits = [PowerLaw(xmin=1.0)(pareto(400, 2.5, seed)) for seed in range(100)]
    errors = [(fit.alpha - 2.5) / fit.sigma for fit in fits]
    assert abs(np.mean(errors)) < 0.3
    assert 0.8 < np.std(errors) < 1.2


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("quantiles", [(0.2, 0.5), (0.5, 0.9), (0.0, 1.0), (0.3, 0.31)])
def test_a_range_of_xmin_is_searched_completely(name, quantiles):
    evals = SPECTRA[name]
    low, high = (float(x) for x in np.quantile(evals, quantiles))
    fit = PowerLaw(xmin=(low, high))(evals)
    tails = [PowerLaw(xmin=float(x))(evals) for x in evals[:-1] if low <= x <= high]
    best = min(tails, key=lambda tail: tail.D)
    assert fields(fit) == pytest.approx(fields(best), rel=1e-9)


def test_a_range_with_everything_is_the_search():
    evals = SPECTRA["heavy matrix"]
    assert PowerLaw(xmin=(0.0, math.inf))(evals) == fit_power_law(evals)


def test_a_range_without_an_eigenvalue_is_no_fit():
    assert PowerLaw(xmin=(1.4, 1.6))(np.arange(1.0, 41.0)) is None


@pytest.mark.parametrize("xmin", [40.0, 41.0, 1e300])
def test_a_tail_of_less_than_two_is_no_fit(xmin):
    assert PowerLaw(xmin=xmin)(np.arange(1.0, 41.0)) is None


@pytest.mark.parametrize(
    "options",
    [
        {"drop_top": -1},
        {"xmin": 0.0},
        {"xmin": -1.0},
        {"xmin": math.nan},
        {"xmin": math.inf},
        {"xmin": (2.0, 1.0)},
        {"xmin": (-1.0, 1.0)},
        {"xmin": (math.nan, 1.0)},
    ],
)
def test_senseless_options_are_refused(options):
    with pytest.raises(ValueError, match=r"drop_top|xmin"):
        PowerLaw(**options)


# Bad input, and laws of every algorithm

ALGORITHMS = [
    PowerLaw(drop_top=2),
    PowerLaw(xmin=1e-3),
    PowerLaw(xmin=(1e-3, 1e3)),
    ClipXmax(),
    XminPeak(),
]


@pytest.mark.parametrize("fit", ALGORITHMS, ids=repr)
@pytest.mark.parametrize("n", [0, 1, 7])
def test_few_eigenvalues_have_no_fit(fit, n):
    assert fit(pareto(n, 2.5)) is None


@pytest.mark.parametrize("fit", ALGORITHMS, ids=repr)
@pytest.mark.parametrize("n", [8, 19, 20, 200])
@pytest.mark.parametrize("value", [0.1, 1.0, math.pi])
def test_equal_eigenvalues_have_no_fit(fit, n, value):
    assert fit(np.full(n, value)) is None


@pytest.mark.parametrize("fit", ALGORITHMS, ids=repr)
def test_one_distinct_eigenvalue_breaks_nothing(fit):
    for evals in (np.append(np.ones(50), 2.0), np.append(0.5, np.ones(50))):
        found = fit(evals)
        assert found is None or (found.alpha > 1 and 0 <= found.D <= 1)


@pytest.mark.parametrize("fit", [PowerLaw(drop_top=3), ClipXmax(), XminPeak()], ids=repr)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_scale_invariance(fit, name, factor):
    found, scaled = fit(SPECTRA[name]), fit(SPECTRA[name] * factor)
    assert (scaled.alpha, scaled.D, scaled.sigma) == (found.alpha, found.D, found.sigma)
    assert (scaled.num_pl_spikes, scaled.num_fingers) == (found.num_pl_spikes, found.num_fingers)
    assert (scaled.xmin, scaled.xmax) == (found.xmin * factor, found.xmax * factor)


@pytest.mark.parametrize("fit", ALGORITHMS, ids=repr)
def test_the_input_is_left_alone(fit):
    evals = SPECTRA["heavy matrix"].copy()
    assert fit(evals) == fit(evals)
    np.testing.assert_array_equal(evals, SPECTRA["heavy matrix"])


# ClipXmax


def clipped(evals, max_fingers, thresh):
    """Removals and exponents, literally."""
    raw = power_law_scan(evals)[2]
    for k in range(1, max_fingers + 1):
        alpha = power_law_scan(evals[: len(evals) - k])[2]
        if alpha + thresh < raw:
            return k, alpha, raw
    return 0, raw, raw


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("thresh", [0.05, 1.0])
def test_the_first_removal_that_lowers_alpha_enough_is_taken(seed, thresh):
    evals = evals_by_svd(gaussian(80, 50, seed))
    fit = ClipXmax(max_fingers=6, finger_thresh=thresh)(evals)
    k, alpha, raw = clipped(evals, 6, thresh)
    assert fit.num_fingers == k
    assert (fit.alpha, fit.raw_alpha) == pytest.approx((alpha, raw), rel=1e-9)
    assert fit.xmax == evals[len(evals) - 1 - k]
    assert fit.num_pl_spikes == np.count_nonzero(evals >= fit.xmin) - k


def test_both_outcomes_are_among_the_tests_above():
    spectra = [evals_by_svd(gaussian(80, 50, seed)) for seed in range(8)]
    found = {clipped(evals, 6, thresh)[0] for evals in spectra for thresh in (0.05, 1.0)}
    assert {0, 1} < found


def test_without_fingers_the_fit_is_the_power_law():
    raw = fit_power_law(SPECTRA["pareto"])
    fit = ClipXmax()(SPECTRA["pareto"])
    assert fit == PowerLawFit(*fields_in_order(raw), num_fingers=0, raw_alpha=raw.alpha)


def fields_in_order(fit):
    return fit.alpha, fit.xmin, fit.xmax, fit.D, fit.sigma, fit.num_pl_spikes


def test_no_more_than_max_fingers_are_removed():
    evals = np.append(pareto(60, 3.0, seed=3), np.geomspace(1e5, 1.1e5, 6))
    needed = ClipXmax(finger_thresh=0.01)(evals).num_fingers
    assert needed > 1
    assert ClipXmax(max_fingers=needed, finger_thresh=0.01)(evals).num_fingers == needed
    assert ClipXmax(max_fingers=needed - 1, finger_thresh=0.01)(evals).num_fingers == 0
    assert ClipXmax(max_fingers=0)(evals).num_fingers == 0


def test_the_change_to_the_small_sample_rule_is_no_finger():
    evals = pareto(22, 2.5, seed=153)
    raw, two, three = (fit_power_law(evals[: 22 - k]).alpha for k in (0, 2, 3))
    assert two > raw > three + 1  # with 19 left tails of less than 8 are out
    assert ClipXmax()(evals).num_fingers == 0


def test_eigenvalues_far_above_a_power_law_are_no_fingers_in_this_sense():
    # removing them raises alpha: its mean of logarithms loses the largest
    clean = fit_power_law(KINGS[:-3])
    assert clean.alpha > fit_power_law(KINGS).alpha + 1
    assert ClipXmax()(KINGS).num_fingers == 0
    assert PowerLaw(drop_top=3)(KINGS) == clean


@pytest.mark.parametrize("options", [{"max_fingers": -1}, {"finger_thresh": -0.1}])
def test_negative_settings_are_refused(options):
    with pytest.raises(ValueError, match="negative"):
        ClipXmax(**options)


def test_a_threshold_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="finger_thresh"):
        ClipXmax(finger_thresh=math.nan)


# XminPeak


def peak_of(evals):
    logs = [math.log10(x) for x in evals]
    width = (max(logs) - min(logs)) / 100
    counts = [0] * 100
    for x in logs:
        counts[min(99, int((x - min(logs)) / width))] += 1
    return 10 ** (min(logs) + width * counts.index(max(counts)))


@pytest.mark.parametrize("name", SPECTRA)
def test_xmin_is_the_best_around_the_peak(name):
    evals = SPECTRA[name]
    peak = peak_of(evals)
    low, high = 0.95 * peak, 1.5 * peak
    tails = [PowerLaw(xmin=float(x))(evals) for x in evals[:-1] if low <= x <= high]
    assert len(tails) > 1
    best = min(tails, key=lambda tail: tail.D)
    assert fields(XminPeak()(evals)) == pytest.approx(fields(best), rel=1e-9)


def test_xmin_may_lie_a_little_below_the_peak():
    below = 0
    for seed in range(30):
        evals = np.sort(np.exp(0.5 * np.random.default_rng(seed).standard_normal(150)))
        peak = peak_of(evals)
        tails = [PowerLaw(xmin=float(x))(evals) for x in evals if 0.95 * peak <= x <= 1.5 * peak]
        best = min(tails, key=lambda tail: tail.D)
        assert fields(XminPeak()(evals)) == pytest.approx(fields(best), rel=1e-9)
        below += best.xmin < 0.999 * peak
    assert below > 0


def test_the_upper_limit_may_be_given():
    evals = SPECTRA["lognormal"]
    peak = peak_of(evals)
    limit = 1.02 * peak
    tails = [PowerLaw(xmin=float(x))(evals) for x in evals if 0.95 * peak <= x <= limit]
    fit = XminPeak(xmin_max=limit)(evals)
    assert fit.xmin <= limit
    assert fit.alpha == pytest.approx(min(tails, key=lambda tail: tail.D).alpha, rel=1e-9)
    assert XminPeak(xmin_max=math.inf)(evals).D <= XminPeak()(evals).D


def test_an_upper_limit_below_the_peak_is_no_fit():
    evals = SPECTRA["lognormal"]
    assert XminPeak(xmin_max=0.9 * peak_of(evals))(evals) is None


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_an_upper_limit_that_is_not_positive_is_refused(limit):
    with pytest.raises(ValueError, match="xmin_max"):
        XminPeak(xmin_max=limit)


# Live against weightwatcher 0.7.7


@pytest.fixture(scope="module")
def peer():
    """The peer's clipped fit of eigenvalues: alpha, removed, raw alpha."""
    import_peer()
    from weightwatcher import RMT_Util

    def clip(evals):
        with contained():
            fit, num_fingers, raw = RMT_Util.fit_clipped_powerlaw(evals, max_fingers=10)
        return fit.alpha, num_fingers + 1 if num_fingers else 0, raw.alpha  # A23

    return clip


def test_clipping_agrees_with_the_peer_where_it_finds_the_same_removal(peer):
    same = []
    for seed in range(10):
        for evals in (
            evals_by_svd(gaussian(128, 64, seed)),
            evals_by_svd(heavy(128, 64, seed)),
            np.append(pareto(100, 3.0, seed), [300.0, 310.0, 320.0]),
        ):
            alpha, removed, raw = peer(evals)
            fit = ClipXmax(max_fingers=9)(evals)
            assert fit.raw_alpha == pytest.approx(raw, abs=1e-6)
            if fit.num_fingers == removed:
                assert fit.alpha == pytest.approx(alpha, abs=1e-6)
                same.append(removed)
            else:
                assert fit.num_fingers == 1  # the one removal that the peer never tries
    assert len(same) >= 25
    assert len(set(same)) >= 4


def test_the_peer_leaves_no_trace(peer):
    filters, level = list(warnings.filters), logging.getLogger().level
    peer(KINGS)
    assert list(warnings.filters) == filters
    assert logging.getLogger().level == level
