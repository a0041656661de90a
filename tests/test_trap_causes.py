import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ww_train.marchenko_pastur import (
    FALSE_ALARM,
    MPFit,
    mp_edges,
    signal_energy,
    tracy_widom_edge,
)
from ww_train.spectrum import Spectrum
from ww_train.trap_causes import trap_causes, without_causes
from ww_train.traps import TrapAverage, average_traps, count_traps, shuffle
from ww_train.weights.matrices import WeightMatrix, weight_matrices

from .oracles import evals_by_svd, gaussian, heavy

SHAPES = [(256, 128), (128, 256), (96, 96)]


def matrix_of(source):
    (matrix,) = weight_matrices(source)
    return matrix


def traps_of(matrix, seed=0):
    """Traps of the real thing: the seeded shuffle, decomposed."""
    shuffled = shuffle(matrix.stack, seed, matrix.name)
    evals = evals_by_svd(*shuffled, scale=matrix.scale)
    eps = torch.finfo(matrix.stack.dtype).eps
    return count_traps(Spectrum(evals, matrix.N, matrix.M, matrix.rf, eps), seed)


def traps_left(matrix, causes, seed=0):
    return traps_of(replace(matrix, weights=without_causes(matrix, causes)), seed).num_traps


def grams_of(stack):
    """Gram matrices of slices that are no wider than high."""
    return stack.double().mT @ stack.double()


def line(N, M, rf=1):
    """theta of the entry, in unit noise, that theory puts on the Tracy-Widom threshold."""
    edge = np.array([tracy_widom_edge(N, M, FALSE_ALARM / rf)])
    return math.sqrt(signal_energy(edge, N, M, 1.0)[0])


def spike(theta, N, M, variance):
    return (theta**2 + variance * N) * (theta**2 + variance * M) / theta**2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_single_large_entry_is_named(shape, seed, sign):
    weight = gaussian(*shape, seed)
    weight[70, 90] = sign * 2 * line(*shape)
    matrix = matrix_of(weight)
    (cause,) = trap_causes(matrix)
    assert (cause.kind, cause.slice_id, cause.row, cause.column) == ("entry", 0, 70, 90)
    assert cause.value == float(weight[70, 90])
    assert cause.theta == pytest.approx(2 * line(*shape), rel=1e-2)  # less the mean
    assert cause.rand_eval == pytest.approx(traps_of(matrix).max_rand_eval, rel=0.1)
    assert traps_left(matrix, [cause]) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [0.5, -0.5])
def test_a_mean_is_named(shape, mean):
    matrix = matrix_of(gaussian(*shape) + mean)
    (cause,) = trap_causes(matrix)
    assert (cause.kind, cause.slice_id, cause.row, cause.column) == ("mean", 0, None, None)
    assert cause.value == pytest.approx(float(matrix.stack.mean()), rel=1e-5)
    assert cause.theta == pytest.approx(abs(cause.value) * math.sqrt(shape[0] * shape[1]))
    assert cause.rand_eval == pytest.approx(traps_of(matrix).max_rand_eval, rel=0.1)
    assert traps_of(matrix).num_traps == 1
    assert traps_left(matrix, [cause]) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_mean_and_large_entries_are_told_apart_strongest_first(shape, seed):
    weight = gaussian(*shape, seed) + 0.8
    weight[[1, 20, 40], [5, 50, 90]] = torch.tensor([40.0, -60.0, 50.0])
    matrix = matrix_of(weight)
    causes = trap_causes(matrix)
    assert [cause.value for cause in causes if cause.kind == "entry"] == [-60.0, 50.0, 40.0]
    assert [cause.kind for cause in causes].count("mean") == 1
    thetas = [cause.theta for cause in causes]
    assert thetas == sorted(thetas, reverse=True)
    assert traps_of(matrix).num_traps == len(causes) == 4
    assert traps_left(matrix, causes) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_well_behaved_entries_have_no_cause(shape, seed):
    for weight in (gaussian(*shape, seed), gaussian(*shape, seed).sign()):
        matrix = matrix_of(weight)
        assert trap_causes(matrix) == trap_causes(matrix, traps_of(matrix).mp) == ()


