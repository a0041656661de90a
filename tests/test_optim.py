import copy
import importlib.util
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import SWALR

from ww_train import WWPGD, ManifoldProjection, Projected, Ramp, Skipped
from ww_train.steering import Failed

from .oracles import gaussian

SIZE = 24


def net(seed=0, bias=True):
    """A small network, without touching the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(SIZE, 32, bias), nn.Tanh(), nn.Linear(32, SIZE, bias))


def loss_of(model, i):
    batch = gaussian(8, SIZE, seed=i).to(next(model.parameters()).dtype)
    return (model(batch) - batch.flip(1)).square().mean()


def train(model, opt, steps, *, first=0, after=lambda: None):
    """Deterministic steps `first`, `first + 1`, ...; `after` is called behind each."""
    for i in range(first, first + steps):
        opt.zero_grad()
        loss_of(model, i).backward()
        opt.step()
        after()


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def clock(opt):
    return opt.state_dict()["ww_pgd"]


def adamw(model, **settings):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **settings)


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **settings})


def wrap(model, base=adamw, **settings):
    return WWPGD(base(model), model=model, **settings)


def weights(model):
    return [p for p in model.parameters() if p.ndim == 2]


def assert_projected(model):
    """Every layer is on the manifold: another projection would not move it."""
    for weight in weights(model):
        done = ManifoldProjection().project_(weight.detach().clone())
        assert done.distance < 1e-6


def assert_free(model):
    """No layer is anywhere near the manifold."""
    for weight in weights(model):
        assert ManifoldProjection().project_(weight.detach().clone()).distance > 0.05


# The trajectory of the base optimizer

BASES = {
    "AdamW": adamw,
    "AdamW foreach": lambda m: adamw(m, foreach=True),
    "AdamW fused": lambda m: adamw(m, fused=True),
    "Adam amsgrad": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True),
    "SGD momentum": sgd,
    "SGD nesterov": lambda m: sgd(m, nesterov=True),
    "SGD fused": lambda m: sgd(m, fused=True),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters()),
    "two groups": lambda m: torch.optim.AdamW(
        [{"params": m[0].parameters(), "lr": 1e-3}, {"params": m[2].parameters()}], lr=1e-2
    ),
}


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


# Schedulers

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 / (i + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.CosineAnnealingLR(o, 4)], [3]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "SWALR": lambda o: SWALR(o, swa_lr=0.02, anneal_epochs=4),
}


def settings_of(opt):
    """Every setting of every group; the clock that is mirrored there is none."""
    return [
        {k: v for k, v in group.items() if k != "params" and not k.startswith("ww_pgd_")}
        for group in opt.param_groups
    ]


def scheduled(model, opt, scheduler, steps=8, first=0):
    """Train with a scheduler; the groups' settings after each step."""
    trace = []

    def advance():
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
        trace.append(settings_of(opt))

    train(model, opt, steps, first=first, after=advance)
    return trace


