"""Models that two processes hold. What runs on both ranks stands first in each section."""

import copy
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ww_train import WWPGD, ManifoldProjection, Projected
from ww_train.ranks import deal, gather
from ww_train.steering import replicas
from ww_train.steering.momentum import project, reset
from ww_train.steering.replicas import project_replicas_
from ww_train.steering.tasks import Failed

from .oracles import gaussian
from .pair import Pair, devices_at_gather
from .test_steering import Halfway, tasks_of
from .training import SIZE, collect, net, sgd, weights

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform == "win32",
    reason="needs torch.distributed with gloo",
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


class Counting(ManifoldProjection):
    """Notes which layers this process projects."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "names", [])

    def project_(self, matrix, strength=1.0, *, then=None):
        self.names.append(matrix.name)
        return super().project_(matrix, strength, then=then)


def deep(dtype=torch.float64):
    """Layers of several kinds and sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {
                "attention": nn.MultiheadAttention(SIZE, 2),
                "conv": nn.Conv2d(20, 22, 3),
                "large": nn.Linear(60, 50),
                "small": nn.Linear(20, 25),
                "gates": nn.LSTM(20, 20),
                "norm": nn.LayerNorm(20),
            }
        )
    return model.to(dtype)


def numbers(tensors):
    """Tensors as arrays that can be sent and compared bit for bit."""
    return [t.detach().clone().view(-1).view(torch.uint8).numpy() for t in tensors]


def assert_equal(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def digest(results):
    return [(type(result).__name__, result.name) for result in results]


# Training with DistributedDataParallel


def batch(i):
    return gaussian(8, SIZE, i, torch.float64)


def fit(model, opt, share, steps=7):
    for i in range(steps):
        opt.zero_grad()
        x = batch(i)[share]
        (model(x) - x.flip(1)).square().mean().backward()
        opt.step()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def zero(model):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-2, weight_decay=0.01
    )


def ddp_training(base, settings):
    model = nn.parallel.DistributedDataParallel(net().double())
    counting = Counting()
    opt = WWPGD(
        base(model),
        model=model,
        projection=counting,
        steps_per_epoch=3,
        strength=0.8,
        replicas=dist.group.WORLD,
        strict=True,
        **settings,
    )
    rank = dist.get_rank()
    fit(model, opt, slice(4 * rank, 4 * rank + 4))
    inner = getattr(opt.base, "optim", opt.base)
    momentum = [inner.state.get(p, {}).get("exp_avg") for p in model.parameters()]
    return (
        numbers(model.parameters()),
        numbers([m for m in momentum if m is not None]),
        counting.names,
        digest(opt.projected),
        [p.detach().tolist() for p in model.parameters()],
    )


@pytest.mark.parametrize("settings", [{}, {"momentum": project}, {"momentum": reset}])
def test_replicas_stay_equal_and_train_as_one_process_does(pair, settings):
    first, second = pair(ddp_training, adamw, settings)
    assert_equal(first[0], second[0])
    assert_equal(first[1], second[1])
    assert first[3] == second[3] == [("Projected", "0"), ("Projected", "2")]
    model = net().double()
    opt = WWPGD(adamw(model), model=model, steps_per_epoch=3, strength=0.8, **settings)
    fit(model, opt, slice(None))
    for p, values in zip(model.parameters(), first[4], strict=True):
        torch.testing.assert_close(p.detach(), torch.tensor(values).double(), rtol=0, atol=1e-6)


def test_each_rank_projects_its_own_share(pair):
    first, second = pair(ddp_training, adamw, {})
    assert len(first[2]) == len(second[2]) == 2  # one layer at each of two boundaries
    assert {*first[2], *second[2]} == {"0", "2"}
    assert not set(first[2]) & set(second[2])


def test_the_optimizer_may_be_sharded(pair):
    first, second = pair(ddp_training, zero, {})
    plain, _ = pair(ddp_training, adamw, {})
    assert_equal(first[0], second[0])
    assert_equal(first[0], plain[0])


def without_effect():
    model = nn.parallel.DistributedDataParallel(net().double())
    opt = WWPGD(zero(model), model=model, momentum=reset, replicas=dist.group.WORLD)
    fit(model, opt, slice(None), 1)
    messages, results = collect(opt.end_epoch)
    opt.consolidate_state_dict(to=0)
    state = opt.state_dict() if dist.get_rank() == 0 else None
    return messages, digest(results), state and (state["ww_pgd"], len(state["state"]))


def test_momentum_that_is_sharded_is_not_changed_and_that_is_said(pair):
    (messages, results, state), (others, *_) = pair(without_effect)
    assert len(messages) == len(others) == 1
    assert messages[0].startswith("momentum= changes nothing")
    assert results == [("Projected", "0"), ("Projected", "2")]
    assert state == ({"steps": 1, "epochs": 1, "boundary": 1}, 4)


# Many layers