def brute_force(weight):
    """Causes of one slice: sort all entries, and peel off until the rest shows nothing more."""
    w = weight.double().numpy()
    N, M = max(w.shape), min(w.shape)
    named = np.zeros(w.shape, dtype=bool)
    for _ in range(2):
        mean = w[~named].mean()
        parts = [(abs(mean) * math.sqrt(N * M), None)]
        parts += [(abs(w[place] - mean), place) for place in np.ndindex(w.shape)]
        parts.sort(key=lambda part: -part[0])
        count, variances = 0, []
        for k in range(1, M + 1):
            rest = w.copy()
            for _, place in parts[:k]:
                if place is not None:
                    rest[place] = mean
            if None in [place for _, place in parts[:k]]:
                rest = rest - mean
            variances.append((rest**2).mean())
            if parts[k - 1][0] ** 2 > line(N, M) ** 2 * variances[-1]:
                count = k
        named[:] = False
        for _, place in parts[:count]:
            if place is not None:
                named[place] = True
    return [
        (place, theta, spike(theta, N, M, variances[count - 1])) for theta, place in parts[:count]
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_against_brute_force(seed, mean):
    matrix = matrix_of(heavy(48, 40, seed) + mean)
    expected = brute_force(matrix.stack[0])
    causes = trap_causes(matrix)
    places = [None if c.kind == "mean" else (c.row, c.column) for c in causes]
    assert places == [place for place, _, _ in expected]
    assert [c.theta for c in causes] == pytest.approx([theta for _, theta, _ in expected])
    # entries of a mean near zero carry a share of it: their squares are not quite the energy
    assert [c.rand_eval for c in causes] == pytest.approx([e for _, _, e in expected], rel=1e-3)


def test_the_prediction_is_the_inverse_of_the_fit():
    weight = gaussian(128, 64)
    weight[3, 4] = 50
    (cause,) = trap_causes(matrix_of(weight))
    weight[3, 4] = weight.mean()
    variance = float(weight.double().square().mean())
    strength = signal_energy(np.array([cause.rand_eval]), 128, 64, variance)[0]
    assert math.sqrt(strength) == pytest.approx(cause.theta, rel=1e-4)


@pytest.mark.parametrize(("share", "fewest", "most"), [(0.7, 0, 4), (1.0, 5, 25), (1.3, 27, 30)])
def test_the_line_is_where_a_shuffle_begins_to_show_an_entry(share, fewest, most):
    shown = 0
    for seed in range(30):
        weight = gaussian(64, 64, seed, torch.float64)
        weight[5, 6] = share * line(64, 64)
        matrix = matrix_of(weight)
        if share != 1.0:
            assert len(trap_causes(matrix)) == (share > 1)
        shown += traps_of(matrix).num_traps > 0
    assert fewest <= shown <= most


def test_a_correlation_is_no_cause_and_survives_the_removal_of_those():
    u, v = gaussian(256, 1), gaussian(128, 1, 1)
    u, v = u / u.norm(), v / v.norm()
    weight = gaussian(256, 128) + 60 * u @ v.T
    weight[7, 11] += 80
    matrix = matrix_of(weight)
    causes = trap_causes(matrix)
    assert [(cause.row, cause.column) for cause in causes] == [(7, 11)]
    cleaned = without_causes(matrix, causes)[0]
    assert float((u.T @ cleaned @ v).item()) == pytest.approx(60, abs=4)
    assert torch.equal(cleaned[8:], weight[8:])
    others = (weight.double().sum() - weight[7, 11]) / (weight.numel() - 1)
    assert cleaned[7, 11].item() == pytest.approx(others.item(), abs=1e-6)
    assert weight[7, 11] > 70  # the layer itself is left alone
    assert traps_left(matrix, causes) == 0


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("num", [20, 80, 120])
def test_dense_large_entries_are_all_named_where_the_shuffle_shows_fewer(num, given):
    N, M = 256, 128
    weight = gaussian(N, M)
    generator = torch.Generator().manual_seed(num)
    places = torch.randperm(N * M, generator=generator)[:num]
    weight.view(-1)[places] = 2.5 * line(N, M) * weight.view(-1)[places].sign()
    matrix = matrix_of(weight)
    traps = traps_of(matrix)
    causes = trap_causes(matrix, traps.mp if given else None)
    assert {cause.row * M + cause.column for cause in causes} == set(places.tolist())
    assert 0.3 * num < traps.num_traps <= num  # some meet in a row or a column
    assert traps_left(matrix, causes) == 0


@pytest.mark.parametrize("freedom", [2.0, 2.5, 3.0])
def test_of_heavy_tails_the_causes_are_the_larger_part(freedom):
    rng = np.random.default_rng(0)
    matrix = matrix_of(rng.standard_t(freedom, size=(256, 256)))
    causes = trap_causes(matrix)
    traps = [traps_of(matrix, seed).num_traps for seed in range(4)]
    left = [traps_left(matrix, causes, seed) for seed in range(4)]
    assert len(causes) == pytest.approx(np.mean(traps), rel=0.4)
    assert np.mean(left) < 0.6 * np.mean(traps)


def test_the_bulk_of_the_shuffle_and_of_the_entries_name_the_same():
    weight = gaussian(256, 128, seed=5) - 0.4
    weight[[3, 9], [4, 8]] = 40
    matrix = matrix_of(weight)
    own, given = trap_causes(matrix), trap_causes(matrix, traps_of(matrix).mp)
    assert [(c.kind, c.row, c.column, c.value, c.theta) for c in own] == [
        (c.kind, c.row, c.column, c.value, c.theta) for c in given
    ]
    assert [c.rand_eval for c in own] == pytest.approx([c.rand_eval for c in given], rel=0.01)


def unit_noise(rf, rows, cols):
    """Slices of entries that are 1 or -1: their mean square is known and none is large."""
    return gaussian(rf * rows, cols).sign().view(rf, rows, cols)


@pytest.mark.parametrize("spikes", [0, 20])
@pytest.mark.parametrize("scale", [1.0, math.sqrt(0.5)])
def test_the_line_is_that_of_the_noise_beside_the_spikes_of_a_given_bulk(spikes, scale):
    N, M = 128, 64
    edge = tracy_widom_edge(N - spikes, M - spikes, FALSE_ALARM)
    bulk_min, bulk_max = mp_edges(N, M)
    mp = MPFit(1.0, scale**2 * bulk_min, scale**2 * bulk_max, scale**2 * edge, spikes)
    at = math.sqrt(signal_energy(np.array([edge]), N - spikes, M - spikes, 1.0)[0])
    for share, named in ((0.98, 0), (1.02, 1)):
        weight = unit_noise(1, N, M)
        weight[0, 5, 6] = share * at + weight[0].mean()
        matrix = WeightMatrix("w", "dense", weight, scale)
        assert len(trap_causes(matrix, mp)) == named


def test_nothing_below_the_critical_strength_is_named_whatever_the_threshold():
    weight = unit_noise(1, 128, 64)
    low = MPFit(1.0, *mp_edges(128, 64), threshold=100.0, num_spikes=0)
    assert trap_causes(WeightMatrix("w", "dense", weight), low) == ()


def test_slices_share_the_false_alarms():
    between = math.sqrt(line(64, 48) * line(64, 48, rf=25))
    weight = unit_noise(25, 64, 48)
    weight[7, 5, 6] = between
    assert trap_causes(WeightMatrix("w", "conv2d", weight)) == ()
    assert len(trap_causes(WeightMatrix("w", "conv2d", weight[7:8]))) == 1


def test_a_giant_entry_hides_no_other_and_is_not_taken_for_a_mean():
    weight = gaussian(256, 128)
    weight[3, 4], weight[9, 8] = 1e6, 60
    causes = trap_causes(matrix_of(weight.double()))
    assert [(cause.kind, cause.value) for cause in causes] == [("entry", 1e6), ("entry", 60.0)]
    others = weight[weight < 50].double().mean().item()
    assert causes[1].theta == pytest.approx(60 - others, rel=1e-9)


def test_a_convolution_names_slices_and_scales():
    conv = nn.Conv2d(64, 96, 3)
    with torch.no_grad():
        conv.weight.copy_(gaussian(96, 576).view(96, 64, 3, 3))
        conv.weight[5, 6, 1, 2] = 60
        conv.weight[:, :, 2, 0] += 0.5
    matrix = matrix_of(conv)
    mean, entry = sorted(trap_causes(matrix), key=lambda cause: cause.kind, reverse=True)
    assert (mean.kind, mean.slice_id) == ("mean", 6)
    assert mean.value == pytest.approx(0.5, abs=0.05)
    assert mean.theta == pytest.approx(matrix.scale * mean.value * math.sqrt(96 * 64))
    assert (entry.kind, entry.slice_id, entry.row, entry.column) == ("entry", 5, 5, 6)
    assert matrix.stack[entry.slice_id, entry.row, entry.column] == entry.value == 60
    assert entry.theta == pytest.approx(matrix.scale * 60, rel=1e-2)
    traps = traps_of(matrix)
    assert traps.num_traps == 2
    assert max(mean.rand_eval, entry.rand_eval) == pytest.approx(traps.max_rand_eval, rel=0.1)
    given = trap_causes(matrix, traps.mp)
    assert {cause.kind: cause.rand_eval for cause in given} == pytest.approx(
        {cause.kind: cause.rand_eval for cause in (mean, entry)}, rel=2e-3
    )
    assert traps_left(matrix, [mean, entry]) == 0
    untouched = [s for s in range(9) if s not in (5, 6)]
    assert torch.equal(without_causes(matrix, [mean, entry])[untouched], matrix.stack[untouched])


def test_laws_of_scale_transpose_and_permutation():
    weight = torch.tensor(heavy(96, 64))
    causes = trap_causes(matrix_of(weight))
    assert len(causes) > 2
    scaled = trap_causes(matrix_of(-1e-12 * weight))
    assert [(c.row, c.column) for c in scaled] == [(c.row, c.column) for c in causes]
    assert [c.theta for c in scaled] == pytest.approx([1e-12 * c.theta for c in causes])
    assert [c.rand_eval for c in scaled] == pytest.approx([1e-24 * c.rand_eval for c in causes])
    transposed = trap_causes(matrix_of(weight.T))  # also other strides
    assert [(c.column, c.row) for c in transposed] == [(c.row, c.column) for c in causes]
    permuted = trap_causes(matrix_of(shuffle(weight[None], 3)[0]))
    assert [c.value for c in permuted] == [c.value for c in causes]
    assert [c.rand_eval for c in permuted] == pytest.approx([c.rand_eval for c in causes])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_stored_dtype(dtype):
    weight = gaussian(256, 128, seed=1) + 0.5
    weight[3, 4] = 60
    matrix = matrix_of(weight.to(dtype))
    causes = trap_causes(matrix)
    assert sorted(cause.kind for cause in causes) == ["entry", "mean"]
    assert without_causes(matrix, causes).dtype == dtype
    assert traps_left(matrix, causes) == 0


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (8, 1), (2, 2), (1, 1)])
@pytest.mark.parametrize("value", [0.1, -3e-20])
def test_equal_weights_have_no_cause_but_their_mean(shape, value):
    matrix = matrix_of(torch.full(shape, value))
    (cause,) = trap_causes(matrix)
    assert cause.kind == "mean"
    assert cause.value == pytest.approx(value)
    assert without_causes(matrix, [cause]).count_nonzero() == 0


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_zero_and_broken_weights_have_no_cause(value):
    weight = torch.zeros(64, 32)
    weight[3, 4] = value
    assert trap_causes(matrix_of(weight)) == ()


