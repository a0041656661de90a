import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from ww_train import measure, tracking
from ww_train.power_law import fit_power_law
from ww_train.rayleigh import Basis, eigenbasis, in_basis, rayleigh_quotients, repulsion
from ww_train.sensitivity import alpha_error
from ww_train.tracking import AlphaTracker, tracked
from ww_train.weights.matrices import weight_matrices

from .oracles import (
    dense,
    evals_by_svd,
    gaussian,
    heavy,
    orthogonal,
    pareto,
    power_law_scan,
    quick,
)


@pytest.fixture(autouse=True)
def tracks_small_layers(monkeypatch):
    monkeypatch.setattr(tracking, "SMALLEST", 24)


def powers(rows, cols, alpha=3.0, seed=0):
    """Float64 weights whose spectrum is a power law: xmin is not in doubt."""
    n = min(rows, cols)
    svals = torch.as_tensor(pareto(n, alpha, seed)).sqrt()
    left, right = orthogonal(rows, seed)[:, :n], orthogonal(cols, seed + 1)[:n]
    return (left * svals) @ right


def model_of(*weights):
    return nn.Sequential(*(dense(w) for w in weights))


def drift(weight, size, seed=9):
    """Change a parameter in place by noise of this relative size."""
    noise = gaussian(*weight.shape, seed, torch.float64)
    weight.data += (noise * (size * weight.detach().double().norm() / noise.norm())).to(
        weight.dtype
    )


def literal_error(evals, fit, shift):
    """`alpha_error` by trying every xmin."""
    moves = []
    for i in range(len(evals) - 1):
        tail = evals[i:] / evals[i]
        n = len(tail)
        alpha = 1 + n / np.log(tail).sum()
        distance = np.abs(1 - tail ** (1 - alpha) - np.arange(n) / n).max()
        if distance <= fit.D + 0.15 * shift * (alpha - 1 + fit.alpha - 1):
            moves.append(abs(alpha - fit.alpha) + shift * (alpha - 1) ** 2)
    return max(moves)


