import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ww_train.erg import erg_tail
from ww_train.power_law import fit_power_law
from ww_train.spectrum import Spectrum

from .oracles import detx_num, evals_by_svd, gaussian, heavy, pareto, quick

SPECTRA = {
    "pareto": pareto(300, 2.5),
    "pareto that overflows a plain product": pareto(6000, 2.5),
    "pareto that underflows a plain product": pareto(3000, 2.5) * 1e-200,
    "gaussian": evals_by_svd(gaussian(300, 200)),
    "square gaussian": evals_by_svd(gaussian(150, 150)),
    "heavy": evals_by_svd(heavy(256, 128)),
    "half zero": np.concatenate([np.zeros(50), pareto(50, 2.5)]),
    "two values": np.array([1.0, 1.0, 1.0, 100.0]),
}


def spectrum(evals):
    return Spectrum(evals, len(evals), len(evals))


@pytest.mark.parametrize("name", SPECTRA)
def test_detx_num_is_that_of_the_exact_product(name):
    evals = SPECTRA[name]
    tail = erg_tail(spectrum(evals))
    assert tail.detX_num == detx_num(evals)
    assert tail.detX_val == evals[-tail.detX_num]
    assert tail.ERG_gap is None
    assert tail.trace_log is None


@quick
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40).filter(lambda x: len(set(x)) > 1))
def test_any_spectrum_matches_the_exact_product(values):
    evals = np.sort(np.array(values, dtype=float))
    assert erg_tail(spectrum(evals)).detX_num == detx_num(evals)


@pytest.mark.parametrize("name", ["pareto", "gaussian", "heavy"])
def test_trace_log_and_gap_are_those_of_the_power_law_tail(name):
    evals = SPECTRA[name]
    fit = fit_power_law(evals)
    tail = erg_tail(spectrum(evals), fit)
    logs = [math.log(x / evals.mean()) for x in evals if x >= fit.xmin]
    assert tail.trace_log == pytest.approx(math.fsum(logs), rel=1e-10)
    assert tail.ERG_gap == detx_num(evals) - fit.num_pl_spikes


def test_trace_log_is_zero_between_the_last_product_above_one_and_detx():
    evals = SPECTRA["heavy"]
    num = erg_tail(spectrum(evals)).detX_num
    logs = np.log(evals[::-1] / evals.mean())
    assert logs[: num - 1].sum() >= 0 > logs[:num].sum()


@pytest.mark.parametrize("factor", [1e-30, 1e-15, 1e15, 1e30])
def test_scale_invariance(factor):
    evals = SPECTRA["heavy"]
    tail = erg_tail(spectrum(evals), fit_power_law(evals))
    scaled = erg_tail(spectrum(evals * factor), fit_power_law(evals * factor))
    assert (scaled.detX_num, scaled.ERG_gap) == (tail.detX_num, tail.ERG_gap)
    assert scaled.trace_log == pytest.approx(tail.trace_log, rel=1e-9)
    assert scaled.detX_val == pytest.approx(tail.detX_val * factor, rel=1e-12)


@pytest.mark.parametrize("n", [1, 8, 20, 300])
@pytest.mark.parametrize("value", [1e-30, 0.1, 1.0, math.pi, 1e30])  # the mean of 0.1 is not 0.1
def test_a_flat_spectrum_has_no_erg_tail(n, value):
    tail = erg_tail(spectrum(np.full(n, value)))
    assert (tail.detX_num, tail.detX_val) == (None, None)
