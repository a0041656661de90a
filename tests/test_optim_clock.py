import copy

import pytest
import torch
from torch import nn

from ww_train import WWPGD, ManifoldProjection, Projected, Ramp, Skipped
from ww_train.steering.optim import LONG_EPOCH

from .training import SIZE, adamw, assert_projected, clock, loss_of, net, same, train, weights, wrap

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


# Every few epochs, every few steps


def boundaries(model, opt, epochs, steps=2):
    """Which epochs ended with a projection, and at what strength."""
    done = {}
    for i in range(epochs):
        train(model, opt, steps, first=steps * i)
        results = opt.end_epoch()
        if results:
            done[i] = results[0].strength
    return done


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [0, 1, 2, 3, 4, 5, 6]), (2, [1, 3, 5]), (3, [2, 5]), (9, [])]
)
def test_every_few_epochs(every, expected):
    asked = []

    def strength(boundary):
        asked.append(boundary)
        return boundary / 10

    model = net()
    opt = wrap(model, strength=strength, every_n_epochs=every)
    assert boundaries(model, opt, 7) == {i: i / 10 for i in expected}
    assert asked == expected
    assert clock(opt) == {"steps": 14, "epochs": 7, "boundary": 14}


def test_a_boundary_at_which_nothing_is_due_leaves_the_weights():
    model, bare = net(), net()
    opt = wrap(model, strength=1.0, every_n_epochs=2)
    train(bare, adamw(bare), 4)
    train(model, opt, 4)
    assert opt.end_epoch() == ()
    assert same(model, bare)
    train(model, opt, 1, first=4)
    assert len(opt.end_epoch()) == 2
    assert_projected(model)


def test_every_few_steps():
    model, by_hand = net(), net()
    opt = wrap(model, strength=Ramp(3), every_n_steps=4)
    other = wrap(by_hand, strength=Ramp(3))
    for i in range(11):
        train(model, opt, 1, first=i)
        train(by_hand, other, 1, first=i)
        expected = other.end_epoch() if i % 4 == 3 else ()
        results = opt.end_epoch()  # projects nothing by itself
        assert [r.strength for r in results] == [r.strength for r in expected]
        assert opt.end_epoch() == results
        assert same(model, by_hand)
    assert clock(opt) == {"steps": 11, "epochs": 2, "boundary": 8}


def test_every_step_and_one_layer():
    model = net()
    opt = wrap(model, strength=1.0, every_n_steps=1, include="0")
    for i in range(3):
        train(model, opt, 1, first=i)
        assert_projected(model[:1])
        assert [type(result) for result in opt.projected] == [Projected, Skipped]


def test_with_steps_the_end_of_an_epoch_before_the_first_step_does_nothing():
    model = net()
    opt = wrap(model, strength=1.0, every_n_steps=2)
    assert opt.end_epoch() == ()
    assert same(model, net())


def test_a_closure_counts_as_one_step():
    model = net()
    opt = wrap(model, every_n_steps=2)

    def closure():
        opt.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.projected == ()
    opt.step(closure)
    assert len(opt.projected) == 2


def test_accumulated_gradients_are_one_step():
    bare, model = net(), net()
    opt = wrap(model, every_n_steps=3, strength=0.0)
    for m, o in ((bare, adamw(bare)), (model, opt)):
        for i in range(12):
            (loss_of(m, i) / 4).backward()
            if i % 4 == 3:
                o.step()
                o.zero_grad()
    assert same(bare, model)
    assert clock(opt) == {"steps": 3, "epochs": 1, "boundary": 3}


