import math

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn

from ww_train.analysis import measure
from ww_train.marchenko_pastur import FALSE_ALARM
from ww_train.traps import shuffle

from .oracles import dense, evals_by_svd, gaussian, heavy

SHAPES = [(256, 128), (128, 256), (96, 96)]


def traps_of(weight, **options):
    return measure(dense(weight), randomize=True, **options)["weight"].traps


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_gaussian_entries_have_no_trap(shape, seed):
    assert traps_of(gaussian(*shape, seed)).num_traps == 0


def test_gaussian_entries_have_a_trap_as_rarely_as_stated():
    trials, weight = 300, gaussian(64, 32)
    alarms = sum(traps_of(weight, seed=seed).num_traps > 0 for seed in range(trials))
    assert alarms <= binom.ppf(0.9999, trials, 1.5 * FALSE_ALARM)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_uniform_entries_have_no_trap(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(shape, generator=generator) - 0.5
    assert traps_of(weight).num_traps == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_single_large_entry_is_one_trap_where_theory_puts_it(shape, seed):
    weight = gaussian(*shape, seed)
    theta = 4 * math.sqrt(math.sqrt(shape[0] * shape[1]))
    weight[3, 4] = theta
    traps = traps_of(weight)
    assert traps.num_traps == 1
    expected = (theta**2 + shape[0]) * (theta**2 + shape[1]) / theta**2
    assert traps.max_rand_eval == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("mean", [0.5, -0.5])
def test_a_mean_is_one_trap_where_theory_puts_it(shape, seed, mean):
    traps = traps_of(gaussian(*shape, seed) + mean)
    theta = abs(mean) * math.sqrt(shape[0] * shape[1])
    expected = (theta**2 + shape[0]) * (theta**2 + shape[1]) / theta**2
    assert traps.num_traps == 1
    assert traps.max_rand_eval == pytest.approx(expected, rel=0.1)


def test_a_correlation_is_no_trap():
    u, v = torch.ones(256) / 16, torch.ones(128) / 128**0.5
    u[::2] *= -1
    weight = gaussian(256, 128) + 60 * torch.outer(u, v)
    report = measure(dense(weight), randomize=True)["weight"]
    assert report.spectrum.lambda_max > report.traps.mp.threshold
    assert report.num_traps == 0


def test_two_large_entries_are_two_traps():
    weight = gaussian(256, 128, seed=1)
    weight[3, 4], weight[100, 50] = 60, -60
    assert traps_of(weight).num_traps == 2


def test_max_rand_eval_and_threshold_belong_to_the_shuffled_matrix():
    weight = torch.tensor(heavy(128, 64), dtype=torch.float32)
    traps = traps_of(weight, seed=5)
    shuffled = shuffle(weight[None], 5, "weight")[0]
    evals = evals_by_svd(shuffled)
    assert traps.max_rand_eval == pytest.approx(evals[-1], rel=1e-10)
    assert traps.num_traps == np.count_nonzero(evals > traps.mp.threshold) > 0
    assert traps.seed == 5


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scale_invariance(scale):
    weight = torch.tensor(heavy(128, 64), dtype=torch.float32)
    assert traps_of(weight * scale).num_traps == traps_of(weight).num_traps > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_stored_dtype(dtype):
    weight = gaussian(256, 128, seed=1)
    weight[3, 4] = 60
    assert traps_of(weight.to(dtype)).num_traps == 1


def test_shuffle_moves_entries_within_their_slice_only():
    stack = torch.arange(4 * 30 * 20.0).reshape(4, 30, 20)
    shuffled = shuffle(stack, 0)
    assert shuffled.shape == stack.shape
    for before, after in zip(stack, shuffled, strict=True):
        assert torch.equal(after.flatten().sort().values, before.flatten())
        assert (after == before).float().mean() < 0.05


def test_shuffle_moves_slices_independently():
    stack = torch.arange(600.0).reshape(1, 30, 20).expand(2, 30, 20)
    first, second = shuffle(stack, 0)
    assert not torch.equal(first, second)


def test_shuffle_copies():
    stack = torch.arange(600.0).reshape(1, 30, 20)
    shuffle(stack, 0).zero_()
    assert torch.equal(stack.flatten(), torch.arange(600.0))


def test_shuffle_depends_on_seed_and_name_only():
    stack = torch.arange(600.0).reshape(1, 30, 20)
    same = shuffle(stack, 1, "a")
    assert torch.equal(same, shuffle(stack, 1, "a"))
    assert torch.equal(same, shuffle(stack.mT.contiguous().mT, 1, "a"))  # other strides
    assert not torch.equal(same, shuffle(stack, 2, "a"))
    assert not torch.equal(same, shuffle(stack, 1, "b"))


def test_shuffle_is_a_fair_permutation():
    stack = torch.arange(24.0).reshape(1, 4, 6)
    where = torch.stack([shuffle(stack, seed).flatten() for seed in range(2000)])
    mean_of_each_place = where.mean(dim=0)
    error = where.std() / math.sqrt(2000)
    assert ((mean_of_each_place - 11.5).abs() < 4 * error).all()


def test_shuffle_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    shuffle(torch.ones(1, 30, 20), 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_traps():
    weight = torch.tensor(heavy(128, 64), dtype=torch.float32)
    assert traps_of(weight, seed=3) == traps_of(weight, seed=3)
    assert traps_of(weight, seed=3) != traps_of(weight, seed=4)


def test_traps_do_not_depend_on_the_other_layers():
    weights = [torch.tensor(heavy(96, 64, seed), dtype=torch.float32) for seed in range(3)]
    layers = {f"l{i}": dense(w) for i, w in enumerate(weights)}
    together = measure(nn.ModuleDict(layers), randomize=True)
    reversed_order = measure(nn.ModuleDict(dict(reversed(layers.items()))), randomize=True)
    for name, layer in layers.items():
        alone = measure(nn.ModuleDict({name: layer}), randomize=True)[name].traps
        for traps in (together[name].traps, reversed_order[name].traps):
            assert traps.num_traps == alone.num_traps
            assert traps.max_rand_eval == pytest.approx(alone.max_rand_eval, rel=1e-12)


def test_traps_of_a_convolution_count_over_all_slices():
    conv = nn.Conv2d(64, 64, 2)
    with torch.no_grad():
        conv.weight.copy_(gaussian(64, 256).view(64, 64, 2, 2))
        assert measure(nn.Sequential(conv), randomize=True)["0"].num_traps == 0
        conv.weight[3, 4] = 60
    assert measure(nn.Sequential(conv), randomize=True)["0"].num_traps == 4


def test_slices_of_different_variance_are_no_traps():
    conv = nn.Conv2d(64, 128, 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(gaussian(128, 576).view(128, 64, 3, 3))
        conv.weight[:, :, 1, 1] *= 1.5  # its bulk reaches above the edge of the pooled spectrum
    layer = measure(nn.Sequential(conv), randomize=True)["0"]
    assert layer.traps.mp.num_spikes > 5
    assert layer.num_traps == 0
    assert layer.trap_causes == ()
