import pytest
import torch
from torch import nn

from ww_train.comparing.matching import Matching, match_layers, matched_pairs
from ww_train.weights.matrices import Skipped, weight_matrices

from .oracles import zoo


def state(**shapes):
    return {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}


def match(base, other):
    return match_layers(list(weight_matrices(base)), list(weight_matrices(other)))


def test_missing_extra_and_reshaped_layers_are_told_apart():
    base = state(a=(3, 4), b=(4, 5), gone=(2, 2), c=(5, 6))
    other = state(new=(7, 7), c=(5, 6), b=(5, 4), a=(3, 4))
    found = match(base, other)
    assert found.matched == ("c", "a")
    assert found.missing == ("gone",)
    assert found.extra == ("new",)
    (reshaped,) = found.reshaped
    assert reshaped.name == "b"
    assert "1 x 4 x 5 in the base model, 1 x 5 x 4 in the other" in reshaped.reason
    assert found.unreadable == ()


def test_a_layer_that_is_tied_in_one_model_only_is_unreadable():
    tied, loose = state(a=(3, 4), b=(3, 4)), state(a=(3, 4), b=(3, 4))
    tied["b.weight"] = tied["a.weight"]
    assert match(loose, tied).unreadable == (Skipped("b", "shares its weights with a"),)
    (layer,) = match(tied, loose).unreadable
    assert layer == Skipped("b", "in the base model: shares its weights with a")


def test_a_model_matches_itself_and_its_state_dict():
    model = zoo()
    found = match(model, model.state_dict())
    assert len(found.matched) > 15
    assert found == Matching(found.matched, (), (), (), ())


@pytest.mark.parametrize(
    ("base", "other", "message"),
    [
        (state(a=(3, 4)), state(**{"model.a": (3, 4)}), "'a' against 'model.a'; rename the keys"),
        (state(a=(3, 4)), state(a=(3, 5)), "a and others have the same names, but 1 x 3 x 4"),
        ({}, state(a=(3, 4)), "the base model holds no matrix"),
        (state(a=(3, 4)), {"bias": torch.ones(3)}, "the other model holds no matrix"),
        (state(a=(3, 4)), state(**{"a.lora": (3, 4)}), "merge(base, adapter)"),
    ],
)
def test_two_strangers_are_an_error_that_says_why(base, other, message):
    with pytest.raises(ValueError, match="no layer in common") as error:
        match(base, other)
    assert message in str(error.value)


def test_pairs_are_chosen_among_the_other_models_layers():
    model, own = zoo(0), zoo(1)
    own.add_module("new", nn.Linear(4, 4))
    base, other = list(weight_matrices(model)), list(weight_matrices(own))
    matching, pairs = matched_pairs(base, other, ["conv*", -1], "conv2d")
    assert [b.name for b, _ in pairs] == [o.name for _, o in pairs] == ["conv2"]
    assert "fc" in matching.matched
    assert matching.extra == ("new",)
    assert torch.equal(pairs[0][0].stack[0], model.conv2.weight[..., 0, 0])
    with pytest.raises(ValueError, match="did you mean 'conv1'"):
        matched_pairs(base, other, "con1")
    with pytest.raises(ValueError, match="none of the chosen layers is in both"):
        matched_pairs(base, other, "new")
