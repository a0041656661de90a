"""Which layers `WWPGD` projects, and with which projection."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from ww_train import WWPGD, ManifoldProjection, Projected, Skipped, measure
from ww_train.power_law import fit_power_law
from ww_train.steering.tasks import Failed

from .oracles import evals_by_svd
from .training import SIZE, adamw, collect, weights


def deep():
    """Five layers: `enc.0`, `enc.1`, `attn` with q, k, v and its output, `head`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleDict(
            {
                "enc": nn.ModuleList([nn.Linear(SIZE, 32), nn.Linear(32, SIZE)]),
                "attn": nn.MultiheadAttention(SIZE, 2),
                "head": nn.Linear(SIZE, 40),
            }
        )


ALL = [
    "enc.0",
    "enc.1",
    *[f"attn.in_proj_weight.{part}" for part in "qkv"],
    "attn.out_proj",
    "head",
]


def projected(results):
    return [result.name for result in results if isinstance(result, Projected)]


def run(model=None, **settings):
    model = deep() if model is None else model
    return WWPGD(adamw(model), model=model, strength=1.0, strict=True, **settings).end_epoch()


CHOICES = {
    "name": ("enc.1", ALL[1:2]),
    "part": ("attn.in_proj_weight.k", ALL[3:4]),
    "glob": ("enc.*", ALL[:2]),
    "regex": (re.compile(r"\.[qv]$"), [ALL[2], ALL[4]]),
    "position": (0, ALL[:1]),
    "from the end": (-1, ALL[-1:]),
    "several": (["head", 1, re.compile("out")], [ALL[1], *ALL[-2:]]),
    "all but": ("-attn.*", [*ALL[:2], ALL[-1]]),
    "glob less one": (["enc.*", "-enc.0"], ALL[1:2]),
    "array": (np.array(["head"], dtype=object), ALL[-1:]),
    "predicate": (lambda matrix: matrix.N == 32, ALL[:2]),
    "by type": (lambda matrix: matrix.layer_type == "attention", ALL[2:5]),
    "empty": ([], []),
    "no layer": (lambda matrix: False, []),
}


@pytest.mark.filterwarnings("ignore:WWPGD projects no layer")
@pytest.mark.parametrize("case", CHOICES)
def test_include(case):
    choice, names = CHOICES[case]
    results = run(include=choice)
    assert projected(results) == names
    assert [result.name for result in results] == ALL
    assert {r.reason for r in results if isinstance(r, Skipped)} == {"not included"}


@pytest.mark.parametrize("case", CHOICES)
def test_exclude(case):
    choice, names = CHOICES[case]
    results = run(exclude=choice)
    assert projected(results) == [name for name in ALL if name not in names]
    assert {r.reason for r in results if isinstance(r, Skipped)} <= {"excluded"}


def test_include_and_exclude():
    results = run(include="enc.*", exclude=lambda matrix: matrix.name == "enc.0")
    assert projected(results) == ["enc.1"]


def test_what_is_not_chosen_keeps_every_bit():
    model, before = deep(), deep()
    run(model, include=["enc.0", "*.k"])
    parts = zip(
        model.attn.in_proj_weight.chunk(3), before.attn.in_proj_weight.chunk(3), strict=True
    )
    assert [torch.equal(a, b) for a, b in parts] == [True, False, True]
    assert not torch.equal(model.enc[0].weight, before.enc[0].weight)
    assert torch.equal(model.enc[1].weight, before.enc[1].weight)
    assert torch.equal(model.head.weight, before.head.weight)


def test_a_layer_that_is_no_target_is_not_made_one():
    model = nn.Sequential(nn.Embedding(50, SIZE), nn.Linear(SIZE, SIZE))
    embedding, layer = run(model, include=["0", "1"])
    assert embedding == Skipped("0", "an embedding, or tied to one")
    assert isinstance(layer, Projected)


@pytest.mark.parametrize("option", ["include", "exclude", "projection"])
@pytest.mark.parametrize(
    ("pattern", "near"), [("enc.3", r"enc\.[01]"), ("haed", "head"), ("attn.in_proj", "attn.*")]
)
def test_a_pattern_that_matches_nothing_is_found_at_construction(option, pattern, near):
    choice = {pattern: ManifoldProjection()} if option == "projection" else pattern
    model = deep()
    expected = f"no layer matches '{re.escape(pattern)}'; did you mean '{near}'"
    with pytest.raises(ValueError, match=expected):
        WWPGD(adamw(model), model=model, **{option: choice})


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("choice", [3.5, [None], True, {"a": 1}.items()])
def test_a_pattern_of_the_wrong_type(option, choice):
    model = deep()
    with pytest.raises(TypeError, match="layers are chosen by name, glob"):
        WWPGD(adamw(model), model=model, **{option: choice})


@pytest.mark.parametrize("position", [7, -8])
def test_a_position_outside_the_model(position):
    model = deep()
    with pytest.raises((ValueError, IndexError), match=str(position)):
        WWPGD(adamw(model), model=model, include=position)


# Without a model


def by_name(model, **settings):
    return WWPGD(torch.optim.AdamW(model.named_parameters()), strength=1.0, **settings)


def test_names_may_come_from_the_optimizer_alone():
    model = deep()
    opt = by_name(model, include="enc.*", exclude="enc.0")
    results = opt.end_epoch()
    assert projected(results) == ["enc.1"]
    assert Skipped("enc.0", "excluded") in results
    assert Skipped("head", "not included") in results


