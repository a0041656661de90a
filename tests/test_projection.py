import contextlib
import io
import logging
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ww_train import ManifoldProjection, Projected, Skipped, WeightMatrix, weight_matrices
from ww_train.power_law import fit_power_law
from ww_train.steering.manifold import critical_spectrum, feasible_tail_sizes
from ww_train.steering.projection import Move, SpectralProjection

from .oracles import dense, evals_by_svd, gaussian, heavy, orthogonal

SHAPES = [(256, 64), (100, 32), (64, 20), (128, 128), (32, 100), (20, 64)]


def heavy_weight(rows, cols, seed=0):
    return torch.from_numpy(heavy(rows, cols, seed))


def project(weight, strength=1.0, **settings):
    """A projected copy of `weight`, and what the projection says it did."""
    copy = weight.clone()
    return copy, ManifoldProjection(**settings).project_(copy, strength)


@pytest.fixture(scope="module")
def peer():
    """WeightWatcher 0.7.7, and everything that importing it changes put back as it was."""
    root, filters = logging.getLogger(), warnings.filters[:]
    level, handlers = root.level, root.handlers[:]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import weightwatcher
    warnings.filters[:] = filters
    root.setLevel(level)
    root.handlers[:] = handlers

    def analyze(model):
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            watcher = weightwatcher.WeightWatcher(model=model, log_level=logging.ERROR)
            details = watcher.analyze(detX=True)
        root.setLevel(level)
        root.handlers[:] = handlers
        return details

    return analyze


def assert_peer_reads(details, num_layers):
    assert len(details) == num_layers
    assert details.alpha.tolist() == pytest.approx([2.0] * num_layers, abs=0.01)
    assert details.ERG_gap.tolist() == [0] * num_layers


def project_all(model):
    for matrix in weight_matrices(model):
        assert isinstance(ManifoldProjection().project_(matrix), Projected)
    return model


@pytest.mark.parametrize("matrix", [gaussian, heavy_weight])
def test_the_peer_reads_alpha_two_and_no_gap(peer, matrix):
    shapes = [(256, 64), (64, 256), (128, 128), (64, 64), (100, 80)]
    model = nn.Sequential(*[dense(matrix(*shape, seed=1).float()) for shape in shapes])
    assert_peer_reads(peer(project_all(model)), len(shapes))


@pytest.mark.parametrize("shape", [(256, 64), (100, 32), (64, 20), (128, 128)])
def test_the_peer_reads_the_layers_of_the_theory(peer, shape):
    assert_peer_reads(peer(project_all(nn.Sequential(dense(gaussian(*shape))))), 1)


@pytest.mark.parametrize(
    "weight",
    [gaussian(64, 20, seed=9), gaussian(32, 32), heavy_weight(48, 48, seed=2), orthogonal(128)],
    ids=["64x20", "32x32", "heavy 48x48", "orthogonal"],
)
def test_the_peer_reads_small_and_flat_layers(peer, weight):
    assert_peer_reads(peer(project_all(nn.Sequential(dense(weight.float())))), 1)


def test_the_peer_reads_a_convolution(peer):
    model = nn.Sequential(nn.Conv2d(16, 24, 3), nn.Conv2d(40, 32, (2, 1)))
    with torch.no_grad():
        for seed, conv in enumerate(model):
            conv.weight.copy_(gaussian(*conv.weight.flatten(1).shape, seed).view_as(conv.weight))
    assert_peer_reads(peer(project_all(model)), 2)


def test_the_peer_reads_half_precision(peer):
    model = nn.Sequential(dense(gaussian(100, 64, dtype=torch.bfloat16)))
    project_all(model)
    assert model[0].weight.dtype == torch.bfloat16
    details = peer(model.float())
    # the entries are rounded to 8 bits, and so is the trace-log: detX may move by one
    assert details.alpha[0] == pytest.approx(2.0, abs=0.02)
    assert abs(details.ERG_gap[0]) <= 2


def test_the_peer_reads_the_untouched_weights_differently(peer):
    details = peer(nn.Sequential(dense(gaussian(256, 64)), dense(gaussian(128, 128))))
    assert np.all(np.abs(details.alpha - 2) > 0.05)
    assert np.all(details.ERG_gap != 0)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("shape", [(100, 100), (150, 64), (64, 200)])
