import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ww_train import WWPGD, ManifoldProjection, Projected
from ww_train.steering.tasks import Failed

from .training import (
    BASES,
    SIZE,
    adamw,
    assert_free,
    assert_projected,
    clock,
    collect,
    epoch,
    loss_of,
    net,
    same,
    sgd,
    train,
    weights,
    wrap,
)

# The trajectory of the base optimizer


@pytest.mark.parametrize("base", BASES)
def test_without_an_epoch_end_the_trajectory_is_that_of_the_base(base):
    bare, wrapped = net(), net()
    reference = BASES[base](bare)
    opt = wrap(wrapped, BASES[base])
    train(bare, reference, 8)
    train(wrapped, opt, 8)
    assert same(bare, wrapped)
    assert clock(opt) == {"steps": 8, "epochs": 0, "boundary": -1}


@pytest.mark.parametrize("base", BASES)
def test_a_projection_of_strength_zero_leaves_the_trajectory_alone(base):
    bare, wrapped = net(), net()
    opt = wrap(wrapped, BASES[base], strength=0.0, steps_per_epoch=2)
    train(bare, BASES[base](bare), 8)
    train(wrapped, opt, 8)
    assert same(bare, wrapped)
    assert clock(opt)["epochs"] == 4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon():
    bare, wrapped = net(bias=False), net(bias=False)
    train(bare, torch.optim.Muon(bare.parameters()), 8)
    train(wrapped, wrap(wrapped, lambda m: torch.optim.Muon(m.parameters())), 8)
    assert same(bare, wrapped)


def test_lbfgs_with_its_closure():
    losses = []
    models = bare, wrapped = net(), net()
    optimizers = [torch.optim.LBFGS(m.parameters(), max_iter=4) for m in models]
    optimizers[1] = WWPGD(optimizers[1], model=wrapped)
    for model, opt in zip(models, optimizers, strict=True):

        def closure(model=model, opt=opt):
            opt.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        losses.append([opt.step(closure).item() for _ in range(3)])
    assert losses[0] == losses[1]
    assert losses[0][2] < losses[0][0]
    assert same(bare, wrapped)
    assert clock(optimizers[1])["steps"] == 3


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_is_called_once_and_its_loss_returned(by_name):
    model, calls = net(), []

    def closure():
        calls.append(1)
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    opt = wrap(model)
    expected = loss_of(model, 0).item()
    loss = opt.step(closure=closure) if by_name else opt.step(closure)
    assert loss.item() == expected
    assert len(calls) == 1
    assert clock(opt)["steps"] == 1


# Hooks


def test_step_hooks_of_the_wrapper_fire_once_a_step_and_get_it():
    model, seen = net(), []
    opt = wrap(model)
    before = opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o)))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o)))
    opt.base.register_step_post_hook(lambda o, args, kwargs: seen.append(("base", o)))
    train(model, opt, 2)
    assert seen == [("before", opt), ("base", opt.base), ("after", opt)] * 2
    before.remove()
    train(model, opt, 1)
    assert len(seen) == 8


def test_a_post_hook_sees_the_weights_before_the_projection():
    model, distances = net(), []
    opt = wrap(model, strength=1.0, steps_per_epoch=1)

    def note(*_):
        weight = model[0].weight.detach().clone()
        distances.append(ManifoldProjection().project_(weight).distance)

    opt.register_step_post_hook(note)
    train(model, opt, 1)
    assert distances[0] > 0.05
    assert_projected(model)


def replaced():
    return "replaced"


@pytest.mark.parametrize("make", [adamw, wrap], ids=["torch", "ours"])
@pytest.mark.parametrize(
    "change",
    [lambda o, a, k: ((o, replaced), {}), lambda o, a, k: ((o,), {"closure": replaced})],
    ids=["by position", "by name"],
)
def test_a_pre_hook_may_replace_the_closure(make, change):
    opt = make(net())
    opt.register_step_pre_hook(change)
    assert opt.step() == "replaced"


@pytest.mark.parametrize("given", [(), (lambda: 1.0,)], ids=["bare call", "closure"])
def test_hooks_get_the_arguments_that_torch_gives(given):
    bare, opt = adamw(net()), wrap(net())
    for optimizer in (bare, opt):
        seen = []
        optimizer.register_step_pre_hook(lambda o, *given, seen=seen: seen.append(given))
        optimizer.register_step_post_hook(lambda o, *given, seen=seen: seen.append(given))
        optimizer.step(*given)
        assert seen == [((optimizer, *given), {})] * 2


def test_global_hooks_fire_once_a_step():
    model, seen = net(), []
    opt = wrap(model)
    handle = register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(o))
    try:
        train(model, opt, 3)
    finally:
        handle.remove()
    assert seen == [opt.base] * 3


def test_the_profiler_sees_one_step():
    model = net()
    opt = wrap(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, opt, 2)
    ranges = [e.name for e in profile.events() if e.name.startswith("Optimizer.step#")]
    assert ranges == ["Optimizer.step#AdamW.step"] * 2


