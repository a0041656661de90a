import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from ww_train.editing.edits import Edits, edit_, write_
from ww_train.editing.trap_removal import TrapsRemoved
from ww_train.trap_causes import TrapCause
from ww_train.weights.matrices import Skipped, WeightMatrix, weight_matrices

from .oracles import gaussian, zoo


def double(matrix):
    """An edit that doubles a layer."""
    distance = write_(matrix, 2.0 * matrix.stack.double())
    return distance if isinstance(distance, Skipped) else (matrix.name, distance)


def test_every_writable_layer_is_edited_and_nothing_else():
    model = zoo()
    before = copy.deepcopy(model.state_dict())
    done = edit_(model, double, min_evals=1)
    names = [m.name for m in weight_matrices(model) if isinstance(m, WeightMatrix)]
    assert [name for name, _ in done.layers] + [x.name for x in done.skipped] == names
    assert done.skipped == ()
    assert {distance for _, distance in done.layers} == {1.0}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] * (2 if value.ndim > 1 and "bias" not in key else 1))


def test_tied_weights_are_edited_once():
    model = nn.ModuleDict({"a": nn.Linear(9, 9, bias=False), "b": nn.Linear(9, 9, bias=False)})
    model["b"].weight = model["a"].weight
    before = model["a"].weight.detach().clone()
    done = edit_(model, double)
    assert torch.equal(model["a"].weight, 2.0 * before)
    assert done.skipped == (Skipped("b", "shares its weights with a"),)


def test_frozen_weights_are_edited_and_gradients_are_left_alone():
    layer = nn.Linear(9, 9)
    layer(torch.ones(9)).sum().backward()
    layer.weight.requires_grad_(False)
    grad, parameter, before = layer.weight.grad, layer.weight, layer.weight.clone()
    edit_(layer, double)
    assert layer.weight is parameter
    assert layer.weight.grad is grad
    assert torch.equal(layer.weight, 2.0 * before)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"q.lora_A.default.weight": gaussian(9, 20)}, "LoRA"),
        ({"q.weight": gaussian(9, 20).to(torch.float8_e4m3fn)}, "scales|float8|quantised"),
        ({"q.weight": torch.ones(9, 20, dtype=torch.int8)}, "quantised"),
        ({"q.parametrizations.weight.original0": gaussian(9, 20)}, "computed"),
        ({"q.weight": gaussian(7, 20)}, "min_evals=8"),
        ({"q.weight": 1e38 * gaussian(9, 20).abs() + 2e38}, "overflow torch.float32"),
    ],
)
def test_what_must_not_be_written_is_left_alone(state, reason):
    before = copy.deepcopy(state)
    done = edit_(state, double)
    assert done.layers == ()
    (skipped,) = done.skipped
    assert re.search(reason, skipped.reason)
    for key, value in state.items():
        assert torch.equal(value.float(), before[key].float())


def test_layers_are_chosen():
    model = zoo()
    assert [x for x, _ in edit_(model, double, layers=["conv*", "-conv1"]).layers] == [
        "conv2",
        "conv3",
    ]
    assert [x for x, _ in edit_(model, double, types="embedding").layers] == ["embed"]
    with pytest.raises(ValueError, match="did you mean 'fc'"):
        edit_(model, double, layers="fcc")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones((9, 9)), "torch.from_numpy"),
        ({"a": np.ones((9, 9))}, "torch.from_numpy"),
        ("model.safetensors", "which can be changed in place, got str"),
        (None, "got NoneType"),
    ],
)
def test_weights_that_would_be_copied_are_refused(weights, message):
    with pytest.raises(TypeError, match=message):
        edit_(weights, double)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_writing_rounds_to_the_nearest(dtype):
    stored = gaussian(40, 30).to(dtype)
    matrix = WeightMatrix("w", "dense", stored[None])
    values = gaussian(40, 30, 1, torch.float64)[None]
    distance = write_(matrix, values)
    assert torch.equal(stored, values[0].to(dtype))
    error = (stored.double() - values[0]).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * values[0].abs() + 1e-7).all()
    old = gaussian(40, 30).to(dtype).double()
    assert distance == pytest.approx(float((stored.double() - old).norm() / old.norm()))


def test_the_table_has_a_row_for_each_layer_and_the_reasons():
    cause = TrapCause("entry", 0, 3, 4, 60.0, 60.0, 3600.0)
    row = TrapsRemoved("a", "dense", 1, 0, (cause, cause), 0.5)
    frame = Edits((row,), (Skipped("b", "frozen"),)).to_dataframe()
    assert frame.causes[0] == "entry (3, 4) = 60; entry (3, 4) = 60"
    assert frame.traps_before[0] == 1
    assert frame.attrs["skipped"] == {"b": "frozen"}
    assert len(Edits((), ()).to_dataframe()) == 0