@pytest.mark.parametrize("matrix", [gaussian, heavy_weight])
def test_a_general_target_is_read_back(matrix, shape, alpha):
    weight, done = project(matrix(*shape).double(), alpha=alpha)
    evals = evals_by_svd(weight)
    # at 1.5 there are one or two tail sizes, and the bulk may be taken for a part of the tail
    width = 0.02 if alpha == 1.5 else 1e-4
    assert fit_power_law(evals).alpha == pytest.approx(alpha, abs=width)
    assert done.alpha == pytest.approx(alpha, abs=width)
    if alpha > 1.5:
        assert done.ERG_gap == 0
        assert done.tail_size == done.fit.num_pl_spikes


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_rescaled_singular_value_decomposition(shape, strength):
    weight = gaussian(*shape, dtype=torch.float64)
    moved, done = project(weight, strength)
    left, svals, right = (x.numpy() for x in torch.linalg.svd(weight, full_matrices=False))
    goal = np.sqrt(critical_spectrum(svals**2).evals)
    literal = np.exp((1 - strength) * np.log(svals) + strength * np.log(goal))
    literal *= np.linalg.norm(svals) / np.linalg.norm(literal)
    np.testing.assert_allclose(moved.numpy(), left * literal @ right, atol=1e-11)
    assert done.strength == strength
    assert done.distance == pytest.approx(
        np.linalg.norm(goal - svals) / np.linalg.norm(svals), rel=1e-9
    )


def test_the_distance_is_that_of_the_weights():
    weight = gaussian(100, 40, dtype=torch.float64)
    moved, done = project(weight)
    assert done.distance == pytest.approx(float((moved - weight).norm() / weight.norm()), rel=1e-9)
    assert project(moved)[1].distance < 1e-9


def test_it_reports_the_spectra_before_and_after():
    weight = gaussian(60, 40)
    moved, done = project(weight, 0.5)
    top = done.before.lambda_max
    np.testing.assert_allclose(done.before.evals, evals_by_svd(weight), rtol=1e-9)
    np.testing.assert_allclose(done.after.evals, evals_by_svd(moved), atol=1e-5 * top)
    assert done.name == "W"
    assert (done.after.N, done.after.M, done.after.rf) == (60, 40, 1)
    assert done.alpha == done.fit.alpha == fit_power_law(done.after.positive).alpha


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_twice_is_once(dtype):
    once, _ = project(gaussian(100, 64, dtype=dtype))
    twice, done = project(once)
    eps = torch.finfo(dtype).eps
    assert done.distance < 4 * eps
    assert float((twice.double() - once.double()).norm() / once.double().norm()) < 8 * eps


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_frobenius_norm_is_kept(dtype, strength):
    weight = gaussian(100, 64, dtype=dtype)
    moved, _ = project(weight, strength)
    rounding = torch.finfo(dtype).eps / 4  # of independent entries, it averages out
    assert float(moved.double().norm()) == pytest.approx(
        float(weight.double().norm()), rel=max(rounding, 1e-13)
    )


@pytest.mark.parametrize("exponent", [-60, -3, 60])
def test_a_power_of_two_scales_the_result_exactly(exponent):
    weight = gaussian(80, 50)
    moved, done = project(weight)
    scaled, scaled_done = project(weight * 2.0**exponent)
    assert torch.equal(scaled, moved * 2.0**exponent)
    assert scaled_done.distance == done.distance