def test_state_dict_hooks_fire_once_and_may_replace():
    opt, seen = wrap(net()), []
    opt.register_state_dict_pre_hook(lambda o: seen.append(o))
    opt.register_state_dict_post_hook(lambda o, state: {**state, "mark": 7})
    opt.base.register_state_dict_pre_hook(lambda o: seen.append(o))
    assert opt.state_dict()["mark"] == 7
    assert seen == [opt, opt.base]


def test_load_hooks_fire_once_and_may_replace():
    model = net()
    source, opt, seen = wrap(model), wrap(model), []
    train(model, source, 2)

    def faster(_, state):
        groups = [{**group, "lr": 0.5} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    opt.register_load_state_dict_pre_hook(faster)
    opt.register_load_state_dict_post_hook(lambda o: seen.append((o, clock(o)["steps"])))
    opt.load_state_dict(source.state_dict())
    assert opt.param_groups[0]["lr"] == 0.5
    assert seen == [(opt, 2)]


# Groups and state


def test_groups_state_and_defaults_are_those_of_the_base_also_after_a_load():
    model = net()
    opt = wrap(model)
    train(model, opt, 2)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.param_groups is opt.base.param_groups
    assert opt.state is opt.base.state
    assert opt.defaults is opt.base.defaults
    assert len(opt.state) == 4
    groups, state, defaults = opt.param_groups[:], dict(opt.state), {"lr": 3.0}
    opt.param_groups, opt.state, opt.defaults = groups, state, defaults
    assert opt.base.param_groups is groups
    assert opt.base.state is state
    assert opt.base.defaults is defaults


def test_an_added_group_is_trained_and_projected():
    bare, wrapped = net(), net()
    reference = torch.optim.AdamW(bare[0].parameters(), lr=1e-2)
    opt = WWPGD(torch.optim.AdamW(wrapped[0].parameters(), lr=1e-2), model=wrapped, strength=1.0)
    for model, optimizer in ((bare, reference), (wrapped, opt)):
        optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 1e-3})
        train(model, optimizer, 4)
    assert same(bare, wrapped)
    assert [group["lr"] for group in opt.base.param_groups] == [1e-2, 1e-3]
    assert [type(result) for result in opt.end_epoch()] == [Projected, Projected]


def test_zero_grad():
    model = net()
    opt = wrap(model)
    loss_of(model, 0).backward()
    opt.zero_grad(set_to_none=False)
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_methods_of_the_base_are_reached_through_the_wrapper():
    class Switched(torch.optim.SGD):
        mode = "train"

        def eval(self):
            self.mode = "eval"

    opt = wrap(net(), lambda m: Switched(m.parameters()))
    opt.eval()
    assert opt.base.mode == "eval"
    assert opt.mode == "eval"
    assert not hasattr(opt, "consolidate_state_dict")
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        opt.nothing_of_the_kind  # noqa: B018


# What goes wrong


@pytest.mark.parametrize("base", [None, "adamw", torch.optim.AdamW, nn.Linear(2, 2)])
def test_the_base_must_be_an_optimizer(base):
    with pytest.raises(TypeError, match=r"wraps a torch\.optim\.Optimizer, got"):
        WWPGD(base)


def test_the_base_must_not_be_wrapped_already():
    with pytest.raises(TypeError, match="already a WWPGD"):
        WWPGD(wrap(net()))


def test_the_base_must_have_parameters():
    with pytest.raises(ValueError, match="the optimizer has no parameters"):
        WWPGD(torch.optim.SGD([{"params": []}], lr=0.1))


@pytest.mark.parametrize("model", ["net", 3, [nn.Linear(2, 2)], nn.Linear])
def test_the_model_must_be_a_module(model):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got"):
        WWPGD(adamw(net()), model=model)


@pytest.mark.parametrize("strength", [-0.1, 1.1, 2, math.nan, math.inf])
def test_a_constant_strength_must_be_between_zero_and_one(strength):
    with pytest.raises(ValueError, match="strength must be between 0 and 1, got"):
        wrap(net(), strength=strength)


@pytest.mark.parametrize("steps", [0, -1])
def test_an_epoch_needs_a_step(steps):
    with pytest.raises(ValueError, match="steps_per_epoch must be at least 1"):
        wrap(net(), steps_per_epoch=steps)


def raising(_epoch):
    raise RuntimeError("the schedule broke")


BAD_STRENGTHS = {
    "raises": (raising, "the schedule broke"),
    "two": (lambda epoch: 2.0, "between 0 and 1, got 2.0"),
    "NaN": (lambda epoch: math.nan, "between 0 and 1, got nan"),
    "negative": (lambda epoch: -0.5, "between 0 and 1, got -0.5"),
    "None": (lambda epoch: None, "None"),
}


