import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ww_train.spectrum import Spectrum

from .oracles import evals_by_svd, gaussian, pareto, quick


def spectrum_of(weight):
    """Spectrum of a 2-D weight, its eigenvalues by the oracle."""
    rows, cols = weight.shape
    eps = torch.finfo(weight.dtype).eps
    return Spectrum(evals_by_svd(weight), max(rows, cols), min(rows, cols), eps=eps)


def test_norms_are_those_of_the_matrix():
    weight = gaussian(40, 30, dtype=torch.float64)
    s = spectrum_of(weight)
    frobenius, spectral = float((weight**2).sum()), float(torch.linalg.matrix_norm(weight, 2)) ** 2
    assert s.norm == pytest.approx(frobenius, rel=1e-12)
    assert s.lambda_max == pytest.approx(spectral, rel=1e-12)
    assert s.log_norm == pytest.approx(math.log10(frobenius), rel=1e-12)
    assert s.log_spectral_norm == pytest.approx(math.log10(spectral), rel=1e-12)
    assert s.stable_rank == pytest.approx(frobenius / spectral, rel=1e-12)
    assert s.sv_max == pytest.approx(math.sqrt(spectral), rel=1e-12)
    assert s.sv_min == pytest.approx(float(torch.linalg.svdvals(weight)[-1]), rel=1e-12)
    assert pytest.approx(4 / 3) == s.Q


@pytest.mark.parametrize("n", [2, 5, 200])
def test_entropy_is_one_for_equal_eigenvalues(n):
    assert Spectrum(np.full(n, 3.0), n, n).entropy == pytest.approx(1.0, rel=1e-12)


def test_entropy_is_relative_to_the_rank():
    assert Spectrum(np.array([0.0, 0.0, 3.0, 3.0]), 4, 4).entropy == pytest.approx(1.0, rel=1e-12)


def test_entropy_is_zero_for_one_eigenvalue():
    assert Spectrum(np.array([0.0, 0.0, 5.0]), 3, 3).entropy == 0.0


@quick
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=30))
def test_entropy_is_the_literal_sum(values):
    s = Spectrum(np.sort(np.array(values)), len(values), len(values))
    p = [v / math.fsum(values) for v in values]
    literal = -math.fsum(x * math.log(x) for x in p) / math.log(len(p))
    assert s.entropy == pytest.approx(literal, rel=1e-9, abs=1e-9)
    assert -1e-12 <= s.entropy <= 1 + 1e-12


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.7, 40.0, 7517.7])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_log_alpha_norm_is_the_exact_sum_even_where_powers_overflow(alpha, scale):
    evals = pareto(50, 2.5) * scale
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 60, 10**9, -(10**9)
        exact = float(sum(Decimal(float(x)) ** Decimal(alpha) for x in evals).log10())
    assert Spectrum(evals, 50, 50).log_alpha_norm(alpha) == pytest.approx(exact, rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 8, 40])
@pytest.mark.parametrize("scale", [2.0**-10, 1.0, 2.0**10])
def test_rank_is_that_before_rounding_to_the_stored_dtype(dtype, rank, scale):
    factors = gaussian(256, rank, 1, torch.float64), gaussian(rank, 128, 2, torch.float64)
    weight = (factors[0] @ factors[1] * (scale / math.sqrt(rank))).to(dtype)
    s = spectrum_of(weight)
    assert s.matrix_rank == rank
    assert s.rank_loss == 128 - rank
    assert len(s.positive) == rank


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_random_matrix_has_full_rank(dtype):
    s = spectrum_of(gaussian(256, 128, dtype=dtype))
    assert (s.matrix_rank, s.rank_loss) == (128, 0)


def test_rank_is_scale_invariant_in_float32():
    weight = gaussian(256, 8, 1) @ gaussian(8, 128, 2)
    ranks = {spectrum_of(weight * s).matrix_rank for s in (1e-15, 1e-6, 1.0, 1e6, 1e15)}
    assert ranks == {8}


def test_weak_rank_loss_counts_relative_to_the_largest():
    s = Spectrum(np.array([1e-9, 1e-7, 1e-5, 1.0]), 4, 4)
    assert s.weak_rank_loss() == 2
    assert s.weak_rank_loss(1e-8) == 1
    assert Spectrum(s.evals * 1e-20, 4, 4).weak_rank_loss() == 2


def test_normalized_has_mean_one_and_keeps_ratios():
    evals = pareto(50, 2.5)
    normalized = Spectrum(evals, 50, 50).normalized()
    assert normalized.mean() == pytest.approx(1.0, rel=1e-12)
    np.testing.assert_allclose(normalized / normalized[0], evals / evals[0], rtol=1e-12)


@pytest.mark.parametrize("factor", [1e-30, 1e-15, 1e15, 1e30])
def test_scaling_moves_norms_and_nothing_else(factor):
    evals = pareto(60, 2.5)
    s, scaled = Spectrum(evals, 90, 60), Spectrum(evals * factor, 90, 60)
    for name in ("stable_rank", "matrix_rank", "rank_loss", "entropy", "Q"):
        assert getattr(scaled, name) == pytest.approx(getattr(s, name), rel=1e-12)
    for name in ("norm", "lambda_max", "floor"):
        assert getattr(scaled, name) == pytest.approx(getattr(s, name) * factor, rel=1e-12)
    shift = 2.5 * math.log10(factor)
    assert scaled.log_alpha_norm(2.5) == pytest.approx(s.log_alpha_norm(2.5) + shift, rel=1e-12)