@pytest.mark.parametrize("shift", [1e-6, 1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_the_bar_is_that_of_all_rivals_of_xmin(shift, seed):
    evals = np.linalg.svd(heavy(120, 60, seed), compute_uv=False)[::-1] ** 2
    fit = fit_power_law(evals)
    assert fit.alpha == pytest.approx(power_law_scan(evals)[2])
    assert alpha_error(evals, fit, shift) == pytest.approx(literal_error(evals, fit, shift))


def test_the_bar_grows_with_the_shift_and_not_with_the_scale():
    evals = np.linalg.svd(heavy(120, 60), compute_uv=False)[::-1] ** 2
    fit = fit_power_law(evals)
    bars = [alpha_error(evals, fit, shift) for shift in np.geomspace(1e-7, 1, 20)]
    assert bars == sorted(bars)
    assert bars[0] == pytest.approx(1e-7 * (fit.alpha - 1) ** 2)
    scaled = fit_power_law(1e9 * evals)
    assert alpha_error(1e9 * evals, scaled, 1e-3) == pytest.approx(alpha_error(evals, fit, 1e-3))


def test_equal_eigenvalues_at_the_top_are_no_rival():
    evals = np.concatenate([pareto(40, 2.5), [1e3, 1e3]])
    fit = fit_power_law(np.sort(evals))
    assert math.isfinite(alpha_error(np.sort(evals), fit, 1e-3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (48, 48)])
def test_a_first_read_is_what_measure_says(dtype, shape):
    model = model_of(powers(*shape).to(dtype))
    (layer,) = AlphaTracker(model).read()
    (full,) = measure(model)
    assert layer.refreshed
    assert 0 < layer.error < 1e-4
    assert abs(layer.alpha - full.alpha) <= layer.error
    assert layer.fit.num_pl_spikes == full.fit.num_pl_spikes
    assert pytest.approx(full.fit.D, abs=1e-5) == layer.fit.D
    assert layer.fit.xmin == pytest.approx(full.fit.xmin, rel=1e-5)


def test_unchanged_weights_read_exactly_the_same_without_a_decomposition():
    tracker = AlphaTracker(model_of(powers(60, 40)))
    (first,), *others = (tracker.read().layers for _ in range(4))
    for (layer,) in others:
        assert not layer.refreshed
        assert (layer.fit, layer.error) == (first.fit, first.error)


def test_reading_changes_neither_weights_nor_the_global_generator_nor_gradients():
    model = model_of(powers(60, 40).float())
    model[0].weight.requires_grad_()
    before, state = model[0].weight.detach().clone(), torch.get_rng_state()
    tracker = AlphaTracker(model)
    tracker.read()
    tracker.read()
    assert torch.equal(model[0].weight, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].weight.grad is None


def test_rows_may_be_rotated_and_weights_scaled_without_new_vectors():
    weight = powers(60, 40)
    model = model_of(weight)
    tracker = AlphaTracker(model)
    (first,) = tracker.read()
    for factor, rotation in ((1.0, orthogonal(60, 3)), (1e-3, torch.eye(60).double())):
        model[0].weight.data = factor * rotation @ weight
        (layer,) = tracker.read()
        assert not layer.refreshed
        assert layer.alpha == pytest.approx(first.alpha, abs=1e-5)
        assert layer.fit.xmin == pytest.approx(factor**2 * first.fit.xmin, rel=1e-5)


def quotients_of(weight, basis):
    """Rayleigh quotients and the off-diagonal part, by definition, of one slice in float64."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    vectors = (basis.vectors[0] / basis.scale).double()
    nearly_diagonal = vectors.T @ tall.T @ tall @ vectors
    diagonal = nearly_diagonal.diagonal()
    return diagonal, nearly_diagonal - torch.diag(diagonal)


@quick
@given(seed=st.integers(0, 10**6), size=st.floats(1e-4, 1.0), wide=st.booleans())
def test_quotients_are_bounded_by_what_is_certain(seed, size, wide):
    weight = powers(*((20, 30) if wide else (30, 20)), seed=seed)
    basis = eigenbasis(weight[None])
    drift(weight, size, seed + 1)
    quotients = rayleigh_quotients(in_basis(weight[None], basis))[0] / basis.scale**2
    expected, off = quotients_of(weight, basis)
    torch.testing.assert_close(quotients, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
    evals = torch.as_tensor(evals_by_svd(weight))
    scale, rounding = float(evals.max()), 1e-5
    ascending = quotients.sort().values
    assert float(evals.sum()) == pytest.approx(float(quotients.sum()), rel=rounding)  # trace
    above = evals.flip(0).cumsum(0) - ascending.flip(0).cumsum(0)
    assert above.min() > -rounding * scale * 20  # Schur-Horn
    assert (evals - ascending).norm() <= off.norm() + rounding * scale  # Hoffman-Wielandt
    nearest = (evals[:, None] - quotients).abs().min(dim=0).values
    assert (nearest <= off.norm(dim=0) + rounding * scale).all()  # a residual and its eigenvalue


def test_the_correction_is_exact_for_a_pair_and_of_third_order_for_all():
    pair = torch.tensor([[3.0, 0.4], [0.0, 1.0]], dtype=torch.float64)
    basis = Basis(torch.eye(2, dtype=torch.float64)[None], 1.0)
    product = in_basis(pair[None], basis)
    quotients = rayleigh_quotients(product)[0]
    corrected = quotients + repulsion(product[0], quotients, torch.tensor([0, 1]))
    np.testing.assert_allclose(corrected.sort().values, evals_by_svd(pair), rtol=1e-14)
    errors = []
    for size in (1e-2, 1e-3):
        weight = orthogonal(30, 1)[:, :20] * torch.linspace(1, 5, 20).double()
        basis = Basis(torch.eye(20, dtype=torch.float64)[None], 1.0)
        drift(weight, size)
        product = in_basis(weight[None], basis)
        quotients = rayleigh_quotients(product)[0]
        corrected = quotients + repulsion(product[0], quotients, torch.arange(20))
        errors.append(np.abs(corrected.sort().values.numpy() - evals_by_svd(weight)).max())
    assert errors[1] < errors[0] / 300


def test_equal_levels_and_zero_columns_have_finite_corrections():
    product = torch.zeros(4, 3)
    product[0, :2] = 1.0
    shifts = repulsion(product, rayleigh_quotients(product[None])[0], torch.tensor([0, 1, 2]))
    assert shifts.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("seed", range(3))
def test_a_read_in_old_vectors_follows_its_definition(size, seed):
    weight = torch.as_tensor(heavy(100, 80, seed))
    basis = eigenbasis(weight[None])
    drift(weight, size, seed)
    (matrix,) = weight_matrices(weight)
    diagonal, off = quotients_of(weight, basis)
    distance, squares = diagonal[:, None] - diagonal, off**2
    pairs = 2 * squares / (distance.abs() + (distance**2 + 4 * squares).sqrt())
    missing = (pairs * distance.sign()).nan_to_num().sum(dim=1)
    number = fit_power_law(diagonal.sort().values.numpy()).num_pl_spikes
    missing[diagonal < diagonal.sort().values[-min(80, number + number // 4 + 16)]] = 0.0
    evals, order = (diagonal + missing).sort()
    fit = fit_power_law(evals.numpy())
    relative = missing[order] / evals.clamp_min(evals[-fit.num_pl_spikes])
    shift = 1e-6 + 3 * float((relative[-fit.num_pl_spikes :] ** 2).mean().sqrt())
    layer = tracked(matrix, basis)
    assert layer.alpha == pytest.approx(fit.alpha, rel=1e-5)
    if relative.abs().max() > 0.02:
        assert layer.error == math.inf
    else:
        assert layer.error == pytest.approx(literal_error(evals.numpy(), fit, shift), rel=1e-2)


def steep(cols, exponent, seed):
    """Singular values that fall as a power of their rank: many xmin fit nearly as well."""
    svals = torch.arange(1, cols + 1).double() ** -exponent
    return ((orthogonal(2 * cols, seed)[:, :cols] * svals) @ orthogonal(cols, seed + 1)).float()


def one_entry(size):
    def jump(weight, seed):
        weight[3 + seed, 5] += size * weight.abs().max()

    return jump


def rank_one(size):
    def jump(weight, seed):
        left, right = (
            nn.functional.normalize(gaussian(n, 1, seed + n), dim=0) for n in weight.shape
        )
        weight += size * torch.linalg.matrix_norm(weight, 2) * left @ right.T

    return jump


def clip(weight, _):
    weight.clamp_(-3 * weight.std(), 3 * weight.std())


def zero_column(weight, seed):
    weight[:, seed] = 0.0


JUMPS = {
    "half an entry": one_entry(0.5),
    "one entry": one_entry(1.0),
    "five times an entry": one_entry(5.0),
    "little of rank one": rank_one(0.01),
    "rank one": rank_one(0.03),
    "clip": clip,
    "column": zero_column,
}


@pytest.mark.parametrize("tolerance", [0.02, 0.1])
@pytest.mark.parametrize("name", JUMPS)
def test_after_a_jump_alpha_is_within_the_bar_or_the_layer_is_decomposed(name, tolerance):
    within = []
    for seed in range(6):
        for exponent in (0.4, 0.5, 0.8, 1.2):
            model = model_of(steep(80, exponent, seed))
            tracker = AlphaTracker(model, tolerance=tolerance)
            tracker.read()
            JUMPS[name](model[0].weight.data, seed)
            (layer,), (full,) = tracker.read(), measure(model)
            within.append(abs(layer.alpha - full.alpha) <= layer.error + 1e-12)
    assert np.mean(within) >= 0.95


def test_one_large_correction_is_enough_to_refresh():
    model = model_of(powers(80, 60).float())
    tracker = AlphaTracker(model, tolerance=10.0)
    tracker.read()
    one_entry(5.0)(model[0].weight.data, 0)
    (matrix,) = weight_matrices(model)
    layer = tracked(matrix, tracker._tracks["0"].basis)
    assert layer.alpha > 1
    assert layer.error == math.inf
    assert tracker.read()["0"].refreshed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_automatic_casting_changes_nothing(dtype):
    def reads(casting):
        model = model_of(steep(80, 0.6, 0))
        tracker = AlphaTracker(model)
        with torch.autocast("cpu", dtype, enabled=casting):
            found = [tracker.read()["0"]]
            drift(model[0].weight, 1e-4)
            found.append(tracker.read()["0"])
            assert torch.is_autocast_enabled("cpu") == casting
        return found

    assert reads(True) == reads(False)
    assert not reads(True)[1].refreshed


def test_alpha_lies_within_the_bar_after_a_drift():
    within = []
    for seed in range(60):
        weight = torch.as_tensor(heavy(100, 80, seed))
        basis = eigenbasis(weight[None])
        drift(weight, (1e-4, 1e-3, 1e-2)[seed % 3], seed)
        (matrix,) = weight_matrices(weight)
        (full,), layer = measure(weight), tracked(matrix, basis)
        within.append(abs(layer.alpha - full.alpha) <= layer.error)
    assert np.mean(within) >= 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_to_half_precision_is_a_drift_like_any_other(dtype):
    model = model_of(powers(60, 40).float())
    tracker = AlphaTracker(model, tolerance=1.0)
    tracker.read()
    model.to(dtype)
    (layer,), (full,) = tracker.read(), measure(model)
    assert not layer.refreshed
    assert abs(layer.alpha - full.alpha) <= layer.error < 0.1


def test_eigenvalues_of_zero_are_not_taken_for_a_tail():
    weight = powers(60, 30) @ orthogonal(40)[:30]
    model = model_of(weight.float())
    tracker = AlphaTracker(model)
    for size in (0.0, 1e-4):
        drift(model[0].weight, size)
        (layer,), (full,) = tracker.read(), measure(model)
        assert layer.error > 0
        assert abs(layer.alpha - full.alpha) <= layer.error


def test_a_small_drift_is_followed_and_a_large_one_refreshes():
    model = model_of(powers(80, 60))
    tracker = AlphaTracker(model, tolerance=0.02)
    tracker.read()
    for seed in range(3):
        drift(model[0].weight, 1e-3, seed)
        (layer,), (full,) = tracker.read(), measure(model)
        assert not layer.refreshed
        assert abs(layer.alpha - full.alpha) <= layer.error <= 0.02
    drift(model[0].weight, 0.3)
    (layer,), (full,) = tracker.read(), measure(model)
    assert layer.refreshed
    assert abs(layer.alpha - full.alpha) <= layer.error <= 1e-3


def test_the_tolerance_decides_when_to_refresh():
    def refreshes(tolerance):
        model = model_of(powers(80, 60))
        tracker = AlphaTracker(model, tolerance=tolerance)
        count = 0
        for seed in range(20):
            count += tracker.read().layers[0].refreshed
            drift(model[0].weight, 3e-3, seed)
        return count

    assert refreshes(10.0) == 1
    assert refreshes(10.0) < refreshes(0.02) < refreshes(1e-4)


def decompositions(model, drifts):
    """How each read was made: in "o"ld or "n"ew vectors or in "f"ull."""
    tracker = AlphaTracker(model)
    found = ""
    for seed, size in enumerate(drifts):
        (layer,) = tracker.read()
        found += "f" if layer.error == 0 else "n" if layer.refreshed else "o"
        drift(model[0].weight, size, seed)
    return found


def test_what_drifts_too_fast_is_decomposed_in_full_ever_longer():
    found = decompositions(model_of(powers(60, 40)), [0.3] * 60)
    assert found.startswith("nffnfffnfffffn")
    assert max(map(len, found.split("n"))) == 17


def test_vectors_that_last_forgive_what_was_before():
    found = decompositions(model_of(powers(60, 40)), [0.3] * 7 + [1e-5] * 8 + [0.3] * 7)
    assert found == "nffnfff" + "nooooooo" + "onffnff"


def test_full_decompositions_are_exact():
    model = model_of(powers(60, 40))
    tracker = AlphaTracker(model, tolerance=1e-9)
    for _ in range(3):
        (layer,), (full,) = tracker.read(), measure(model)
        assert layer == tracking.TrackedLayer("0", full.fit, 0.0, refreshed=True)


def test_what_lasts_two_reads_is_made_anew_at_once():
    found = decompositions(model_of(powers(80, 60)), [3e-3] * 30)
    assert "f" not in found
    assert found.startswith("noo")
    assert found.count("n") > 1


def test_small_layers_and_what_is_not_in_memory_are_decomposed_in_full(tmp_path):
    (full,) = measure(model_of(powers(60, 40)))
    save_file({"0.weight": powers(60, 40)}, tmp_path / "model.safetensors")
    for model in (model_of(powers(60, 23)), tmp_path / "model.safetensors"):
        tracker = AlphaTracker(model)
        layers = [tracker.read().layers for _ in range(2)]
        assert [(layer.error, layer.refreshed) for (layer,) in layers] == [(0.0, True)] * 2
    assert layers[0][0].fit == full.fit


def test_without_float64_or_memory_layers_are_decomposed_in_full(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    model = model_of(powers(60, 40))
    (full,) = measure(model)
    for name, replacement in (
        ("has_float64", lambda _: False),
        ("eigenbasis", no_memory),
        ("in_basis", no_memory),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(tracking, name, replacement)
            (layer,) = AlphaTracker(model).read()
        assert (layer.fit, layer.error) == (full.fit, 0.0)


def test_a_convolution_pools_its_slices():
    weight = torch.as_tensor(np.random.default_rng(0).standard_t(2.5, (40, 30, 3, 2))).float()
    model = nn.Conv2d(30, 40, (3, 2), bias=False)
    model.weight.data = weight
    tracker = AlphaTracker(model)
    tracker.read()
    drift(model.weight.data.view(40, -1), 1e-4)
    (layer,), (full,) = tracker.read(), measure(model)
    assert not layer.refreshed
    assert abs(layer.alpha - full.alpha) <= layer.error < 0.01
    assert layer.fit.xmin == pytest.approx(full.fit.xmin, rel=1e-4)


def test_weights_that_are_not_finite_or_zero_are_skipped_with_the_reason_and_come_back():
    weight = powers(60, 40)
    model = model_of(weight.clone(), powers(50, 40))
    tracker = AlphaTracker(model)
    tracker.read()
    for bad in (math.nan, math.inf, 0.0):
        model[0].weight.data = weight * bad
        reading, report = tracker.read(), measure(model)
        assert [layer.name for layer in reading] == ["1"]
        assert reading.skipped == report.skipped
    model[0].weight.data = weight.clone()
    assert tracker.read()["0"].alpha == pytest.approx(measure(model)["0"].alpha, abs=1e-4)


def test_layers_that_appear_disappear_or_change_their_shape_are_decomposed():
    model = model_of(powers(60, 40))
    tracker = AlphaTracker(model)
    tracker.read()
    model.append(dense(powers(50, 40)))
    model[0].weight.data = powers(70, 45)
    assert [(layer.name, layer.refreshed) for layer in tracker.read()] == [("0", True), ("1", True)]
    del model[1]
    assert [(layer.name, layer.refreshed) for layer in tracker.read()] == [("0", False)]
    model.append(dense(powers(50, 40)))
    assert [layer.refreshed for layer in tracker.read()] == [False, True]


def test_what_measure_skips_is_skipped_and_layers_can_be_chosen():
    model = model_of(powers(60, 40), powers(60, 5), powers(60, 40, seed=3))
    reading = AlphaTracker(model).read()
    assert reading.skipped == measure(model).skipped
    assert len(reading) == 2
    assert [layer.name for layer in AlphaTracker(model, layers="2").read()] == ["2"]


def test_a_spectrum_without_a_tail_has_no_alpha_and_no_error():
    (layer,) = AlphaTracker(model_of(orthogonal(40))).read()
    assert (layer.alpha, layer.fit, layer.error) == (None, None, None)


def test_extreme_scales_neither_overflow_nor_vanish():
    weight = powers(60, 40)
    for factor in (1e-18, 1e18):
        model = model_of((weight * factor).float())
        tracker = AlphaTracker(model)
        tracker.read()
        (layer,), (full,) = tracker.read(), measure(model)
        assert not layer.refreshed
        assert layer.alpha == pytest.approx(full.alpha, abs=1e-4)


def test_coarser_products_are_not_used(monkeypatch):
    basis = eigenbasis(gaussian(40, 30)[None])
    assert basis.vectors.dtype == torch.float32
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert eigenbasis(gaussian(40, 30)[None]).vectors.dtype == torch.float64


def test_scalars_are_tags_and_numbers():
    reading = AlphaTracker(model_of(powers(60, 40), orthogonal(40))).read()
    layer = reading["0"]
    assert reading.scalars() == {"ww_alpha/0": layer.alpha, "ww_alpha_error/0": layer.error}


def test_bad_input_is_refused_when_the_tracker_is_made():
    model = model_of(powers(60, 40))
    for tolerance in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"positive error of alpha, got {tolerance}"):
            AlphaTracker(model, tolerance=tolerance)
    with pytest.raises(ValueError, match="nosuch"):
        AlphaTracker(model, layers="nosuch")
    with pytest.raises(TypeError, match=r"nn\.Module"):
        AlphaTracker(3)
    with pytest.raises(KeyError, match="no layer '7' was tracked; tracked: 0"):
        AlphaTracker(model).read()["7"]
