import math

import numpy as np
import pytest

from ww_train.editing.rules import AboveBulk, Bottom, DetXTail, PowerLawTail, Top, kept_by
from ww_train.erg import erg_tail
from ww_train.marchenko_pastur import EnergyMP, fit_mp
from ww_train.power_law import PowerLaw, fit_power_law
from ww_train.spectrum import Spectrum

from .oracles import detx_num, evals_by_svd, gaussian, heavy


def spectrum(weights):
    rows, cols = weights.shape
    return Spectrum(evals_by_svd(weights), max(rows, cols), min(rows, cols))


HEAVY = spectrum(heavy(80, 60))


def number(rule, of=HEAVY):
    """How many the rule keeps, all of them the largest."""
    kept = kept_by(rule, of)
    count = int(kept.sum())
    assert kept[len(kept) - count :].all()
    return count


def test_each_tail_is_that_of_its_definition():
    assert number(DetXTail()) == detx_num(HEAVY.evals) == erg_tail(HEAVY).detX_num
    assert number(PowerLawTail()) == fit_power_law(HEAVY.positive).num_pl_spikes
    assert number(PowerLawTail(PowerLaw(drop_top=2))) == (
        PowerLaw(drop_top=2)(HEAVY.positive).num_pl_spikes + 2
    )
    assert number(AboveBulk()) == fit_mp(HEAVY).num_spikes > 2
    assert number(AboveBulk(EnergyMP(0.5))) == EnergyMP(0.5)(HEAVY).num_spikes


@pytest.mark.parametrize("share", [0.02, 0.2, 0.29, 0.8, 0.99])
@pytest.mark.parametrize("n", [60, 100])
def test_shares_are_of_all_singular_values(share, n):
    flat = Spectrum(np.arange(1.0, n + 1.0), n, n)
    exact = math.floor(round(100 * share) * n / 100)
    assert number(Top(share), flat) == exact
    kept = kept_by(Bottom(1.0 - share), flat)
    assert int((~kept).sum()) == exact
    assert not kept[n - exact :].any()


@pytest.mark.parametrize("rule", [DetXTail(), PowerLawTail(), AboveBulk(), Top(0.3), Bottom(0.7)])
def test_rules_do_not_depend_on_the_scale(rule):
    scaled = Spectrum(1e-9 * HEAVY.evals, HEAVY.N, HEAVY.M)
    assert (kept_by(rule, scaled) == kept_by(rule, HEAVY)).all()


@pytest.mark.parametrize(
    ("rule", "of", "reason"),
    [
        (DetXTail(), Spectrum(np.ones(30), 30, 30), "all eigenvalues are equal"),
        (PowerLawTail(), Spectrum(np.ones(30), 30, 30), "no power law"),
        (AboveBulk(), spectrum(gaussian(80, 60)), "keeps none"),
        (Top(0.01), HEAVY, "keeps none"),
    ],
)
def test_a_rule_without_an_answer_says_so(rule, of, reason):
    with pytest.raises(ValueError, match=reason):
        kept_by(rule, of)


@pytest.mark.parametrize("rule", [Top, Bottom])
@pytest.mark.parametrize("share", [0.0, 1.0, -0.2, 20, math.nan])
def test_a_share_is_a_fraction(rule, share):
    with pytest.raises(ValueError, match="a fraction between 0 and 1"):
        rule(share)


@pytest.mark.parametrize("answer", [12, np.ones(3, dtype=bool), np.ones(60)])
def test_a_rule_of_ones_own_must_give_flags(answer):
    with pytest.raises(TypeError, match="one flag an eigenvalue, 60 here"):
        kept_by(lambda spectrum: answer, HEAVY)
    assert number(lambda s: s.evals > s.evals.mean()) > 0