def permutation(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


SYMMETRIES = {
    "transpose": lambda w: w.T,
    "rows": lambda w: w[permutation(len(w))],
    "columns": lambda w: w[:, permutation(w.shape[1])],
    "rotate left": lambda w: orthogonal(len(w)) @ w,
    "rotate right": lambda w: w @ orthogonal(w.shape[1]),
    "sign": lambda w: -w,
}


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_it_commutes_with_every_symmetry_of_the_singular_values(symmetry, strength):
    act, weight = SYMMETRIES[symmetry], gaussian(70, 40, dtype=torch.float64)
    first, _ = project(act(weight), strength)
    last, _ = project(weight, strength)
    torch.testing.assert_close(first, act(last), atol=1e-11, rtol=0)


def test_a_longer_step_ends_nearer():
    weight = heavy_weight(120, 60)
    left = [project(project(weight, s)[0])[1].distance for s in (0, 0.1, 0.3, 0.5, 0.8, 0.95, 1)]
    assert left[0] == pytest.approx(project(weight)[1].distance)
    assert np.all(np.diff(left) < 0)
    assert left[-1] < 1e-9


def test_repeated_small_steps_arrive():
    weight = gaussian(100, 50, dtype=torch.float64)
    projection = ManifoldProjection()
    distances = [projection.project_(weight, 0.3).distance for _ in range(30)]
    assert np.all(np.diff(distances) < 0)
    assert distances[-1] < 1e-4 * distances[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_changes_no_bit(dtype):
    weight = gaussian(100, 64, dtype=dtype)
    moved, done = project(weight, 0.0)
    assert torch.equal(moved, weight)
    assert isinstance(done, Projected)
    assert done.distance == project(weight)[1].distance
    np.testing.assert_array_equal(done.after.evals, done.before.evals)


def test_weights_change_in_place_and_need_no_gradient():
    layer = nn.Linear(40, 60)
    weight, storage = layer.weight, layer.weight.data_ptr()
    before = weight.detach().clone()
    (matrix,) = weight_matrices(layer)
    ManifoldProjection().project_(matrix)
    assert layer.weight is weight
    assert weight.data_ptr() == storage
    assert weight.requires_grad
    assert weight.is_leaf
    assert weight.grad is None
    assert not torch.equal(weight, before)


def test_a_view_is_written_through():
    both = torch.cat([gaussian(60, 40), gaussian(60, 40, seed=1)])
    before = both.clone()
    ManifoldProjection().project_(both[:60])
    assert torch.equal(both[60:], before[60:])
    torch.testing.assert_close(both[:60], project(before[:60])[0], atol=0, rtol=0)


def test_a_convolution_has_one_tail_for_all_its_slices():
    conv = nn.Conv2d(16, 24, 3)
    with torch.no_grad():
        conv.weight.copy_(gaussian(24, 144).view(24, 16, 3, 3))
    before = conv.weight.detach().clone().double()
    (matrix,) = weight_matrices(conv)
    done = ManifoldProjection().project_(matrix, 1.0)
    slices = [(i, j) for i in range(3) for j in range(3)]
    parts = [torch.linalg.svd(before[:, :, i, j], full_matrices=False) for i, j in slices]
    pooled = np.concatenate([part.S.numpy() ** 2 for part in parts])
    order = np.argsort(pooled)[::-1]
    critical = critical_spectrum(pooled[order])
    goal = np.empty(len(pooled))
    goal[order] = np.sqrt(critical.evals)
    for n, ((i, j), part) in enumerate(zip(slices, parts, strict=True)):
        svals = torch.from_numpy(goal[16 * n : 16 * (n + 1)])
        literal = part.U * svals @ part.Vh
        torch.testing.assert_close(conv.weight[:, :, i, j].double(), literal, atol=1e-5, rtol=0)
    assert done.tail_size == critical.tail_size


def test_zero_singular_values_stay_zero():
    weight = gaussian(60, 40, dtype=torch.float64) @ gaussian(40, 50, 1, torch.float64)
    moved, done = project(weight)
    evals = evals_by_svd(moved)
    assert done.before.matrix_rank == 40
    assert np.count_nonzero(evals > 1e-20 * evals[-1]) == 40
    assert done.tail_size in feasible_tail_sizes(50, rank=40)
    assert done.alpha == pytest.approx(2.0, abs=0.01)


def poisoned(value):
    weight = gaussian(60, 40)
    weight[3, 4] = value
    return weight


def read_only(weight):
    return WeightMatrix("some.layer", "dense", weight[None], read_only="because")


UNFIT = {
    "NaN": (lambda: poisoned(math.nan), "NaN or infinite"),
    "infinite": (lambda: poisoned(math.inf), "NaN or infinite"),
    "squares overflow": (lambda: gaussian(60, 40, dtype=torch.float64) * 1e200, "overflow"),
    "zero": (lambda: torch.zeros(60, 40), "all weights are zero"),
    "rank one": (lambda: gaussian(60, 1) @ gaussian(1, 40), "rank 1 of 40 is too low"),
    "few eigenvalues": (lambda: gaussian(60, 19), "19 eigenvalues, fewer than min_evals=20"),
    "empty": (lambda: torch.zeros(60, 0), "empty"),
}


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_be_projected_is_skipped_and_untouched(case, strength):
    make, reason = UNFIT[case]
    weight = make()
    moved, skipped = project(weight, strength)
    assert isinstance(skipped, Skipped)
    assert reason in skipped.reason
    torch.testing.assert_close(moved, weight, atol=0, rtol=0, equal_nan=True)


def test_a_read_only_matrix_is_skipped_with_its_own_reason():
    weight = gaussian(60, 40)
    before = weight.clone()
    assert ManifoldProjection().project_(read_only(weight)) == Skipped("some.layer", "because")
    assert torch.equal(weight, before)


def test_no_room_for_a_critical_spectrum_is_said():
    weight = gaussian(60, 40)
    moved, skipped = project(weight, alpha=1.2)
    assert skipped.reason == "no critical spectrum of 40 eigenvalues has alpha 1.2"
    assert torch.equal(moved, weight)


def test_a_result_that_overflows_is_not_written():
    # one dominant direction is spread over many: entries of float16 near its maximum grow
    weight = torch.zeros(64, 64, dtype=torch.float16)
    weight.diagonal().fill_(60000.0)
    moved, skipped = project(weight)
    assert skipped == Skipped("W", "the result would overflow torch.float16")
    assert torch.equal(moved, weight)


@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18])
def test_tiny_and_huge_weights_are_projected_all_the_same(factor):
    weight = gaussian(100, 64)
    moved, done = project(weight * factor)
    assert done.alpha == pytest.approx(2.0, abs=1e-6)
    torch.testing.assert_close(moved / factor, project(weight)[0], atol=1e-5, rtol=0)


