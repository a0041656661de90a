import copy
import math

import pytest
import torch
from torch import nn

from ww_train import WWPGD, ManifoldProjection, Projected, weight_matrices
from ww_train.steering.momentum import keep, momentum_buffers, project, reset
from ww_train.steering.tasks import Failed

from .oracles import gaussian
from .training import SIZE, collect, net, sgd, train, wrap

OPTIMIZERS = {
    "AdamW": ("exp_avg", lambda p: torch.optim.AdamW(p, lr=1e-2)),
    "Adam amsgrad": ("exp_avg", lambda p: torch.optim.Adam(p, amsgrad=True)),
    "NAdam": ("exp_avg", torch.optim.NAdam),
    "AdamW fused": ("exp_avg", lambda p: torch.optim.AdamW(p, fused=True)),
    "SGD": ("momentum_buffer", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "RMSprop": ("momentum_buffer", lambda p: torch.optim.RMSprop(p, momentum=0.9)),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = ("momentum_buffer", torch.optim.Muon)


class Sequences(nn.Module):
    """Every kind of layer of which one parameter is several matrices, and convolutions."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, 2, bias=False, batch_first=True)
        self.lstm = nn.LSTM(SIZE, 20, bias=False, batch_first=True)
        self.conv = nn.Conv1d(20, 21, 3, bias=False)
        self.pointwise = nn.Conv2d(21, 22, 1, bias=False).to(memory_format=torch.channels_last)
        self.grouped = nn.Conv2d(22, 44, 1, groups=2, bias=False)

    def forward(self, x):
        y, _ = self.lstm(self.attention(x, x, x, need_weights=False)[0])
        return self.grouped(self.pointwise(self.conv(y.mT)[..., None]))


def trained(model, opt, shape=(4, SIZE), steps=3):
    """`model` after some steps on random input."""
    for i in range(steps):
        opt.zero_grad()
        x = gaussian(math.prod(shape), 1, i, torch.float64)
        model(x.view(shape)).square().mean().backward()
        opt.step()


def prepared(make, model, shape=(4, SIZE), **settings):
    opt = WWPGD(make(model.parameters()), model=model, strength=0.7, **settings)
    trained(model, opt, shape)
    return opt


def momentum_of(opt, matrix, name):
    (buffer,) = momentum_buffers(matrix, opt.state[matrix.parameter])
    state = opt.state[matrix.parameter][name]
    assert buffer.untyped_storage().data_ptr() == state.untyped_storage().data_ptr()
    return buffer


def applied(before, after, momentum):
    """What turned `before` into `after`, one slice each, applied to `momentum`: by a literal SVD."""
    left, svals, right = torch.linalg.svd(before, full_matrices=False)
    ratio = torch.diagonal(left.mT @ after @ right.mT) / svals
    tall = before.shape[0] >= before.shape[1]
    if tall:
        return momentum @ (right.mT * ratio) @ right
    return (left * ratio) @ left.mT @ momentum


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", ["wide and tall", "slices"])
def test_project_applies_to_the_momentum_what_was_applied_to_the_weights(name, shape):
    key, make = OPTIMIZERS[name]
    if shape == "slices":
        if name == "Muon":
            pytest.skip("Muon takes two-dimensional weights only")
        model, batch = Sequences().double(), (2, 5, SIZE)
    else:
        model, batch = net(bias=False).double(), (4, SIZE)
    opt = prepared(make, model, batch, momentum=project)
    matrices = list(weight_matrices(model))
    weights = [m.stack.clone() for m in matrices]
    momenta = [momentum_of(opt, m, key).clone() for m in matrices]
    assert {type(result) for result in opt.end_epoch()} == {Projected}
    for matrix, before, momentum in zip(matrices, weights, momenta, strict=True):
        now = momentum_of(opt, matrix, key)
        for i in range(matrix.rf):
            expected = applied(before[i], matrix.stack[i], momentum[i])
            torch.testing.assert_close(now[i], expected, rtol=1e-8, atol=1e-12)
        assert not torch.allclose(now, momentum, rtol=1e-3, atol=0)


def others(opt, keys):
    """Everything in the state but the momentum of weights."""
    return [
        (value if value.ndim < 2 else value.clone())
        for parameter, state in opt.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not (key in keys and parameter.ndim > 1)
    ]


@pytest.mark.parametrize("policy", [project, reset])
@pytest.mark.parametrize("name", ["AdamW", "Adam amsgrad", "SGD"])
def test_the_rest_of_the_state_is_untouched(name, policy):
    key, make = OPTIMIZERS[name]
    model = net().double()
    opt = prepared(make, model, momentum=policy)
    before = copy.deepcopy(others(opt, {key}))
    assert len(opt.end_epoch()) == 2
    after = others(opt, {key})
    assert len(after) >= 2  # the momentum of the biases at least
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_reset_starts_again_from_zero_where_a_layer_was_projected():
    model = net().double()
    opt = prepared(OPTIMIZERS["AdamW"][1], model, momentum=reset, exclude="2")
    before = opt.state[model[2].weight]["exp_avg"].clone()
    opt.end_epoch()
    assert torch.count_nonzero(opt.state[model[0].weight]["exp_avg"]) == 0
    assert torch.equal(opt.state[model[2].weight]["exp_avg"], before)


@pytest.mark.parametrize("policy", [project, reset])
def test_a_part_of_a_parameter_is_changed_alone(policy):
    model = Sequences().double()
    opt = prepared(
        OPTIMIZERS["SGD"][1], model, (2, 5, SIZE), momentum=policy, exclude=["*.k", "lstm*.[fo]"]
    )
    before = copy.deepcopy(opt.base.state_dict()["state"])
    opt.end_epoch()
    attention, ih = (
        (before[i]["momentum_buffer"], opt.state[p]["momentum_buffer"], rows)
        for i, p, rows in (
            (0, model.attention.in_proj_weight, SIZE),
            (2, model.lstm.weight_ih_l0, 20),
        )
    )
    for (old, new, rows), changes in ((attention, [1, 0, 1]), (ih, [1, 0, 1, 0])):
        parts = zip(old.split(rows), new.split(rows), strict=True)
        assert [not torch.equal(a, b) for a, b in parts] == [bool(change) for change in changes]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_keep_keeps_every_bit_of_the_state(name):
    model = net(bias=False).double()
    opt = prepared(OPTIMIZERS[name][1], model)
    assert opt.momentum is keep
    before = copy.deepcopy(opt.base.state_dict()["state"])
    assert len(opt.end_epoch()) == 2
    after = opt.base.state_dict()["state"]
    for index, state in before.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(after[index][key]), torch.as_tensor(value))


def test_a_policy_of_ones_own():
    model = net().double()
    opt = prepared(
        OPTIMIZERS["AdamW"][1], model, momentum=lambda m, op: 0.5 * m + 0.5 * op(m), include="0"
    )
    twin = copy.deepcopy((model, opt))
    twin[1].momentum = project
    old = opt.state[model[0].weight]["exp_avg"].clone()
    opt.end_epoch()
    twin[1].end_epoch()
    projected = twin[1].state[twin[0][0].weight]["exp_avg"]
    torch.testing.assert_close(opt.state[model[0].weight]["exp_avg"], (old + projected) / 2)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_threads_change_no_bit(threads):
    model = Sequences()
    opt = WWPGD(sgd(model), model=model, strength=1.0, momentum=project)
    for i in range(2):
        opt.zero_grad()
        model(gaussian(10, SIZE, i).view(2, 5, SIZE)).square().mean().backward()
        opt.step()
    twin = copy.deepcopy((model, opt))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        opt.end_epoch()
    finally:
        torch.set_num_threads(before)
    twin[1].end_epoch()
    for a, b in zip(model.parameters(), twin[0].parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(opt.state[a]["momentum_buffer"], twin[1].state[b]["momentum_buffer"])


def broken(momentum, operator):
    operator(momentum)
    raise RuntimeError("the policy broke")


@pytest.mark.parametrize("strict", [False, True])
def test_a_policy_that_fails_leaves_weights_and_momentum(strict):
    model = net()
    opt = WWPGD(sgd(model), model=model, strength=1.0, momentum=broken, strict=strict)
    train(model, opt, 2)
    weights, state = copy.deepcopy((model.state_dict(), opt.base.state_dict()["state"]))
    if strict:
        with pytest.raises(RuntimeError, match="the policy broke"):
            opt.end_epoch()
    else:
        messages, results = collect(opt.end_epoch)
        assert [type(result) for result in results] == [Failed, Failed]
        assert sum("left as it is" in message for message in messages) == 2
        assert all("the policy broke" in message for message in messages)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    for index, old in state.items():
        new = opt.base.state_dict()["state"][index]
        assert torch.equal(new["momentum_buffer"], old["momentum_buffer"])


def test_momentum_that_would_not_be_finite_is_not_written():
    model = net()
    opt = wrap(model, sgd, strength=1.0, momentum=lambda m, op: m / 0.0)
    train(model, opt, 1)
    before = opt.state[model[0].weight]["momentum_buffer"].clone()
    assert {type(result) for result in opt.end_epoch()} == {Projected}
    assert torch.equal(opt.state[model[0].weight]["momentum_buffer"], before)


@pytest.mark.parametrize("momentum", ["reset", None, 0.0])
def test_a_policy_is_a_function(momentum):
    with pytest.raises(
        TypeError, match=r"momentum is a function of ww_train\.steering\.momentum, got"
    ):
        wrap(net(), momentum=momentum)


class Shrinking:
    """A projection of one's own that knows no linear operator."""

    def project_(self, matrix, strength):
        matrix.stack.mul_(1 - strength / 2)
        return Projected(matrix.name, strength, 0.5)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda m: sgd(m, momentum=0.0), {}),
        (lambda m: torch.optim.Adagrad(m.parameters()), {}),
        (sgd, {"projection": Shrinking()}),
    ],
    ids=["SGD without", "Adagrad", "no operator"],
)
@pytest.mark.parametrize("policy", [project, reset])
def test_a_policy_without_effect_is_said_once(make, settings, policy):
    model = net()
    opt = wrap(model, make, momentum=policy, **settings)
    assert collect(opt.end_epoch)[0] == []  # before the first step nobody has momentum
    train(model, opt, 1)
    (message,), results = collect(opt.end_epoch)
    assert message.startswith("momentum= changes nothing: the optimizer keeps none under exp_avg")
    assert {type(result) for result in results} == {Projected}
    train(model, opt, 1)
    assert collect(opt.end_epoch)[0] == []