def shares(dtype):
    model = deep(dtype)
    counting = Counting()
    opt = WWPGD(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        model=model,
        projection=counting,
        strength=1.0,
        momentum=project,
        replicas=dist.group.WORLD,
    )
    for i, p in enumerate(model.parameters()):
        p.grad = gaussian(p.numel(), 1, i, dtype).view_as(p)
    opt.step()
    results = opt.end_epoch()
    momentum = [opt.state[p]["momentum_buffer"] for p in model.parameters()]
    names = [t.matrix.name for t in tasks_of(model)]
    return numbers(model.parameters()), numbers(momentum), counting.names, digest(results), names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_matrices_and_momenta_are_sent(pair, dtype):
    first, second = pair(shares, dtype)
    assert_equal(first[0], second[0])
    assert_equal(first[1], second[1])
    assert first[3] == second[3]
    assert len(first[3]) == 15  # q, k, v, the output, a convolution, two layers, twice four gates
    assert sorted(first[2] + second[2]) == sorted(first[4])
    assert min(len(first[2]), len(second[2])) >= 2


def owners_of_parts(dtype):
    return [n for n in shares(dtype)[2] if n.startswith("attention.in_proj_weight")]


def test_the_parts_of_a_parameter_belong_to_one_rank(pair):
    assert sorted(map(len, pair(owners_of_parts, torch.float32))) == [0, 3]


def transposed():
    model = nn.Linear(30, 40, bias=False)
    model.weight = nn.Parameter(gaussian(30, 40).mT)
    other = nn.Conv2d(20, 24, 3).to(memory_format=torch.channels_last)
    with torch.no_grad():
        other.weight.copy_(gaussian(24, 180).view(24, 20, 3, 3))
    both = nn.ModuleList([model, other])
    results = project_replicas_(tasks_of(both), 1.0, dist.group.WORLD)
    return numbers(p.contiguous() for p in both.parameters() if p.ndim > 1), digest(results)


def test_weights_of_any_layout_are_sent(pair):
    first, second = pair(transposed)
    assert_equal(first[0], second[0])
    assert first[1] == [("Projected", "0"), ("Projected", "1")]


def in_a_subgroup():
    group = dist.new_group([1])
    if dist.get_rank() == 0:
        return None
    model = net()
    results = project_replicas_(tasks_of(model), 1.0, group)
    left = [ManifoldProjection().project_(w.detach().clone()).distance for w in weights(model)]
    return digest(results), max(left)


def test_a_group_may_be_a_part_of_all(pair):
    nothing, (results, distance) = pair(in_a_subgroup)
    assert nothing is None
    assert results == [("Projected", "0"), ("Projected", "2")]
    assert distance < 1e-6


def gathered():
    return gather({"rank": dist.get_rank()}, dist.group.WORLD), deal([3, 1, 1, 1], 2)


def test_gather_keeps_the_order_of_the_ranks(pair):
    first, second = pair(gathered)
    assert first == second
    assert first[0] == [{"rank": 0}, {"rank": 1}]


def devices():
    with devices_at_gather(replicas) as seen:
        project_replicas_(tasks_of(net()), 1.0, dist.group.WORLD)
    return seen


def test_what_is_sent_goes_through_the_device_of_the_layers(pair):
    assert pair(devices) == [[{"cpu"}] * 2] * 2


def copied():
    model = net()
    opt = WWPGD(sgd(model), model=model, replicas=dist.group.WORLD)
    twin = copy.deepcopy(opt)
    return twin.replicas is opt.replicas


def test_a_copy_shares_the_group(pair):
    assert pair(copied) == [True, True]


def where_needed():
    rank = dist.get_rank()
    model = net()

    def when(layer):
        return 1 / 0 if layer.name == "2" else rank == 0  # the first rank's answer holds

    opt = WWPGD(sgd(model), model=model, strength=1.0, when=when, replicas=dist.group.WORLD)
    messages, results = collect(opt.end_epoch)
    return digest(results), messages, numbers(weights(model))


def test_the_ranks_agree_on_what_is_needed(pair):
    first, second = pair(where_needed)
    assert first[:2] == second[:2]
    assert first[0] == [("Projected", "0"), ("Failed", "2")]
    assert "when= failed: ZeroDivisionError" in first[1][0]
    assert_equal(first[2], second[2])


# What goes wrong


class OnRankOne(ManifoldProjection):
    """Fails in one process only."""

    def project_(self, matrix, strength=1.0, *, then=None):
        done = super().project_(matrix, strength, then=then)
        if dist.get_rank() == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return done


def failing(strict):
    model = net()
    opt = WWPGD(
        sgd(model),
        model=model,
        projection=OnRankOne(),
        strength=1.0,
        replicas=dist.group.WORLD,
        strict=strict,
    )
    before = numbers(weights(model))
    try:
        messages, results = collect(opt.end_epoch)
    except Exception as error:
        return type(error).__name__, str(error), numbers(weights(model)), before
    return messages, digest(results), numbers(weights(model)), before