def test_no_scheduler_is_forgotten():
    classes = [getattr(lr_scheduler, name) for name in lr_scheduler.__all__]
    assert {c.__name__ for c in classes} - {"LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.parametrize("base", [adamw, sgd])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_on_the_wrapper_does_what_it_does_on_the_base(name, base):
    bare, wrapped = net(), net()
    reference, opt = base(bare), wrap(wrapped, base)
    expected = scheduled(bare, reference, SCHEDULERS[name](reference))
    assert scheduled(wrapped, opt, SCHEDULERS[name](opt)) == expected
    assert len({str(settings) for settings in expected}) > 1  # it did change something
    assert same(bare, wrapped)
    assert settings_of(opt.base) == expected[-1]


@pytest.mark.parametrize(("name", "key"), [("OneCycleLR", "betas"), ("CyclicLR", "momentum")])
def test_schedulers_that_write_more_than_the_learning_rate(name, key):
    model = net()
    opt = wrap(model, adamw if key == "betas" else sgd)
    before = opt.base.param_groups[0][key]
    scheduled(model, opt, SCHEDULERS[name](opt), 2)
    assert opt.base.param_groups[0][key] != before


def test_a_scheduler_made_before_the_wrap():
    bare, wrapped = net(), net()
    reference, base = adamw(bare), adamw(wrapped)
    scheduler = lr_scheduler.StepLR(base, 2)
    opt = WWPGD(base, model=wrapped)
    expected = scheduled(bare, reference, lr_scheduler.StepLR(reference, 2))
    assert scheduled(wrapped, opt, scheduler) == expected
    assert same(bare, wrapped)
    assert clock(opt)["steps"] == 8


@pytest.mark.parametrize("name", ["OneCycleLR", "CosineAnnealingLR", "SequentialLR"])
def test_a_scheduler_made_before_the_state_is_loaded(name):
    whole, halves = net(), net()
    opt = wrap(whole, steps_per_epoch=3)
    expected = scheduled(whole, opt, SCHEDULERS[name](opt), 10)

    first = wrap(halves, steps_per_epoch=3)
    scheduler = SCHEDULERS[name](first)
    trace = scheduled(halves, first, scheduler, 5)
    second = wrap(halves, steps_per_epoch=3)
    resumed = SCHEDULERS[name](second)
    second.load_state_dict(first.state_dict())  # rebinds groups and state of the base
    resumed.load_state_dict(scheduler.state_dict())
    trace += scheduled(halves, second, resumed, 5, first=5)
    assert trace == expected
    assert same(whole, halves)


# Mixed precision and clipping


def scaled_steps(model, opt, steps, bad=(), clip=None):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for i in range(steps):
        opt.zero_grad()
        scaler.scale(loss_of(model, i)).backward()
        if i in bad:
            next(model.parameters()).grad[0] = math.inf
        if clip is not None:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(opt)
        scaler.update()
    return scaler.get_scale()


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("base", ["AdamW", "SGD momentum", "AdamW fused", "SGD fused"])
def test_a_step_that_the_grad_scaler_skips_is_not_counted(base, clip):
    bare, wrapped = net(), net()
    opt = wrap(wrapped, BASES[base])
    expected = scaled_steps(bare, BASES[base](bare), 8, bad=(2, 5), clip=clip)
    assert scaled_steps(wrapped, opt, 8, bad=(2, 5), clip=clip) == expected
    assert same(bare, wrapped)
    assert clock(opt)["steps"] == 6


def test_skipped_steps_do_not_bring_the_projection_forward():
    model = net()
    opt = wrap(model, steps_per_epoch=3, strength=1.0)
    scaled_steps(model, opt, 4, bad=(0, 1))
    assert clock(opt) == {"steps": 2, "epochs": 0, "boundary": -1}
    scaled_steps(model, opt, 1)
    assert clock(opt) == {"steps": 3, "epochs": 1, "boundary": 3}
    assert_projected(model)


def test_clipping_sees_the_same_gradients():
    bare, wrapped = net(), net()
    for model, opt in ((bare, sgd(bare)), (wrapped, wrap(wrapped, sgd))):
        for i in range(4):
            opt.zero_grad()
            loss_of(model, i).backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.01)
            opt.step()
    assert same(bare, wrapped)


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


# Other people's wrappers


def test_a_compiled_model_sees_the_projection():
    model = net()
    compiled = torch.compile(model, backend="eager")
    opt = WWPGD(adamw(compiled), model=compiled, strength=1.0)
    x = gaussian(4, SIZE)
    before = compiled(x)
    train(compiled, opt, 1)
    names = [result.name for result in opt.end_epoch()]
    assert names == ["0", "2"]
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), before)
    assert_projected(model)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_step_counts_and_projects():
    bare, wrapped = net(), net()
    opt = wrap(wrapped, strength=1.0)
    for model, optimizer in ((bare, adamw(bare)), (wrapped, opt)):
        step = torch.compile(optimizer.step, backend="eager")  # rounds differently from AdamW.step
        for i in range(3):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            step()
    assert same(bare, wrapped)
    assert clock(opt)["steps"] == 3
    assert len(opt.end_epoch()) == 2
    assert_projected(wrapped)


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield accelerate.Accelerator(cpu=True)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def test_accelerate(accelerator):
    bare, wrapped = net(), net()
    reference, opt = adamw(bare), wrap(wrapped, strength=1.0)
    expected = scheduled(bare, reference, lr_scheduler.StepLR(reference, 2))
    model, prepared, scheduler = accelerator.prepare(wrapped, opt, lr_scheduler.StepLR(opt, 2))
    assert prepared.optimizer is opt
    trace = []
    for i in range(8):
        prepared.zero_grad()
        accelerator.backward(loss_of(model, i))
        prepared.step()
        scheduler.step()
        trace.append([group["lr"] for group in prepared.param_groups])
    assert trace == [[group["lr"] for group in groups] for groups in expected]
    assert same(bare, wrapped)
    assert clock(opt)["steps"] == 8
    assert opt.end_epoch()
    assert_projected(model)


def test_the_proxy_of_lightning_shares_the_clock():
    pytest.importorskip("lightning")
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = net()
    opt = wrap(model, strength=1.0)
    train(model, opt, 2)
    proxy = LightningOptimizer(opt)
    assert len(proxy.end_epoch()) == 2
    assert clock(opt) == {"steps": 2, "epochs": 1, "boundary": 2}
    assert opt.end_epoch() == proxy.end_epoch() == ()
    assert_projected(model)


