import copy
import math

import pytest
import torch
from torch import nn

from ww_train.analysis import measure
from ww_train.editing.trap_removal import remove_traps_, shuffled_traps, without_traps
from ww_train.weights.matrices import Skipped, WeightMatrix, weight_matrices

from .oracles import dense, gaussian, heavy
from .peer import contained, import_peer

PLACES = [(7, 11), (30, 5), (200, 100)]


def planted(dtype=torch.float32, strength=60.0):
    """Noise, a signal of rank two, and three entries that are traps; with the signal's vectors."""
    u, v = (torch.linalg.qr(gaussian(n, 2, n, torch.float64)).Q for n in (256, 128))
    weight = gaussian(256, 128, dtype=torch.float64) + strength * u @ v.T
    for row, column in PLACES:
        weight[row, column] = 80.0
    return weight.to(dtype), u, v


def overlap(weight, u, v):
    """Mean squared cosines of the first singular vectors and the planted ones."""
    left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
    k = u.shape[1]
    return [float((a.T @ b).square().sum() / k) for a, b in ((u, left[:, :k]), (v, right[:k].T))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_traps_go_and_the_signal_stays(dtype):
    weight, u, v = planted(dtype=dtype)
    model = nn.Sequential(dense(weight))
    before = weight.clone()
    assert measure(model, randomize=True)["0"].num_traps >= 1
    (done,) = remove_traps_(model).layers
    after = model[0].weight.detach()
    assert after.dtype == dtype
    assert {(cause.row, cause.column) for cause in done.causes} == set(PLACES)
    assert done.traps_before >= 1
    assert done.traps_after == measure(model, randomize=True)["0"].num_traps == 0
    untouched = torch.ones_like(before, dtype=torch.bool)
    untouched[tuple(zip(*PLACES, strict=True))] = False
    assert torch.equal(after[untouched], before[untouched])
    assert after[~untouched].abs().max() < 0.1
    assert min(overlap(before, u, v)) < 0.5  # three entries of 80 outweigh two signals of 60
    assert min(overlap(after, u, v)) > 0.9
    signal = torch.diagonal(u.T @ after.double() @ v)
    assert signal.tolist() == pytest.approx([60.0, 60.0], abs=4.0)


def test_the_peer_deletes_the_signal_and_leaves_the_trap():
    weightwatcher = import_peer()
    weight, u, v = planted(strength=120.0)
    theirs = nn.Sequential(dense(weight.clone()))
    with contained():
        weightwatcher.WeightWatcher(model=theirs).SVDSharpness()
    after = theirs[0].weight.detach()
    assert shuffled_traps(next(weight_matrices(theirs))).num_traps > 0
    remove_traps_(weight)
    assert min(overlap(weight, u, v)) > 0.9 > 0.5 > min(overlap(after, u, v))


def test_a_mean_is_a_trap_and_is_taken_off():
    weight = gaussian(256, 128) + 0.5
    (done,) = remove_traps_(weight).layers
    assert [cause.kind for cause in done.causes] == ["mean"]
    assert (done.traps_before, done.traps_after) == (1, 0)
    assert abs(float(weight.double().mean())) < 1e-7
    assert done.distance == pytest.approx(0.5 / math.sqrt(1.25), rel=0.02)


def test_the_mean_of_half_precision_weights_is_not_rounded_before_it_is_taken_off():
    weight = (gaussian(256, 128) + 0.7).bfloat16()
    exact = weight.double() - weight.double().mean()
    remove_traps_(weight)
    assert torch.equal(weight, exact.bfloat16())


def test_without_a_trap_no_bit_changes_though_an_entry_be_large():
    model = nn.Sequential(dense(gaussian(256, 128)), dense(gaussian(100, 128)))
    before = copy.deepcopy(model.state_dict())
    done = remove_traps_(model)
    assert [(x.traps_before, x.traps_after, x.causes) for x in done.layers] == [(0, 0, ())] * 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_each_slice_of_a_convolution_has_its_own_traps():
    conv = nn.Conv2d(64, 96, 3)
    with torch.no_grad():
        conv.weight.copy_(gaussian(96, 576).view(96, 64, 3, 3))
        conv.weight[5, 6, 1, 2] = 60.0
        conv.weight[:, :, 2, 0] += 0.5
    before = conv.weight.detach().clone()
    (done,) = remove_traps_(conv).layers
    assert {(cause.kind, cause.slice_id) for cause in done.causes} == {("mean", 6), ("entry", 5)}
    assert (done.traps_before, done.traps_after) == (2, 0)
    changed = conv.weight.detach() != before
    assert changed[:, :, 2, 0].all()
    changed[:, :, 2, 0] = False
    assert changed.nonzero().tolist() == [[5, 6, 1, 2]]


def test_twice_is_once():
    weight, _, _ = planted()
    remove_traps_(weight)
    once = weight.clone()
    (again,) = remove_traps_(weight).layers
    assert (again.causes, again.distance) == ((), 0.0)
    assert torch.equal(weight, once)


def test_traps_of_heavy_tails_that_have_no_cause_stay_and_are_counted():
    weight = torch.tensor(heavy(256, 256))
    (done,) = remove_traps_(weight).layers
    assert 0 < done.traps_after < done.traps_before
    assert done.traps_after == shuffled_traps(WeightMatrix("W", "dense", weight[None])).num_traps


def test_equal_weights_become_zero():
    weight = torch.full((64, 32), 0.1)
    (done,) = remove_traps_(weight).layers
    assert (done.traps_before, done.traps_after) == (1, 0)
    assert weight.count_nonzero() == 0


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_zero_and_broken_weights_are_left_alone(value):
    weight = torch.zeros(64, 32)
    weight[3, 4] = value
    done = remove_traps_(weight)
    assert done.skipped == (Skipped("W", "all weights are zero, or one is NaN or infinite"),)
    assert weight[0].count_nonzero() == 0


def test_the_pure_function_changes_nothing_and_keeps_every_other_bit():
    weight, _, _ = planted(dtype=torch.bfloat16)
    before = weight.clone()
    cleaned = without_traps(WeightMatrix("w", "dense", weight[None]))
    assert torch.equal(weight, before)
    assert cleaned.stack.dtype == torch.float64
    assert int((cleaned.stack[0] != before.double()).sum()) == len(PLACES) == len(cleaned.causes)
    thetas = [cause.theta for cause in cleaned.causes]
    assert thetas == sorted(thetas, reverse=True)


def test_the_seed_and_the_name_make_the_shuffle_of_measure():
    model = nn.Sequential(dense(torch.tensor(heavy(96, 64)).float()), nn.Conv2d(32, 40, 3))
    for seed in (0, 5):
        report = measure(model, randomize=True, seed=seed)
        for matrix in weight_matrices(model):
            expected, found = report[matrix.name].traps, shuffled_traps(matrix, seed)
            assert found.num_traps == expected.num_traps
            assert found.max_rand_eval == pytest.approx(expected.max_rand_eval, rel=1e-12)


def test_the_choice_of_layers():
    model = nn.Sequential(*(dense(planted()[0]) for _ in range(2)))
    before = model[0].weight.clone()
    assert [x.name for x in remove_traps_(model, layers="1").layers] == ["1"]
    assert torch.equal(model[0].weight, before)
