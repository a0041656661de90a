import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ww_train import LayerReport, Report, measure
from ww_train.power_law import PowerLawFit, fit_power_law
from ww_train.trap_causes import TrapCause
from ww_train.verdicts import (
    WORST_FIRST,
    layer_advice,
    layer_verdict,
    malformed_from,
    model_verdict,
)

from .oracles import dense, gaussian, pareto


def fit(alpha, D=0.05, size=100):
    return PowerLawFit(alpha, 1.0, 9.0, D, 0.1, size)


@pytest.mark.parametrize(
    ("alpha", "word"),
    [
        (1.2, "over-trained"),
        (1.89, "over-trained"),
        (1.91, "critical"),
        (2.0, "critical"),
        (2.09, "critical"),
        (2.11, "well-trained"),
        (6.0, "well-trained"),
        (6.01, "under-trained"),
        (40.0, "under-trained"),
    ],
)
def test_the_bounds_of_alpha(alpha, word):
    assert layer_verdict(fit(alpha)) == word
    assert layer_verdict(fit(alpha), 0) == word
    assert layer_verdict(fit(alpha), 3) == "trapped"


@pytest.mark.parametrize("bad", [None, fit(3.0, D=0.11), fit(3.0, D=0.21, size=8)])
def test_malformed_is_a_tail_that_is_none_and_traps_come_before_it(bad):
    assert layer_verdict(bad) == "malformed"
    assert layer_verdict(bad, 1) == "trapped"


def test_every_verdict_has_a_place_in_the_order():
    fits = [None, *(fit(alpha) for alpha in (1.0, 2.0, 3.0, 7.0))]
    words = {
        layer_verdict(f, traps, random_like=random)
        for f, traps, random in itertools.product(fits, (None, 0, 2), (False, True))
    }
    assert words == set(WORST_FIRST)


@pytest.mark.parametrize("tail", [None, fit(1.5), fit(2.0), fit(4.0), fit(9.0), fit(3.0, D=0.5)])
def test_of_a_random_spectrum_the_tail_says_nothing(tail):
    assert layer_verdict(tail, random_like=True) == "random-like"
    assert layer_verdict(tail, 0, random_like=True) == "random-like"
    assert layer_verdict(tail, 1, random_like=True) == "trapped"


@pytest.mark.parametrize(
    ("size", "distance"), [(0, 0.2), (8, 0.2), (18, 0.2), (31, 0.1559), (76, 0.1), (4000, 0.1)]
)
def test_a_long_tail_must_fit_better_than_a_short_one(size, distance):
    assert malformed_from(size) == pytest.approx(distance, abs=1e-4)
    assert layer_verdict(fit(3.0, D=distance - 1e-3, size=size)) == "well-trained"
    assert layer_verdict(fit(3.0, D=distance + 1e-3, size=size)) == "malformed"


@pytest.mark.parametrize("size", [32, 128, 512])
def test_a_sample_of_a_power_law_is_hardly_ever_malformed(size):
    tails = [fit_power_law(pareto(size, 2.5, seed)) for seed in range(100)]
    assert sum(layer_verdict(tail) == "malformed" for tail in tails) <= 3


