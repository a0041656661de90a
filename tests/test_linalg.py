import threading

import numpy as np
import pytest
import torch

from ww_train import linalg, measure
from ww_train.linalg import (
    Job,
    decompose,
    float32_eigenvalues,
    gram,
    gram_eigenvalues,
    svd_eigenvalues,
    symmetric_eigenvalues,
)
from ww_train.weights.matrices import weight_matrices

from .oracles import evals_by_svd, gaussian, orthogonal

CPU = torch.device("cpu")
SHAPES = [(40, 30), (30, 40), (32, 32), (1, 20), (20, 1), (1, 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def evals_of(weight):
    (matrix,) = weight_matrices(weight)
    return gram_eigenvalues(matrix.stack).flatten().numpy()


def job(*stacks):
    return Job(lambda: stacks, min(stacks[0].shape[1:]), stacks[0].device)


def stack_of(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("large", [1, 1024])
def test_many_layers_give_what_each_gives_alone(monkeypatch, threads, large):
    monkeypatch.setattr(linalg, "LARGE", large)
    stacks = [stack_of(rf, 30, 12, seed=rf) for rf in (1, 4, 2)]
    together = dict(decompose([job(stacks[0]), job(*stacks[1:2] * 2), job(stacks[2])]))
    assert torch.get_num_threads() == threads
    shapes = [[tuple(e.shape) for e in together[i]] for i in range(3)]
    assert shapes == [[(1, 12)], [(4, 12), (4, 12)], [(2, 12)]]
    for i, stack in enumerate(stacks):
        alone = gram_eigenvalues(stack)
        np.testing.assert_allclose(together[i][0].numpy(), alone.numpy(), rtol=1e-12, atol=1e-13)


class Shelf:
    """Jobs whose weights are brought and taken away, and the most that were there at a time."""

    def __init__(self, sizes, **options):
        self.here, self.order, self.most = {}, [], 0
        self.jobs = [self.job(i, size, **options) for i, size in enumerate(sizes)]

    def job(self, i, size, **options):
        def load():
            self.here[i] = stack_of(1, 30, size, seed=i)
            self.order.append((i, threading.get_ident()))
            self.most = max(self.most, len(self.here))

        stacks = lambda: [self.here[i]]  # noqa: E731
        release = lambda: self.here.pop(i)  # noqa: E731
        return Job(stacks, size, torch.device("cpu"), load, release, nbytes=100, **options)


@pytest.mark.parametrize(
    ("large", "limit", "most"),
    [(1, 1 << 28, 2), (1024, 1, 1), (1024, 300, 3), (1024, 1 << 28, 10)],
    ids=["large: this and the next", "no room", "room for three", "room for all"],
)
def test_few_layers_are_in_memory_at_a_time(monkeypatch, threads, large, limit, most):
    monkeypatch.setattr(linalg, "LARGE", large)
    monkeypatch.setattr(linalg, "LOAD_BYTES", limit)
    shelf = Shelf([12, 9] * 5)
    for i, (evals,) in decompose(shelf.jobs):
        assert i in shelf.here  # for what is measured besides
        assert torch.equal(evals, gram_eigenvalues(shelf.here[i]))
    assert shelf.here == {}
    assert [i for i, _ in shelf.order] == list(range(10))  # each once
    assert shelf.most <= (most if threads == 2 else 2)


def test_what_all_processes_must_load_is_loaded_in_the_callers_thread(threads):
    for collective in (False, True):
        shelf = Shelf([12, 9, 12], collective=collective)
        list(decompose(shelf.jobs))
        here = {thread == threading.get_ident() for _, thread in shelf.order}
        assert here == {collective}


def test_stopping_early_takes_everything_down(threads):
    shelf = Shelf([12] * 6)
    running = threading.active_count()
    solved = decompose(shelf.jobs)
    next(solved)
    solved.close()
    assert threading.active_count() == running
    assert torch.get_num_threads() == threads


def test_an_accelerator_gets_batches_of_one_size(monkeypatch):
    # the bookkeeping of batches, on the only device here: three sizes, a budget of two matrices
    monkeypatch.setattr(linalg, "BATCH_BYTES", 2 * 8 * 12 * 12)
    stacks = [stack_of(1, 30, M, seed=i) for i, M in enumerate((12, 9, 12, 12, 9, 5))]
    results = dict(linalg._batched([job(s) for s in stacks], list(range(6))))
    for i, stack in enumerate(stacks):
        alone = gram_eigenvalues(stack)
        np.testing.assert_allclose(results[i][0].numpy(), alone.numpy(), rtol=1e-12, atol=1e-13)


def test_a_job_without_stacks_has_no_eigenvalues():
    empty = Job(list, 12, torch.device("cpu"))
    assert list(decompose([empty])) == [(0, [])]
    assert next(linalg._batched([empty, job(stack_of(1, 30, 12))], [0, 1])) == (0, [])
    assert list(linalg._batched([empty], [0])) == [(0, [])]


def test_an_error_in_one_layer_reaches_the_caller_and_restores_the_threads(threads):
    def fails():
        raise KeyError("weights")

    good = job(stack_of(1, 30, 12))
    for bad in (
        Job(fails, 12, CPU),
        Job(list, 12, CPU, load=fails),
        Job(list, 12, CPU, fails, nbytes=1),
    ):
        with pytest.raises(KeyError, match="weights"):
            list(decompose([good, bad, good]))
        assert torch.get_num_threads() == threads


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
    evals = linalg._one_by_one(batch)
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