def test_fabric():
    fabric_module = pytest.importorskip("lightning.fabric")
    bare, wrapped = net(), net()
    train(bare, adamw(bare), 4)
    opt = wrap(wrapped, strength=1.0)
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    model, prepared = fabric.setup(wrapped, opt)
    for i in range(4):
        prepared.zero_grad()
        fabric.backward(loss_of(model, i))
        prepared.step()
    assert same(bare, wrapped)
    assert clock(opt)["steps"] == 4
    assert prepared.state_dict()["ww_pgd"]["steps"] == 4
    assert [type(result) for result in prepared.end_epoch()] == [Projected, Projected]
    assert opt.end_epoch() == ()
    assert_projected(wrapped)


@pytest.mark.skipif(
    importlib.util.find_spec("schedulefree") is None, reason="schedulefree is not installed"
)
def test_schedule_free_weights_are_projected_where_they_are_used():
    from schedulefree import AdamWScheduleFree

    bare, wrapped = net(), net()
    reference = AdamWScheduleFree(bare.parameters(), lr=1e-2)
    opt = wrap(wrapped, lambda m: AdamWScheduleFree(m.parameters(), lr=1e-2), strength=1.0)
    for model, optimizer in ((bare, reference), (wrapped, opt)):
        optimizer.train()
        train(model, optimizer, 5)
    assert same(bare, wrapped)
    assert len(opt.end_epoch()) == 2
    assert opt.param_groups[0]["train_mode"]
    train(wrapped, opt, 1)  # goes on in train mode
    opt.base.eval()
    before = copy.deepcopy(wrapped)
    opt.base.train()
    opt.end_epoch()
    opt.base.eval()
    assert not same(wrapped, before)
    for weight in weights(wrapped):
        assert ManifoldProjection().project_(weight.detach().clone()).distance < 1e-4


# The end of an epoch


def test_end_epoch_projects_every_target_and_returns_what_it_did():
    model = nn.Sequential(nn.Embedding(30, SIZE), *net(), nn.Linear(SIZE, 4))
    opt = WWPGD(adamw(model), model=model, strength=1.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    embedding, first, last, head = opt.end_epoch()
    assert embedding == Skipped("0", "an embedding, or tied to one")
    assert head == Skipped("4", "4 eigenvalues, fewer than min_evals=20")
    assert (first.name, last.name) == ("1", "3")
    for done in (first, last):
        assert done.strength == 1.0
        assert done.distance > 0.05
    assert_projected(model[1:4])


def test_end_epoch_is_idempotent_until_the_next_step():
    model = net()
    opt = wrap(model)
    train(model, opt, 2)
    assert len(opt.end_epoch()) == 2
    after = copy.deepcopy(model)
    assert opt.end_epoch() == ()
    assert opt.end_epoch() == ()
    assert same(model, after)
    assert clock(opt) == {"steps": 2, "epochs": 1, "boundary": 2}
    train(model, opt, 1)
    assert len(opt.end_epoch()) == 2
    assert clock(opt) == {"steps": 3, "epochs": 2, "boundary": 3}


def test_end_epoch_before_the_first_step():
    model = net()
    opt = wrap(model, strength=1.0)
    assert len(opt.end_epoch()) == 2  # the weights one starts with may be projected
    assert opt.end_epoch() == ()
    assert_projected(model)


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 5])
def test_steps_per_epoch(steps_per_epoch):
    automatic, by_hand = net(), net()
    opt, other = wrap(automatic, steps_per_epoch=steps_per_epoch), wrap(by_hand)
    train(automatic, opt, 11)
    for first in range(0, 11, steps_per_epoch):
        steps = min(steps_per_epoch, 11 - first)
        train(by_hand, other, steps, first=first)
        if steps == steps_per_epoch:
            other.end_epoch()
    assert same(automatic, by_hand)
    assert clock(opt) == clock(other)
    assert clock(opt)["epochs"] == 11 // steps_per_epoch


def test_steps_per_epoch_and_a_trainer_that_also_ends_the_epoch():
    model, opt = (m := net()), wrap(m, steps_per_epoch=4)
    train(model, opt, 4)
    assert opt.end_epoch() == ()
    assert clock(opt)["epochs"] == 1


def test_strengths_of_the_default_ramp():
    model = net()
    opt = wrap(model)
    strengths = []
    for epoch in range(8):
        train(model, opt, 1, first=epoch)
        strengths.append({result.strength for result in opt.end_epoch()})
    assert strengths == [{min(1.0, (epoch + 1) / 6)} for epoch in range(8)]
    assert_projected(model)


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (Ramp(), [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 1.0]),
        (Ramp(2), [0.5, 1.0, 1.0]),
        (Ramp(1), [1.0, 1.0]),
    ],
)
def test_ramp(ramp, expected):
    assert [ramp(epoch) for epoch in range(len(expected))] == pytest.approx(expected)
    assert ramp(10**6) == 1.0