def test_a_buffer_of_another_layout_is_left_alone():
    weight = nn.Parameter(gaussian(30, 20))
    (matrix,) = weight_matrices(weight)
    state = {"momentum_buffer": gaussian(20, 30).mT, "exp_avg": gaussian(20, 30)}
    assert list(momentum_buffers(matrix, state)) == []


def test_momentum_of_sixteen_bits_keeps_its_dtype():
    model = net().bfloat16()
    opt = wrap(model, sgd, strength=1.0, momentum=project)
    train(model, opt, 2)
    before = opt.state[model[0].weight]["momentum_buffer"].clone()
    opt.end_epoch()
    buffer = opt.state[model[0].weight]["momentum_buffer"]
    assert buffer.dtype == torch.bfloat16
    assert not torch.equal(buffer, before)


def test_a_projection_can_be_asked_for_its_operator():
    weight, seen = gaussian(40, 30, dtype=torch.float64), []
    before = weight.clone()
    ManifoldProjection().project_(weight, 0.5, then=seen.append)
    (operator,) = seen
    torch.testing.assert_close(operator(before[None])[0], weight)
    x, y = gaussian(40, 30, 1, torch.float64)[None], gaussian(40, 30, 2, torch.float64)[None]
    torch.testing.assert_close(operator(2 * x - y), 2 * operator(x) - operator(y))