def test_min_evals_is_a_setting():
    weight = gaussian(60, 19)
    moved, done = project(weight, min_evals=19)
    assert isinstance(done, Projected)
    assert not torch.equal(moved, weight)


@pytest.mark.parametrize("strength", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_strength_outside_zero_to_one(strength):
    weight = gaussian(60, 40)
    before = weight.clone()
    with pytest.raises(ValueError, match="strength must be between 0 and 1"):
        ManifoldProjection().project_(weight, strength)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("alpha", [1.0, 0.0, -2.0, math.nan, math.inf])
def test_alpha_must_be_above_one(alpha):
    with pytest.raises(ValueError, match="alpha must be a finite number above 1"):
        ManifoldProjection(alpha=alpha)


@pytest.mark.parametrize("shape", [(60,), (3, 60, 40), ()])
def test_a_tensor_must_be_a_matrix(shape):
    with pytest.raises(ValueError, match="expected a matrix, got a tensor of shape"):
        ManifoldProjection().project_(torch.ones(shape))


def test_the_global_generator_is_untouched():
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    project(gaussian(60, 40))
    assert torch.equal(torch.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002


def test_complex_weights_are_refused_or_left_alone():
    weight = torch.complex(gaussian(60, 40), gaussian(60, 40, seed=1))
    before = weight.clone()
    with contextlib.suppress(TypeError, ValueError):
        ManifoldProjection().project_(weight)
    assert torch.equal(weight, before)


def test_an_array_is_refused_with_a_clear_message():
    with pytest.raises(TypeError, match="Tensor"):
        ManifoldProjection().project_(np.ones((60, 40)))


# A projection of one's own


class Flattening(SpectralProjection):
    """Moves every singular value towards their root mean square."""

    def move(self, spectrum, strength):
        svals = np.sqrt(spectrum.evals[::-1])
        goal = np.sqrt(spectrum.evals.mean())
        off = float(np.linalg.norm(svals - goal) / np.linalg.norm(svals))
        return Move((svals + strength * (goal - svals)) ** 2, off, len(svals))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_projection_needs_only_say_where_the_eigenvalues_go(shape):
    weight = gaussian(*shape, dtype=torch.float64)
    svals = np.sqrt(evals_by_svd(weight))
    done = Flattening().project_(weight, 0.25)
    goal = np.linalg.norm(svals) / np.sqrt(len(svals))
    np.testing.assert_allclose(np.sqrt(evals_by_svd(weight)), 0.75 * svals + 0.25 * goal, rtol=1e-9)
    np.testing.assert_allclose(done.after.evals, evals_by_svd(weight), rtol=1e-9)
    assert (done.strength, done.tail_size) == (0.25, len(svals))


class Nowhere(SpectralProjection):
    def move(self, spectrum, strength):
        return "nowhere to go"


def test_a_projection_may_say_why_not():
    weight = gaussian(60, 40)
    before = weight.clone()
    assert Nowhere().project_(weight, 1.0) == Skipped("W", "nowhere to go")
    assert torch.equal(weight, before)


def test_the_operator_is_given_only_if_the_weights_have_changed():
    seen = []
    for weight in (gaussian(60, 40), torch.zeros(60, 40), gaussian(60, 10), poisoned(math.nan)):
        ManifoldProjection().project_(weight, 0.5, then=seen.append)
    Nowhere().project_(gaussian(60, 40), 0.5, then=seen.append)
    assert len(seen) == 1


def test_the_operator_of_a_step_of_nothing_is_the_identity():
    weight, seen = gaussian(60, 40, dtype=torch.float64), []
    ManifoldProjection().project_(weight, 0.0, then=seen.append)
    torch.testing.assert_close(seen[0](weight[None])[0], weight, rtol=1e-12, atol=1e-12)
