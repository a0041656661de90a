import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ww_train import WWPGD
from ww_train.spectrum import Spectrum
from ww_train.steering.projection import Projected
from ww_train.steering.trap_projection import TrapProjection
from ww_train.trap_causes import trap_causes
from ww_train.traps import count_traps, shuffle
from ww_train.weights.matrices import Skipped, WeightMatrix, weight_matrices

from .oracles import evals_by_svd, gaussian, heavy

SHAPES = [(256, 128), (128, 256), (96, 96)]
ENTRIES = ((3, 5, 60.0), (70, 80, -80.0))


def matrix_of(source):
    (matrix,) = weight_matrices(source)
    return matrix


def traps_of(matrix, seed=0):
    """Traps of the real thing: the seeded shuffle, decomposed."""
    shuffled = shuffle(matrix.stack, seed, matrix.name)
    slices = [
        Spectrum(evals_by_svd(part, scale=matrix.scale), matrix.N, matrix.M, 1) for part in shuffled
    ]
    pooled = evals_by_svd(*shuffled, scale=matrix.scale)
    return count_traps(Spectrum(pooled, matrix.N, matrix.M, matrix.rf), seed, slices).num_traps


def with_traps(shape, mean=0.0, seed=0, dtype=torch.float64):
    """Noise with large entries, and perhaps a mean."""
    weight = gaussian(*shape, seed, dtype) + mean
    for row, column, value in ENTRIES:
        weight[row, column] = value
    return weight


def project(weight, strength=1.0):
    """A projected copy of a weight, and what was said about it."""
    moved = weight.clone()
    return moved, TrapProjection().project_(matrix_of(moved), strength)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_planted_traps_go(shape, mean):
    weight = with_traps(shape, mean)
    assert traps_of(matrix_of(weight)) >= len(ENTRIES)
    moved, done = project(weight)
    assert isinstance(done, Projected)
    assert traps_of(matrix_of(moved)) == 0
    distance = (moved - weight).norm() / weight.norm()
    assert done.distance == pytest.approx(float(distance), rel=1e-12)
    assert (done.tail_size, done.before, done.after) == (None, None, None)
    assert (done.alpha, done.ERG_gap) == (None, None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_a_step_goes_that_far_and_other_entries_keep_every_bit(shape, strength):
    weight = with_traps(shape)
    weight[0, :4] = torch.tensor([-0.0, 0.0, 1e-320, -1e-30])
    moved, done = project(weight, strength)
    assert done.strength == strength
    named = torch.zeros_like(weight, dtype=torch.bool)
    for row, column, _ in ENTRIES:
        named[row, column] = True
    mean = weight[~named].mean()
    for row, column, value in ENTRIES:
        expected = value + strength * (mean - value)
        assert float(moved[row, column]) == pytest.approx(float(expected), rel=1e-12)
    assert torch.equal(moved.view(torch.int64)[~named], weight.view(torch.int64)[~named])


def test_a_named_mean_is_taken_off_the_slice():
    weight = gaussian(128, 96, dtype=torch.float64) + 0.7
    moved, done = project(weight, 0.25)
    expected = weight - 0.25 * weight.mean()
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)
    assert done.distance == pytest.approx(
        float(weight.mean().abs() * math.sqrt(weight.numel()) / weight.norm())
    )


def test_what_was_learned_stays():
    u, v = (torch.linalg.qr(gaussian(256, 3, seed, torch.float64)).Q for seed in (1, 2))
    signal = u @ torch.diag(torch.tensor([90.0, 70.0, 60.0], dtype=torch.float64)) @ v[:128].T
    clean = gaussian(256, 128, 3, torch.float64) + signal
    weight = clean.clone()
    for row, column, value in ENTRIES:
        weight[row, column] = value
    assert traps_of(matrix_of(weight)) > 0
    moved, _ = project(weight)
    assert traps_of(matrix_of(moved)) == 0
    top = torch.linalg.svdvals(moved)[:3]
    torch.testing.assert_close(top, torch.linalg.svdvals(clean)[:3], rtol=0.02, atol=0.0)
    assert torch.linalg.svdvals(weight)[0] > 1.05 * torch.linalg.svdvals(weight)[2]


def test_repeated_small_steps_stop_where_nothing_stands_out():
    weight = with_traps((128, 96))
    matrix = matrix_of(weight)
    for _ in range(200):
        done = TrapProjection().project_(matrix, 0.1)
        if done.distance == 0.0:
            break
    assert done.distance == 0.0
    assert trap_causes(matrix) == ()
    assert float(weight[3, 5]) > 5.0  # no more an outlier to the screen, but not erased


def test_arriving_twice_changes_nothing():
    moved, _ = project(with_traps((128, 96), mean=0.5))
    again, done = project(moved)
    assert done.distance == 0.0
    assert torch.equal(again, moved)