def test_nothing_to_remove_is_a_copy():
    parameter = nn.Parameter(gaussian(64, 32))
    copy = without_causes(WeightMatrix("w", "dense", parameter[None]), ())
    assert torch.equal(copy[0], parameter)
    assert not copy.requires_grad
    copy.zero_()
    assert parameter.count_nonzero() > 0


class Synchronisations(TorchDispatchMode):
    """Counts the operators that wait for a device to read a number or a size."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        self.count += func._schema.name.removeprefix("aten::") in names
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_but_the_one_copy():
    conv = nn.Conv2d(64, 96, 3)
    with torch.no_grad():
        conv.weight[5, 6, 1, 2] = 60
    matrix = matrix_of(conv)
    with Synchronisations() as seen:
        causes = trap_causes(matrix)
        without_causes(matrix, causes)
    assert len(causes) == 1
    assert seen.count == 0
    with Synchronisations() as seen:
        float(matrix.stack.sum())
        matrix.stack.nonzero()
    assert seen.count == 2


def test_the_average_over_shuffles():
    matrix = matrix_of(heavy(96, 64))
    shuffles = [traps_of(matrix, seed) for seed in range(5)]
    counts = [traps.num_traps for traps in shuffles]
    average = average_traps(shuffles)
    assert len(set(counts)) > 1
    assert average.num_shuffles == 5
    assert average.num_traps_mean == pytest.approx(np.mean(counts))
    assert average.num_traps_std == pytest.approx(np.std(counts, ddof=1))
    assert average_traps(shuffles[:1]) == TrapAverage(1, float(counts[0]), None)


def test_the_short_index_shuffles_as_the_long_one():
    stack = torch.arange(3000.0).reshape(1, 60, 50)
    generator = torch.Generator().manual_seed(7)  # the name "" adds nothing
    expected = stack.flatten()[torch.randperm(3000, generator=generator)]
    assert torch.equal(shuffle(stack, 7).flatten(), expected)
