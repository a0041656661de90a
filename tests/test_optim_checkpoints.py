import copy
import io
import pickle

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from ww_train import WWPGD, Ramp

from .training import BASES, adamw, clock, net, same, settings_of, train, wrap

# Checkpoints


def test_the_bare_optimizer_loads_the_state_of_the_wrapper():
    bare, wrapped = net(), net()
    reference, opt = adamw(bare), wrap(wrapped)
    train(bare, reference, 4)
    train(wrapped, opt, 4)
    fresh = adamw(wrapped)
    fresh.load_state_dict(opt.state_dict())
    train(bare, reference, 4, first=4)
    train(wrapped, fresh, 4, first=4)
    assert same(bare, wrapped)


def test_the_wrapper_loads_the_state_of_the_bare_optimizer_and_restarts_its_clock():
    bare, wrapped = net(), net()
    reference = adamw(bare)
    train(bare, reference, 4)
    wrapped.load_state_dict(bare.state_dict())
    opt = wrap(wrapped)
    opt.step()
    opt.end_epoch()
    wrapped.load_state_dict(bare.state_dict())
    opt.load_state_dict(copy.deepcopy(reference.state_dict()))
    assert clock(opt) == {"steps": 0, "epochs": 0, "boundary": -1}
    train(bare, reference, 4, first=4)
    train(wrapped, opt, 4, first=4)
    assert same(bare, wrapped)


def test_the_clock_survives_a_trip_through_the_bare_optimizer():
    model = net()
    opt, bare, again = wrap(model), adamw(model), wrap(model)
    train(model, opt, 3)
    opt.end_epoch()
    bare.load_state_dict(opt.state_dict())
    again.load_state_dict(bare.state_dict())
    assert clock(again) == clock(opt) == {"steps": 3, "epochs": 1, "boundary": 3}


def test_loading_changes_neither_the_state_given_nor_the_groups():
    model = net()
    opt = wrap(model)
    train(model, opt, 2)
    state = opt.state_dict()
    keys = [set(group) for group in state["param_groups"]]
    other = wrap(net())
    other.load_state_dict(state)
    assert set(state) == {"state", "param_groups", "ww_pgd"}
    assert [set(group) for group in state["param_groups"]] == keys
    assert settings_of(other.base) == settings_of(opt.base)


def saved(opt, weights_only=True):
    """What comes back of a state dict that was written to a file."""
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


@pytest.mark.parametrize("base", ["AdamW", "SGD momentum", "AdamW fused"])
@pytest.mark.parametrize("at", [4, 6])
def test_resuming_is_bitwise_with_the_clock_and_the_ramp(base, at):
    whole, halves = net(), net()
    settings = {"strength": Ramp(4), "steps_per_epoch": 3}
    train(whole, one := wrap(whole, BASES[base], **settings), 13)
    first = wrap(halves, BASES[base], **settings)
    train(halves, first, at)
    second = wrap(halves, BASES[base], **settings)
    second.load_state_dict(saved(first))
    train(halves, second, 13 - at, first=at)
    assert same(whole, halves)
    assert clock(second) == clock(one) == {"steps": 13, "epochs": 4, "boundary": 12}


def test_a_boundary_that_was_saved_is_not_projected_again():
    model = net()
    opt = wrap(model)
    train(model, opt, 2)
    assert opt.end_epoch()
    again = wrap(model)
    again.load_state_dict(saved(opt))
    assert again.end_epoch() == ()