def test_steps_that_the_grad_scaler_skips_are_not_counted():
    model = net()
    opt = wrap(model, every_n_steps=2, strength=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i in range(3):
        opt.zero_grad()
        scaler.scale(loss_of(model, i)).backward()
        if i == 1:
            model[0].weight.grad[0] = torch.inf
        scaler.step(opt)
        scaler.update()
        assert len(opt.projected) == 2 * (i == 2)
    assert clock(opt) == {"steps": 2, "epochs": 1, "boundary": 2}


def test_the_probe_of_a_distributed_checkpoint_projects_nothing():
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = net()
    opt = wrap(model, every_n_steps=1, strength=1.0)
    checkpoint.get_optimizer_state_dict(model, opt)
    assert same(model, net())
    assert clock(opt) == {"steps": 0, "epochs": 0, "boundary": -1}
    assert opt.projected == ()


CLOCKS = [
    {},
    {"every_n_epochs": 3},
    {"every_n_steps": 3},
    {"steps_per_epoch": 3},
    {"steps_per_epoch": 2, "every_n_epochs": 2},
]


def loop(model, opt, first, last):
    """Steps with epochs of four, in a loop that knows nothing of the options."""
    for i in range(first, last):
        train(model, opt, 1, first=i)
        if i % 4 == 3 and not (opt.steps_per_epoch or opt.every_n_steps):
            opt.end_epoch()


@pytest.mark.parametrize("at", [1, 5, 6, 8, 11])
@pytest.mark.parametrize("settings", CLOCKS, ids=str)
@pytest.mark.parametrize("through", ["wrapper", "bare"])
def test_resuming_in_the_middle_keeps_the_phase(settings, at, through):
    settings = {"strength": Ramp(4), **settings}
    whole, halves, resumed = net(), net(), net(seed=1)
    loop(whole, one := wrap(whole, **settings), 0, 17)
    first = wrap(halves, **settings)
    loop(halves, first, 0, at)
    state = copy.deepcopy(first.state_dict())
    if through == "bare":
        del state["ww_pgd"]  # what distributed checkpoints keep
    resumed.load_state_dict(halves.state_dict())
    second = wrap(resumed, **settings)
    second.load_state_dict(state)
    loop(resumed, second, at, 17)
    assert same(whole, resumed)
    assert clock(second) == clock(one)
    assert clock(one)["epochs"] >= 4


@pytest.mark.parametrize(
    "settings",
    [
        {"every_n_steps": 3, "every_n_epochs": 2},
        {"every_n_steps": 3, "steps_per_epoch": 3},
        {"every_n_steps": 3, "every_n_epochs": 2, "steps_per_epoch": 3},
    ],
    ids=str,
)
def test_options_that_contradict(settings):
    with pytest.raises(
        ValueError, match="every_n_steps= counts steps and takes the place of epochs"
    ):
        wrap(net(), **settings)


@pytest.mark.parametrize("name", ["every_n_epochs", "every_n_steps", "steps_per_epoch"])
@pytest.mark.parametrize("number", [0, -1])
def test_numbers_of_steps_and_epochs_are_positive(name, number):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {number}"):
        wrap(net(), **{name: number})


@pytest.mark.parametrize("name", ["every_n_epochs", "every_n_steps", "steps_per_epoch"])
@pytest.mark.parametrize("number", [2.5, "3", [2]])
def test_numbers_of_steps_and_epochs_are_whole(name, number):
    with pytest.raises(TypeError, match=f"{name} must be a whole number, got"):
        wrap(net(), **{name: number})


# What was done last


def test_what_was_done_stays_until_the_next_projection():
    model = net()
    opt = wrap(model, every_n_epochs=2)
    assert opt.projected == ()
    train(model, opt, 1)
    opt.end_epoch()
    assert opt.projected == ()
    train(model, opt, 1)
    results = opt.end_epoch()
    assert opt.projected is results
    train(model, opt, 1)
    assert opt.end_epoch() == ()
    assert opt.projected is results


@pytest.mark.filterwarnings("ignore:no projection at boundary")
@pytest.mark.parametrize("settings", [{}, {"every_n_steps": 1}])
def test_nothing_was_done_where_the_schedule_failed(settings):
    model = net()
    opt = wrap(model, strength=[0.5, 2.0, 0.5].__getitem__, **settings)
    done = []
    for i in range(3):
        train(model, opt, 1, first=i)
        done.append((len(opt.end_epoch()), len(opt.projected)))
    assert done == [(2, 2), (0, 0), (2, 2)]


def test_nothing_was_done_after_a_load():
    model = net()
    opt = wrap(model, every_n_steps=2)
    train(model, opt, 2)
    state = copy.deepcopy(opt.state_dict())
    assert len(opt.end_epoch()) == 2
    opt.load_state_dict(state)
    assert opt.projected == opt.end_epoch() == ()


def test_a_refusal_does_not_use_the_boundary_up():
    model = net()
    opt = wrap(model, strength=1.0)
    train(model, opt, 1)
    opt.param_groups[0]["params"][0].ds_id = 0
    with pytest.raises(RuntimeError, match="DeepSpeed has taken the parameters over"):
        opt.end_epoch()
    assert clock(opt) == {"steps": 1, "epochs": 0, "boundary": -1}
    del opt.param_groups[0]["params"][0].ds_id
    assert len(opt.end_epoch()) == 2


# A loop that ends no epoch


def almost(model, **settings):
    """A wrapper that has one step to go until it says that no epoch was ended."""
    opt = wrap(model, **settings)
    train(model, opt, 1)
    state = opt.state_dict()
    opt.load_state_dict({**state, "ww_pgd": clock(opt) | {"steps": LONG_EPOCH - 1}})
    return opt


def test_a_loop_that_ends_no_epoch_is_told_once():
    model = net()
    opt = almost(model)
    with pytest.warns(
        UserWarning, match=r"10,000 steps and projected nothing.*end_epoch\(\)"
    ) as told:
        train(model, opt, 1)
    assert len(told) == 1
    assert told[0].filename.endswith("training.py")
    train(model, opt, 3)
    assert len(opt.end_epoch()) == 2


@pytest.mark.parametrize("settings", [{"every_n_steps": 10**5}, {"steps_per_epoch": 10**5}])
def test_long_epochs_that_were_asked_for_are_no_mistake(settings):
    model = net()
    train(model, almost(model, **settings), 3)  # warnings are errors


def test_a_loop_that_has_ended_an_epoch_knows_how():
    model = net()
    opt = almost(model, every_n_epochs=2)
    assert opt.end_epoch() == ()
    train(model, opt, 3)
    assert clock(opt)["steps"] == LONG_EPOCH + 2