def test_a_layer_that_fails_on_one_rank_fails_on_all(pair):
    first, second = pair(failing, False)
    assert_equal(first[2], second[2])
    assert first[:2] == second[:2]
    messages, results = first[:2]
    assert sorted(kind for kind, _ in results) == ["Failed", "Projected"]
    assert len(messages) == 1
    assert "did not converge" in messages[0]
    for (kind, _), now, before in zip(results, first[2], first[3], strict=True):
        assert np.array_equal(now, before) == (kind == "Failed")


def test_a_failure_on_one_rank_raises_on_all_if_strict(pair):
    for name, message, *_ in pair(failing, True):
        assert name == "RuntimeError"
        assert "LinAlgError: did not converge" in message


class Local(Exception):  # noqa: N818
    """An exception that cannot be sent."""

    def __reduce__(self):
        raise TypeError("cannot be pickled")


def unsendable():
    model = net()
    outcomes = project_replicas_(
        tasks_of(model, Halfway("0", "2", error=Local)), 1.0, dist.group.WORLD
    )
    return [isinstance(o, Failed) for o in outcomes], [o.reason for o in outcomes]


def test_an_exception_that_cannot_be_sent(pair):
    first, second = pair(unsendable)
    assert first == second
    assert first == ([True, True], ["the projection failed: Local: broke off"] * 2)


def momentum_that_fails():
    def policy(momentum, operator):
        raise RuntimeError("the policy broke")

    model = net()
    opt = WWPGD(sgd(model), model=model, momentum=policy, replicas=dist.group.WORLD)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    before = numbers(weights(model))
    results = opt.end_epoch()
    return digest(results), before, numbers(weights(model))


def test_a_momentum_policy_that_fails_leaves_the_replicas_equal(pair):
    for results, before, after in pair(momentum_that_fails):
        assert results == [("Failed", "0"), ("Failed", "2")]
        assert_equal(before, after)


def different(what, strict):
    rank = dist.get_rank()
    layers = list(net()) + ([nn.Linear(SIZE, SIZE)] if what == "model" and rank else [])
    model = nn.Sequential(*layers)
    strengths = {"strength": [0.5, 0.75], "schedule": [0.5, None]}.get(what, [0.5, 0.5])
    opt = WWPGD(
        sgd(model),
        strength=lambda boundary: strengths[rank],
        include=(lambda matrix: [True][rank]) if what == "choice" else None,
        replicas=dist.group.WORLD,
        momentum=project,
        strict=strict,
    )
    if what == "momentum" and rank:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
    before = numbers(weights(model))
    try:
        messages, results = collect(opt.end_epoch)
    except Exception as error:
        messages, results = ["raised", str(error)], ()
    return messages, digest(results), before, numbers(weights(model))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("model", "the ranks hold different layers"),
        ("strength", r"the ranks project with different strengths (0.5, 0.75)"),
        ("momentum", "the ranks hold different layers"),
        ("schedule", "must be real number, not NoneType"),
        ("choice", "list index out of range"),
    ],
)
def test_ranks_that_differ_say_so_and_change_nothing(pair, what, reason, strict):
    for messages, results, before, after in pair(different, what, strict):
        assert reason in messages[-1]
        assert (messages[0] == "raised") == strict
        assert results == []
        assert_equal(before, after)


# FullyShardedDataParallel of the first kind


def flattened(use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    whole = net()
    before = [w.detach().clone() for w in weights(whole)]
    model = FullyShardedDataParallel(
        whole, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    opt = WWPGD(sgd(model), model=model, strength=1.0, replicas=dist.group.WORLD)
    model(gaussian(4, SIZE)).square().mean().backward()
    message = ""
    try:
        opt.end_epoch()
    except RuntimeError as error:
        message = str(error)
    results, arrived, moved, distances = (), [], [], []
    if use_orig_params:
        with FullyShardedDataParallel.summon_full_params(model, writeback=True):
            results = opt.end_epoch()
        with FullyShardedDataParallel.summon_full_params(model):
            now = [w.detach().clone() for w in model.parameters() if w.ndim == 2]
        moved = [not torch.equal(a, b) for a, b in zip(now, before, strict=True)]
        distances = [ManifoldProjection().project_(w.clone()).distance for w in now]
        arrived = numbers(now)
    return message, [isinstance(r, Projected) for r in results], moved, distances, arrived


def test_flattened_parameters_are_refused_and_projected_where_they_are_whole(pair):
    first, second = pair(flattened, True)
    for message, projected, moved, distances, _ in (first, second):
        assert "FullyShardedDataParallel has flattened the parameters" in message
        assert "summon_full_params" in message
        assert projected == [True, True]
        assert moved == [True, True]
        assert max(distances) < 1e-6
    assert_equal(first[4], second[4])


def test_parameters_in_one_flat_piece_are_refused(pair):
    for message, *_ in pair(flattened, False):
        assert "FullyShardedDataParallel has flattened the parameters" in message