def test_the_state_holds_plain_numbers_only():
    state = wrap(net()).state_dict()
    assert type(state) is dict
    assert {type(value) for value in state["ww_pgd"].values()} == {int}
    assert {k for k in state["param_groups"][0] if k.startswith("ww_pgd")} == {
        "ww_pgd_steps",
        "ww_pgd_epochs",
        "ww_pgd_boundary",
    }


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_of_model_and_optimizer_goes_on_by_itself(clone):
    model, alone = net(), net()
    opt = wrap(model, steps_per_epoch=3)
    lr_scheduler.StepLR(opt, 100)  # hides step behind an attribute of the instance
    train(model, opt, 4)
    model2, opt2 = clone((model, opt))
    assert opt2.model is model2
    assert [id(p) for p in opt2.param_groups[0]["params"]] == [id(p) for p in model2.parameters()]
    assert same(model, model2)

    train(alone, wrap(alone, steps_per_epoch=3), 9)
    train(model2, opt2, 5, first=4)
    assert same(model2, alone)
    assert not same(model, model2)
    assert clock(opt) == {"steps": 4, "epochs": 1, "boundary": 3}
    train(model, opt, 5, first=4)
    assert same(model, alone)
    assert clock(opt) == clock(opt2) == {"steps": 9, "epochs": 3, "boundary": 9}


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy])
def test_a_copy_does_not_patch_the_class(clone):
    model, seen = net(), []
    opt = wrap(model)
    steps = WWPGD.step, torch.optim.AdamW.step
    clone(opt)
    assert (WWPGD.step, torch.optim.AdamW.step) == steps
    handle = register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(o))
    try:
        train(model, opt, 2)
    finally:
        handle.remove()
    assert seen == [opt.base] * 2


def test_hooks_are_not_copied_and_can_be_added():
    model, seen = net(), []
    opt = wrap(model)
    opt.register_step_post_hook(lambda *_: seen.append("original"))
    model2, opt2 = copy.deepcopy((model, opt))
    opt2.register_step_post_hook(lambda *_: seen.append("copy"))
    train(model2, opt2, 1)
    assert seen == ["copy"]
    train(model, opt, 1)
    assert seen == ["copy", "original"]


# Distributed checkpoints, in one process


def dcp_options(flat):
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=flat)


def dcp_get(model, opt, flat):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(model, opt, options=dcp_options(flat))


def dcp_set(model, opt, state, flat):
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(model, opt, state, options=dcp_options(flat))


FLAT = pytest.mark.parametrize("flat", [False, True], ids=["plain", "flattened"])


@FLAT
def test_a_distributed_checkpoint_creates_the_state_without_counting_a_step(flat):
    model = net()
    opt = wrap(model, steps_per_epoch=1, strength=1.0)
    before = copy.deepcopy(model)
    assert dcp_get(model, opt, flat)
    assert clock(opt) == {"steps": 0, "epochs": 0, "boundary": -1}
    assert same(model, before)


def test_a_distributed_checkpoint_of_a_model_with_frozen_parameters_counts_no_step():
    model = net()
    model[0].requires_grad_(False)
    opt = wrap(model, steps_per_epoch=1, strength=1.0)
    before = copy.deepcopy(model)
    dcp_get(model, opt, False)
    assert clock(opt) == {"steps": 0, "epochs": 0, "boundary": -1}
    assert same(model, before)


@FLAT
def test_resuming_from_a_distributed_checkpoint_is_bitwise(flat):
    whole, half, resumed = net(), net(), net(seed=1)
    train(whole, one := wrap(whole, steps_per_epoch=3), 10)
    first = wrap(half, steps_per_epoch=3)
    train(half, first, 5)
    state = copy.deepcopy(dcp_get(half, first, flat))
    resumed.load_state_dict(half.state_dict())  # a new process: there are no gradients yet
    second = wrap(resumed, steps_per_epoch=3)
    dcp_set(resumed, second, state, flat)
    assert clock(second) == {"steps": 5, "epochs": 1, "boundary": 3}
    train(resumed, second, 5, first=5)
    assert same(whole, resumed)
    assert clock(second) == clock(one)


def test_a_first_step_with_learning_rate_zero_is_a_step():
    model = net()
    opt = wrap(model)
    scheduler = lr_scheduler.LambdaLR(opt, lambda i: i / 4)  # as Hugging Face warms up
    train(model, opt, 3, after=scheduler.step)
    assert clock(opt)["steps"] == 3