def test_a_name_that_the_optimizer_does_not_know():
    model = deep()
    opt = by_name(model, include="enc.7")
    with pytest.raises(ValueError, match=r"no layer matches 'enc\.7'; did you mean 'enc\.[01]'"):
        opt.targets()
    (message,), results = collect(opt.end_epoch)
    assert "no projection at boundary 0: no layer matches 'enc.7'; did you mean" in message
    assert results == ()
    with pytest.raises(ValueError, match="no layer matches"):
        by_name(model, include="enc.7", strict=True).end_epoch()


def test_without_names_positions_and_predicates_remain():
    model = deep()
    opt = WWPGD(adamw(model), strength=1.0, include=[0, "group0.param2"])
    assert projected(opt.end_epoch()) == ["group0.param0", "group0.param2"]


# One projection for each pattern


def alphas(model):
    return [fit_power_law(evals_by_svd(weight)).alpha for weight in weights(model)]


def test_every_layer_reaches_its_own_alpha():
    model = deep()
    targets = {"head": 4.0, "enc.0": 2.5, "enc.*": 3.0, "*": 2.0}
    results = run(model, projection={p: ManifoldProjection(alpha=a) for p, a in targets.items()})
    assert [result.alpha for result in results] == pytest.approx(
        [2.5, 3.0, 2.0, 2.0, 2.0, 2.0, 4.0], abs=1e-3
    )
    of = {id(p): alpha for p, alpha in zip(weights(model), alphas(model), strict=True)}
    assert of[id(model.enc[0].weight)] == pytest.approx(2.5, abs=1e-3)
    assert of[id(model.enc[1].weight)] == pytest.approx(3.0, abs=1e-3)
    assert of[id(model.head.weight)] == pytest.approx(4.0, abs=1e-3)


def test_the_first_pattern_wins():
    every, one = ManifoldProjection(alpha=3.0), ManifoldProjection(alpha=2.0)
    assert {round(r.alpha, 2) for r in run(projection={"*": every, "head": one})} == {3.0}


def test_layers_without_a_pattern_are_skipped():
    results = run(projection={"enc.*": ManifoldProjection()})
    assert projected(results) == ALL[:2]
    assert {r.reason for r in results[2:]} == {"no pattern of the projections matches it"}


def test_choice_and_projections_together():
    results = run(projection={"enc.*": ManifoldProjection()}, exclude="enc.0")
    assert projected(results) == ["enc.1"]
    assert results[0] == Skipped("enc.0", "excluded")


def test_targets_say_what_would_be_projected_and_change_nothing():
    model, before = deep(), deep()
    special = ManifoldProjection(alpha=3.0)
    opt = WWPGD(adamw(model), model=model, include="enc.*", projection={"enc.1": special})
    first, second, *others = opt.targets()
    assert first == Skipped("enc.0", "no pattern of the projections matches it")
    assert second.projection is special
    assert second.matrix.parameter is model.enc[1].weight
    assert {other.reason for other in others} == {"not included"}
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(before), strict=True))


# Only where it is needed


def needing(when, model=None, **settings):
    model = deep() if model is None else model
    return WWPGD(adamw(model), model=model, strength=1.0, when=when, **settings)


def test_a_predicate_on_the_report_is_asked_about_every_target():
    asked = {}

    def when(layer):
        asked[layer.name] = (layer.alpha, layer.num_traps)
        return layer.name.startswith("enc")

    model = deep()
    expected = measure(model, randomize=True)
    results = needing(when, model, exclude="head").end_epoch()
    assert projected(results) == ALL[:2]
    assert list(asked) == ALL[:-1]
    for name, (alpha, num_traps) in asked.items():
        assert alpha == expected[name].alpha
        assert num_traps == expected[name].num_traps
    assert {result.reason for result in results[2:-1]} == {"when= says no"}
    assert results[-1] == Skipped("head", "excluded")


def test_layers_that_arrived_are_left_alone():
    model = deep()
    opt = needing(lambda layer: abs(layer.alpha - 2) > 0.05, model)
    assert projected(opt.end_epoch()) == ALL
    opt.step()
    before = [weight.detach().clone() for weight in weights(model)]
    assert collect(opt.end_epoch)[0] == []  # nothing to do is no reason to warn
    assert {result.reason for result in opt.projected} == {"when= says no"}
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_a_trap_is_a_need():
    model = deep()
    with torch.no_grad():
        model.enc[0].weight[3, 4] = 30.0
    assert projected(needing(lambda layer: layer.num_traps, model).end_epoch()) == ["enc.0"]


def test_a_layer_too_small_to_project_is_not_asked_about():
    model = nn.Sequential(nn.Linear(SIZE, 32), nn.Linear(32, 3))
    opt = needing(lambda layer: layer.alpha < 9, model, strict=True)  # alpha of the head is None
    first, head = opt.end_epoch()
    assert isinstance(first, Projected)
    assert head == Skipped("1", "3 eigenvalues, fewer than min_evals=20")


def test_a_layer_of_which_the_predicate_fails_does_not_stop_the_others():
    def when(layer):
        return 1 / (layer.name != "enc.1")

    opt = needing(when)
    messages, results = collect(opt.end_epoch)
    assert isinstance(results[1], Failed)
    assert projected(results) == [name for name in ALL if name != "enc.1"]
    assert messages == [
        "layer enc.1 is left as it is, when= failed: ZeroDivisionError: division by zero"
    ]
    with pytest.raises(RuntimeError, match="when= failed: ZeroDivisionError"):
        needing(when, strict=True).end_epoch()


def test_a_layer_that_cannot_be_measured_is_skipped():
    model = deep()
    with torch.no_grad():
        model.enc[1].weight[0, 0] = torch.nan
    first, second, *_ = needing(lambda layer: True, model).end_epoch()
    assert isinstance(first, Projected)
    assert isinstance(second, Skipped)
    assert "NaN" in second.reason