def test_slices_of_a_convolution_are_told_apart():
    conv = nn.Conv2d(48, 64, 3)
    with torch.no_grad():
        conv.weight.copy_(gaussian(64, 48 * 9).view(64, 48, 3, 3))
        conv.weight[5, 7, 1, 2] = 50.0
        conv.weight[:, :, 0, 0] += 1.0
    before = conv.weight.detach().clone()
    matrix = matrix_of(conv)
    assert traps_of(matrix) >= 2
    done = TrapProjection().project_(matrix)
    assert isinstance(done, Projected)
    after = conv.weight.detach()
    assert traps_of(matrix) == 0
    assert abs(float(after[:, :, 0, 0].mean())) < 1e-6
    assert abs(float(after[5, 7, 1, 2])) < 0.1
    same = after == before
    same[5, 7, 1, 2] = True
    same[:, :, 0, 0] = True
    assert same.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_in_place(dtype):
    weight = with_traps((128, 96), dtype=dtype)
    moved = weight.clone()
    address = moved.data_ptr()
    done = TrapProjection().project_(matrix_of(moved), 0.5)
    assert isinstance(done, Projected)
    assert (moved.dtype, moved.data_ptr()) == (dtype, address)
    assert (moved != weight).sum() == len(ENTRIES)
    assert float(moved[3, 5]) == pytest.approx(30.0, abs=0.3)


def test_a_small_step_of_half_precision_is_kept_on_average():
    weight = (gaussian(256, 128) * 0.1 + 0.5).to(torch.bfloat16)
    moved, _ = project(weight, 0.001)  # rounded to the nearest this would change nothing
    fallen = float((weight.double() - moved.double()).mean())
    assert fallen == pytest.approx(0.001 * float(weight.double().mean()), rel=0.2)


def test_the_same_weights_give_the_same_result():
    weight = with_traps((128, 96), mean=0.5, dtype=torch.bfloat16)
    before = torch.get_rng_state()
    first, _ = project(weight, 0.3)
    second, _ = project(weight, 0.3)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_trap_nothing_is_done(shape):
    for weight in (gaussian(*shape), gaussian(*shape).sign(), torch.zeros(shape)):
        moved, done = project(weight)
        assert done.distance == 0.0
        assert torch.equal(moved, weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_left_alone_and_named_so(bad):
    weight = with_traps((96, 96))
    weight[1, 1] = bad
    moved, done = project(weight)
    assert isinstance(done, Skipped)
    assert "NaN or infinite" in done.reason
    assert torch.equal(moved.nan_to_num(), weight.nan_to_num())


def test_a_read_only_matrix_is_left_alone():
    weight = with_traps((128, 96))
    matrix = replace(matrix_of(weight), read_only="a difference of two models")
    done = TrapProjection().project_(matrix)
    assert done == Skipped(matrix.name, "a difference of two models")
    assert torch.equal(weight, with_traps((128, 96)))


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_bad_strength_raises(strength):
    with pytest.raises(ValueError, match="strength"):
        TrapProjection().project_(matrix_of(gaussian(30, 20)), strength)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_scaled_layer_moves_alike(scale):
    weight = with_traps((128, 96), mean=0.3)
    plain, a = project(weight)
    scaled, b = project(weight * scale)
    torch.testing.assert_close(scaled / scale, plain, rtol=1e-9, atol=1e-9)
    assert a.distance == pytest.approx(b.distance)


def test_heavy_tails_lose_most_of_their_traps():
    weight = torch.from_numpy(heavy(256, 128, 1))
    moved, _ = project(weight)
    assert traps_of(matrix_of(moved)) < 0.5 * traps_of(matrix_of(weight))


def test_gradients_and_parameters_survive():
    layer = nn.Linear(96, 128)
    with torch.no_grad():
        layer.weight.copy_(with_traps((128, 96)))
    parameter, reference = layer.weight, copy.deepcopy(layer)
    assert isinstance(TrapProjection().project_(matrix_of(layer.weight)), Projected)
    assert layer.weight is parameter
    assert layer.weight.requires_grad
    assert layer.weight.grad_fn is None
    assert torch.equal(layer.bias, reference.bias)


def test_a_matrix_view_without_parameter_is_enough():
    stack = with_traps((128, 96))[None]
    done = TrapProjection().project_(WeightMatrix("w", "dense", stack))
    assert isinstance(done, Projected)
    assert done.name == "w"


def test_wwpgd_takes_it_and_projects_only_where_there_is_a_trap():
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96))
    with torch.no_grad():
        model[0].weight.copy_(with_traps((128, 96)))
    kept = model[2].weight.detach().clone()
    optimizer = WWPGD(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model=model,
        projection=TrapProjection(),
        strength=0.5,
        strict=True,
    )
    first, second = optimizer.end_epoch()
    assert isinstance(first, Projected)
    assert float(model[0].weight.detach()[3, 5]) == pytest.approx(30.0, abs=0.1)
    assert second.distance == 0.0
    assert torch.equal(model[2].weight, kept)
