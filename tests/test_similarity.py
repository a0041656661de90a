import numpy as np
import pytest
import scipy.linalg
import torch

from ww_train.comparing.similarity import Decomposed, centred_cka, linear_cka, tail_overlaps, unit
from ww_train.weights.matrices import WeightMatrix

from .oracles import gaussian, orthogonal

SHAPES = [(40, 24), (24, 40), (30, 30)]


def stack(rows, cols, seed=0):
    return gaussian(rows, cols, seed, torch.float64)[None]


def cka_of_kernels(x, y, centre):
    """Kornblith et al., equation 3 with linear kernels: the alignment of the two Gram matrices."""
    n = len(x)
    h = np.eye(n) - centre * np.ones((n, n)) / n
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    return np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))


@pytest.mark.parametrize("shape", SHAPES)
def test_cka_is_the_alignment_of_kernels(shape):
    a, b = stack(*shape), stack(*shape, 1) + 0.3
    b += 0.5 * a
    x, y = a[0].numpy(), b[0].numpy()
    assert linear_cka(a, b) == pytest.approx(cka_of_kernels(x, y, 0), rel=1e-12)
    assert centred_cka(a, b) == pytest.approx(cka_of_kernels(x, y, 1), rel=1e-12)


@pytest.mark.parametrize("cka", [linear_cka, centred_cka])
@pytest.mark.parametrize("shape", SHAPES)
def test_laws_of_cka(cka, shape):
    a, b = stack(*shape), stack(*shape, 1)
    value = cka(a, b)
    assert 0.0 < value < 1.0
    assert cka(b, a) == pytest.approx(value)
    assert cka(-3e-9 * a, 1e7 * b) == pytest.approx(value)
    assert cka(a @ orthogonal(shape[1], 2), b @ orthogonal(shape[1], 3)) == pytest.approx(value)
    assert cka(a, a) == pytest.approx(1.0, abs=1e-14)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(0))
    assert cka(a[:, order], b[:, order]) == pytest.approx(value)
    assert cka(a[:, order], b) != pytest.approx(value, rel=1e-3)


def test_cka_of_slices_is_that_of_the_block_diagonal_matrix():
    a = torch.cat([stack(12, 7, seed) for seed in range(3)])
    b = torch.cat([stack(12, 7, seed) for seed in range(3, 6)])
    blocks = [torch.block_diag(*x)[None] for x in (a, b)]
    assert linear_cka(a, b) == pytest.approx(linear_cka(*blocks), rel=1e-12)


def test_equal_rows_have_no_centred_cka():
    row = torch.full((1, 9, 5), 0.1, dtype=torch.float64) * torch.arange(1, 6)
    assert centred_cka(row, stack(9, 5)) is None
    assert centred_cka(stack(9, 5), row) is None
    assert linear_cka(row, stack(9, 5)) > 0.0


def layer(weights):
    return Decomposed.of(weights, WeightMatrix("w", "dense", weights))


def principal_cosines(x, y, k):
    """Mean squared cosines of the k largest left and right singular vectors, by scipy's angles."""
    (u, _, v), (p, _, q) = (np.linalg.svd(w, full_matrices=False) for w in (x, y))
    spaces = [(u[:, :k], p[:, :k]), (v[:k].T, q[:k].T)]
    return [np.mean(np.cos(scipy.linalg.subspace_angles(*pair)) ** 2) for pair in spaces]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 5, 24])
def test_overlaps_are_the_cosines_of_principal_angles(shape, k):
    a, b = stack(*shape), stack(*shape, 1)
    found = tail_overlaps(layer(a), layer(b), k)
    assert found == pytest.approx(principal_cosines(a[0].numpy(), b[0].numpy(), k), rel=1e-9)


def test_overlaps_of_slices_are_those_of_the_block_diagonal_matrix():
    a = torch.cat([stack(12, 7, seed) * (seed + 1) for seed in range(3)])
    b = torch.cat([stack(12, 7, seed) * (seed + 1) for seed in range(3, 6)])
    x, y = (torch.block_diag(*w).numpy() for w in (a, b))
    assert tail_overlaps(layer(a), layer(b), 6) == pytest.approx(principal_cosines(x, y, 6))


def test_overlap_with_itself_is_one_and_directions_that_are_lacking_do_not_overlap():
    a = stack(40, 24)
    assert tail_overlaps(layer(a), layer(2.0 * a), 7) == pytest.approx((1.0, 1.0))
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    thin = (u[..., :3] * s[..., None, :3]) @ v[:, :3]
    assert tail_overlaps(layer(a), layer(thin), 6) == pytest.approx((0.5, 0.5))


def test_unit_takes_off_rounding_only():
    assert (unit(1.0 + 1e-15), unit(-1.0 - 1e-15), unit(0.3)) == (1.0, -1.0, 0.3)
