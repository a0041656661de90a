import numpy as np
import pytest
import torch

from ww_train import linalg, measure
from ww_train.linalg import (
    all_finite,
    float32_eigenvalues,
    gram,
    gram_eigenvalues,
    svd_eigenvalues,
    symmetric_eigenvalues,
)
from ww_train.weights.matrices import weight_matrices

from .oracles import evals_by_svd, gaussian, orthogonal, stack_of

SHAPES = [(40, 30), (30, 40), (32, 32), (1, 20), (20, 1), (1, 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def evals_of(weight):
    (matrix,) = weight_matrices(weight)
    return gram_eigenvalues(matrix.stack).flatten().numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_eigenvalues_are_squared_singular_values(shape, dtype):
    weight = gaussian(*shape, dtype=dtype)
    expected = evals_by_svd(weight)
    evals = evals_of(weight)
    assert evals.dtype == np.float64
    assert np.all(np.diff(evals) >= 0)
    np.testing.assert_allclose(evals, expected, rtol=1e-12, atol=1e-13 * expected[-1])


@pytest.mark.parametrize("rank", [1, 5])
def test_eigenvalues_of_a_singular_matrix_are_never_negative(rank):
    weight = gaussian(60, rank) @ gaussian(rank, 40, seed=1)
    evals = evals_of(weight)
    assert evals.min() >= 0
    assert np.count_nonzero(evals > 1e-9 * evals[-1]) == rank


@pytest.mark.parametrize(("rows", "cols"), [(7, 4), (4, 7), (5, 5)])
def test_gram_is_the_product_over_the_longer_side(rows, cols):
    stack = stack_of(3, rows, cols)
    literal = np.zeros((3, min(rows, cols), min(rows, cols)))
    for s, w in enumerate(stack.double().numpy()):
        tall = w if rows >= cols else w.T
        for i in range(tall.shape[1]):
            for j in range(tall.shape[1]):
                literal[s, i, j] = 4.0 * sum(tall[k, i] * tall[k, j] for k in range(tall.shape[0]))
    result = gram(stack, scale=2.0)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result.numpy(), literal, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bytes_a_chunk", [1, 8 * 3 * 10 * 7, 1 << 27])
def test_gram_does_not_depend_on_the_chunk(monkeypatch, bytes_a_chunk):
    stack = stack_of(3, 50, 10)
    monkeypatch.setattr(linalg, "CHUNK_BYTES", bytes_a_chunk)
    expected = stack.double().mT @ stack.double()
    np.testing.assert_allclose(gram(stack).numpy(), expected.numpy(), rtol=1e-12, atol=1e-12)


def test_gram_leaves_the_weights_alone():
    stack = stack_of(2, 9, 5)
    before = stack.clone()
    gram(stack, scale=3.0)
    assert torch.equal(stack, before)


def test_slices_are_pooled_and_scaled():
    weight = stack_of(12, 10, 3, 3)
    slices = [weight[:, :, i, j] for i in range(3) for j in range(3)]
    layer = measure({"conv.weight": weight})["conv"]
    expected = evals_by_svd(*slices, scale=0.5**0.5)
    np.testing.assert_allclose(layer.spectrum.evals, expected, rtol=1e-11, atol=1e-12)


def test_the_exact_solver_resolves_what_a_gram_matrix_cannot():
    svals = np.geomspace(1.0, 1e-12, 20)
    weight = orthogonal(40)[:, :20] * torch.from_numpy(svals) @ orthogonal(20)
    exact = svd_eigenvalues(weight[None]).flatten().numpy()
    np.testing.assert_allclose(np.sqrt(exact), svals[::-1], rtol=1e-3)
    by_gram = gram_eigenvalues(weight[None]).flatten().numpy()
    assert abs(np.sqrt(by_gram[0]) / svals[-1] - 1) >= 1  # clamped to zero, or far too large


def test_the_fast_solver_is_good_to_single_precision():
    stack = stack_of(2, 64, 40)
    exact = gram_eigenvalues(stack)
    fast = float32_eigenvalues(stack)
    assert fast.dtype == torch.float64
    assert (fast / exact - 1).abs().max() < 1e-3
    assert not torch.equal(fast, exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_matrix_spoils_only_itself(bad):
    good, broken = gram(stack_of(1, 30, 12))[0], gram(stack_of(1, 30, 12, seed=1))[0]
    expected = symmetric_eigenvalues(good[None])[0]
    broken[3, 4] = bad
    first, middle, last = symmetric_eigenvalues(torch.stack([good, broken, good]))
    assert middle.isnan().all()
    assert torch.equal(first, expected)
    assert torch.equal(last, expected)


def test_the_fallback_solves_each_matrix_on_its_own():
    good = gram(stack_of(1, 30, 12))[0]
    poison = torch.full_like(good, torch.nan)  # LAPACK refuses the whole batch for this one
    batch = torch.stack([good, poison, good])
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.eigvalsh(batch)
    evals = linalg.symmetric_eigenvalues(batch)
    assert not evals[1].isfinite().any()
    assert torch.equal(evals[0], torch.linalg.eigvalsh(good))
    assert torch.equal(evals[2], evals[0])


@pytest.mark.parametrize("exponent", [-40, 40])
def test_a_power_of_two_scales_eigenvalues_exactly(exponent):
    weight = gaussian(40, 30)
    np.testing.assert_array_equal(
        evals_of(weight * 2.0**exponent), evals_of(weight) * 4.0**exponent
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.T,
        lambda w: w.flip(0),
        lambda w: w[:, torch.randperm(30, generator=torch.Generator().manual_seed(1))],
        lambda w: orthogonal(40) @ w,
        lambda w: w @ orthogonal(30),
        lambda w: -w,
    ],
    ids=["transpose", "rows", "columns", "rotate left", "rotate right", "sign"],
)
def test_what_does_not_change_the_eigenvalues(change):
    weight = gaussian(40, 30, dtype=torch.float64)
    evals = evals_of(weight)
    np.testing.assert_allclose(evals_of(change(weight)), evals, rtol=1e-11, atol=1e-13 * evals[-1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, None])
def test_one_bad_number_is_enough(dtype, bad):
    values = gaussian(40, 30).to(dtype)
    assert all_finite(values)
    if bad is not None:
        values[17, 5] = bad
        assert not all_finite(values)


@pytest.mark.parametrize(
    "solver", [gram_eigenvalues, svd_eigenvalues, float32_eigenvalues], ids=lambda f: f.__name__
)
def test_a_slice_that_is_not_finite_spoils_only_itself(solver):
    stack = stack_of(3, 20, 10)
    stack[1, 3, 4] = torch.nan
    evals = solver(stack)
    assert evals[1].isnan().all()
    for i in (0, 2):
        torch.testing.assert_close(evals[i : i + 1], solver(stack[i : i + 1]))


def test_one_bad_layer_is_skipped_whatever_the_arithmetic():
    state = {"a.weight": gaussian(30, 20), "b.weight": gaussian(30, 20)}
    state["a.weight"][2, 3] = torch.inf
    for options in ({"eigensolver": svd_eigenvalues}, {"inverse": True}):
        report = measure(state, **options)
        assert [layer.name for layer in report] == ["b"]
        assert [layer.name for layer in report.skipped] == ["a"]