CAUSES = [
    TrapCause("entry", 0, row, 4, 2.5, 9.0, 80.0)
    for row in range(5)
]  # fmt: skip
MEAN = TrapCause("mean", 0, None, None, 0.003, 9.0, 80.0)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((fit(1.5),), ["layer fc1: alpha 1.50", "lower its learning rate", "weight decay"]),
        ((fit(2.0),), ["alpha 2.00 is critical", "leave it"]),
        ((fit(4.0),), ["between 2 and 6", "fine"]),
        ((fit(9.0),), ["above 6", "train it longer"]),
        ((None,), ["no power law"]),
        ((fit(3.0, D=0.4),), ["D 0.40", "alpha 3.00 says nothing"]),
        ((fit(3.0), 1, CAUSES[:1]), ["1 correlation trap (entry (0, 4) = 2.5)", "clip gradients"]),
        ((fit(3.0), 5, CAUSES), ["5 correlation traps", "entry (2, 4) = 2.5 and 2 more"]),
        ((fit(3.0), 1, [MEAN]), ["1 correlation trap (mean = 0.003)", "lean to one side"]),
        ((fit(3.0), 2, [MEAN, *CAUSES]), ["mean = 0.003", "clip gradients"]),
        ((fit(3.0), 2), ["2 correlation traps that no single weight makes"]),
        ((fit(1.5), 1, CAUSES[:1]), ["correlation trap", "alpha 1.50 is below 2"]),
    ],
)
def test_advice_names_the_layer_and_what_to_do(arguments, parts):
    advice = layer_advice("fc1", *arguments)
    assert advice.startswith("layer fc1: ")
    assert "\n" not in advice
    assert [part for part in parts if part not in advice] == []


@pytest.mark.parametrize(
    ("tail", "traps", "parts"),
    [
        (
            fit(4.0),
            None,
            ["cannot be told from a random", "untrained, or", "alpha 4.00 says nothing"],
        ),
        (None, 0, ["random matrix", "if it was trained, see whether gradients"]),
        (fit(1.5), 1, ["1 correlation trap", "random-like"]),
    ],
)
def test_advice_on_a_random_spectrum(tail, traps, parts):
    advice = layer_advice("fc1", tail, traps, random_like=True)
    assert [part for part in ["layer fc1: ", *parts] if part not in advice] == []
    assert ("alpha" in advice) == (tail is not None)


def test_advice_on_traps_is_silent_on_a_tail_that_needs_nothing():
    assert "alpha" not in layer_advice("fc1", fit(3.0), 1, CAUSES)
    assert "alpha" not in layer_advice("fc1", None, 1, CAUSES)


@pytest.mark.parametrize(
    ("verdicts", "line"),
    [
        ([], "no layer was measured"),
        (["critical"], "critical (1 layer)"),
        (["critical"] * 3, "critical (3 layers)"),
        (["critical", "trapped", "critical"], "mostly critical (2 of 3 layers); 1 trapped"),
        (["random-like", "malformed"] * 2, "2 of 4 layers random-like; 2 malformed"),
        (
            ["well-trained"] * 3 + ["under-trained", "trapped", "over-trained"],
            "3 of 6 layers well-trained; 1 trapped, 1 over-trained, 1 under-trained",
        ),
    ],
)
def test_the_verdict_of_a_model(verdicts, line):
    assert model_verdict(verdicts) == line


def test_of_equally_common_verdicts_the_worst_leads():
    assert model_verdict(["critical", "trapped"]) == "1 of 2 layers trapped; 1 critical"


def test_a_report_tells_both():
    weight = gaussian(80, 60)
    weight[3, 4] = 30.0
    report = measure(nn.ModuleDict({"a": dense(weight)}), randomize=True)
    assert report["a"].num_traps
    assert report["a"].verdict == "trapped"
    assert "(3, 4) = 30" in report["a"].advice
    assert report.verdict == "trapped (1 layer)"
    assert Report((), ()).verdict == "no layer was measured"


def test_without_shuffles_nothing_is_trapped():
    weight = gaussian(80, 60)
    weight[3, 4] = 30.0
    assert measure(weight)["W"].verdict != "trapped"


def test_weightwatcher_s_warning_is_its_own():
    quantiles = (1 - (np.arange(200) + 0.5) / 200) ** (-1 / 0.5)
    layer = measure(torch.diag(torch.tensor(np.sqrt(quantiles))))["W"]
    assert isinstance(layer, LayerReport)
    assert (layer.verdict, layer.warning) == ("over-trained", "over-trained")
    assert replace(layer, fit=fit(1.95)).verdict == "critical"
    assert replace(layer, fit=fit(1.95)).warning == "over-trained"
