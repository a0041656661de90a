import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from ww_train import WWPGD

from .training import (
    BASES,
    adamw,
    assert_projected,
    clock,
    loss_of,
    net,
    same,
    scheduled,
    settings_of,
    sgd,
    train,
    wrap,
)

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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_made_before_the_wrap(name):
    bare, wrapped = net(), net()
    reference, base = adamw(bare), adamw(wrapped)
    scheduler = SCHEDULERS[name](base)
    opt = WWPGD(base, model=wrapped)
    expected = scheduled(bare, reference, SCHEDULERS[name](reference))
    assert scheduled(wrapped, opt, scheduler) == expected
    assert same(bare, wrapped)
    assert clock(opt)["steps"] == 8


@pytest.mark.parametrize("name", SCHEDULERS)
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
    resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    trace += scheduled(halves, second, resumed, 5, first=5)
    assert trace == expected
    assert same(whole, halves)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_made_after_the_state_is_loaded(name):
    bare, wrapped = net(), net()
    reference, opt = adamw(bare), wrap(wrapped)
    for model, optimizer in ((bare, reference), (wrapped, opt)):
        train(model, optimizer, 3)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = scheduled(bare, reference, SCHEDULERS[name](reference), first=3)
    assert scheduled(wrapped, opt, SCHEDULERS[name](opt), first=3) == expected
    assert same(bare, wrapped)
    assert clock(opt)["steps"] == 11


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
