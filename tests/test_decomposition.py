import threading

import numpy as np
import pytest
import torch

from ww_train import decomposition
from ww_train.decomposition import Job, decompose, work
from ww_train.linalg import gram_eigenvalues

from .oracles import stack_of

CPU = torch.device("cpu")


def job(*stacks):
    return Job(lambda: stacks, min(stacks[0].shape[1:]), stacks[0].device)


def test_work_is_that_of_the_decomposition():
    assert work(300, 30) == 300 * 30**2 + 4 / 3 * 30**3
    assert work(300, 30, rf=9) == 9 * work(300, 30)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("large", [1, 1024])
def test_many_layers_give_what_each_gives_alone(monkeypatch, threads, large):
    monkeypatch.setattr(decomposition, "LARGE", large)
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
    monkeypatch.setattr(decomposition, "LARGE", large)
    monkeypatch.setattr(decomposition, "LOAD_BYTES", limit)
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


def test_a_job_without_stacks_has_no_eigenvalues():
    empty = Job(list, 12, torch.device("cpu"))
    assert list(decompose([empty])) == [(0, [])]


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