@pytest.mark.parametrize("epochs", [0, -3])
def test_a_ramp_needs_an_epoch(epochs):
    with pytest.raises(ValueError, match="at least one epoch"):
        Ramp(epochs)


def test_strength_may_be_any_function_of_the_epoch():
    model, asked = net(), []

    def strength(epoch):
        asked.append(epoch)
        return 0.25

    opt = wrap(model, strength=strength)
    for epoch in range(3):
        train(model, opt, 2, first=2 * epoch)
        assert [result.strength for result in opt.end_epoch()] == [0.25, 0.25]
        opt.end_epoch()
    assert asked == [0, 1, 2]


def test_another_projection():
    model = net()
    opt = wrap(model, strength=1.0, projection=ManifoldProjection(alpha=3.0, min_evals=10))
    train(model, opt, 1)
    for result in opt.end_epoch():
        assert result.alpha == pytest.approx(3.0, abs=1e-6)
        assert result.ERG_gap == 0


class Halving:
    """A projection of one's own that writes to the parameter itself."""

    def project_(self, matrix, strength):
        matrix.parameter.mul_(1 - strength / 2)
        return Skipped(matrix.name, "only halved")


@pytest.mark.filterwarnings("ignore:WWPGD projects no layer")
def test_a_projection_of_ones_own_needs_no_guard_against_autograd():
    model = net()
    before = [weight.detach().clone() for weight in weights(model)]
    results = wrap(model, projection=Halving(), strength=0.5, strict=True).end_epoch()
    assert [result.reason for result in results] == ["only halved"] * 2
    for weight, old in zip(weights(model), before, strict=True):
        assert torch.equal(weight, 0.75 * old)


def test_weights_change_in_place():
    model = net()
    opt = wrap(model, strength=1.0)
    train(model, opt, 2)
    parameters = list(model.parameters())
    addresses = [p.data_ptr() for p in parameters]
    groups = [p for group in opt.param_groups for p in group["params"]]
    grads = [p.grad.clone() for p in parameters]
    moments = [opt.state[p]["exp_avg"].clone() for p in parameters]
    opt.end_epoch()
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(parameters, groups, strict=True))
    assert [p.data_ptr() for p in parameters] == addresses
    assert all(p.requires_grad and p.is_leaf for p in parameters)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, grads, strict=True))
    assert all(
        torch.equal(opt.state[p]["exp_avg"], m) for p, m in zip(parameters, moments, strict=True)
    )
    assert_projected(model)


def test_biases_are_left_alone():
    model = net()
    opt = wrap(model, strength=1.0)
    train(model, opt, 2)
    before = [model[0].bias.clone(), model[2].bias.clone()]
    opt.end_epoch()
    assert torch.equal(model[0].bias, before[0])
    assert torch.equal(model[2].bias, before[1])


def test_the_global_generator_is_untouched():
    model = net()
    opt = wrap(model)
    train(model, opt, 2)
    state = torch.get_rng_state()
    opt.end_epoch()
    opt.state_dict()
    assert torch.equal(torch.get_rng_state(), state)


def test_end_epoch_under_inference_and_no_grad():
    model = net()
    opt = wrap(model, strength=1.0)
    train(model, opt, 1)
    with torch.no_grad():
        assert len(opt.end_epoch()) == 2
    loss_of(model, 0).backward()
    assert_projected(model)


def test_without_a_model_names_come_from_the_optimizer():
    model = net()
    named = WWPGD(torch.optim.AdamW(model.named_parameters()), strength=1.0)
    nameless = WWPGD(adamw(model), strength=1.0)
    named.step()
    nameless.step()
    assert [result.name for result in named.end_epoch()] == ["0", "2"]
    assert [result.name for result in nameless.end_epoch()] == ["group0.param0", "group0.param2"]


# What goes wrong


def collect(function):
    """The warnings that a call gives, as strings, and its result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return [str(w.message) for w in caught], result


def epoch(model, opt):
    train(model, opt, 1)
    return collect(opt.end_epoch)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_step_of_half_precision_weights_is_kept_on_average(dtype):
    start = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact, stepped = start.double(), start.clone()
    ManifoldProjection().project_(exact, 1e-4)
    ManifoldProjection().project_(stepped, 1e-4)
    step, taken = exact - start.double(), stepped.double() - start.double()
    nearest = exact.to(dtype).double() - start.double()
    whole = float(step.square().sum())
    assert float((nearest * step).sum()) < 0.5 * whole  # rounded to the nearest it is lost
    assert float((taken * step).sum()) == pytest.approx(whole, rel=0.15)
    again = start.clone()
    ManifoldProjection().project_(again, 1e-4)
    assert torch.equal(again, stepped)


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