@pytest.mark.parametrize("case", BAD_STRENGTHS)
def test_a_schedule_that_fails_warns_once_and_leaves_the_weights(case):
    strength, reason = BAD_STRENGTHS[case]
    model, bare = net(), net()
    opt, reference = wrap(model, strength=strength), adamw(bare)
    train(bare, reference, 3)
    (message,), result = epoch(model, opt)
    assert "no projection at boundary 0" in message
    assert reason in message
    assert result == ()
    for first in (1, 2):
        train(model, opt, 1, first=first)
        assert collect(opt.end_epoch) == ([], ())
    assert same(model, bare)


@pytest.mark.parametrize("case", BAD_STRENGTHS)
def test_a_schedule_that_fails_raises_if_strict(case):
    model = net()
    opt = wrap(model, strength=BAD_STRENGTHS[case][0], strict=True)
    train(model, opt, 1)
    before = copy.deepcopy(model)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        opt.end_epoch()
    assert same(model, before)


class Failing:
    """Fails on the layers whose names it is given, does its work on the others."""

    def __init__(self, *names):
        self.names = names

    def project_(self, matrix, strength):
        if matrix.name in self.names:
            raise torch.linalg.LinAlgError("did not converge")
        return ManifoldProjection().project_(matrix, strength)


def test_a_projection_that_fails_warns_once_for_each_layer():
    model, bare = net(), net()
    opt = wrap(model, projection=Failing("0", "2"))
    train(bare, adamw(bare), 2)
    messages, results = epoch(model, opt)
    first, second = (m for m in messages if "left as it is" in m)
    assert "layer 0 " in first
    assert "layer 2 " in second
    assert "did not converge" in first
    assert [type(result) for result in results] == [Failed, Failed]
    assert "did not converge" in results[0].reason
    train(model, opt, 1, first=1)
    messages, results = collect(opt.end_epoch)
    assert messages == []
    assert len(results) == 2
    assert same(model, bare)


def test_one_layer_that_fails_does_not_stop_the_others():
    model = net()
    opt = wrap(model, strength=1.0, projection=Failing("0"))
    train(model, opt, 1)
    before = model[0].weight.detach().clone()
    messages, results = collect(opt.end_epoch)
    assert len(messages) == 1
    assert [type(result) for result in results] == [Failed, Projected]
    assert torch.equal(model[0].weight, before)
    assert_projected(model[2:])


def test_a_projection_that_fails_raises_if_strict():
    model = net()
    opt = wrap(model, projection=Failing("0"), strict=True)
    train(model, opt, 1)
    with pytest.raises(torch.linalg.LinAlgError, match="did not converge"):
        opt.end_epoch()


@pytest.mark.parametrize("strict", [False, True])
def test_a_layer_that_is_not_finite_is_skipped(strict):
    model = net()
    opt = wrap(model, strength=1.0, strict=strict)
    train(model, opt, 1)
    with torch.no_grad():
        model[0].weight[3, 4] = math.nan
    before = model[0].weight.detach().clone()
    broken, done = opt.end_epoch()
    assert "NaN" in broken.reason
    assert isinstance(done, Projected)
    torch.testing.assert_close(model[0].weight.detach(), before, equal_nan=True, atol=0, rtol=0)


def test_no_target_at_all_warns_once_and_says_why():
    model = nn.Sequential(nn.Embedding(30, SIZE), nn.Linear(SIZE, 3))
    opt = WWPGD(adamw(model), model=model)
    (message,), results = collect(opt.end_epoch)
    assert message.startswith("WWPGD projects no layer (")
    assert "0: an embedding" in message
    assert "1: 3 eigenvalues, fewer than min_evals=20" in message
    assert len(results) == 2
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert collect(opt.end_epoch)[0] == []
    assert clock(opt)["epochs"] == 2


def test_no_matrix_at_all_is_said():
    model = nn.Sequential(nn.LayerNorm(SIZE))
    messages, results = collect(WWPGD(adamw(model), model=model).end_epoch)
    assert messages == ["WWPGD projects no layer (the model holds no matrix)"]
    assert results == ()


def test_the_message_stays_readable_for_a_model_of_many_layers():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(200)])
    (message,), _ = collect(WWPGD(adamw(model), model=model).end_epoch)
    assert len(message) < 2000


def test_bfloat16_weights_are_projected_at_full_strength():
    model = net().bfloat16()
    opt = wrap(model, sgd, strength=1.0)
    train(model, opt, 1)
    assert [type(result) for result in opt.end_epoch()] == [Projected, Projected]
    for weight in weights(model):
        assert weight.dtype == torch.bfloat16
        assert ManifoldProjection().project_(weight.detach().clone()).distance < 0.01


def test_the_representation_names_the_parts():
    text = repr(wrap(net(), strength=0.5))
    assert text.startswith("WWPGD(AdamW (")
    assert "strength=0.5" in text
    assert "ManifoldProjection(alpha=2.0" in text


def test_the_starting_point_is_not_on_the_manifold():
    assert_free(net())  # or every assertion that it was projected would hold anyway
