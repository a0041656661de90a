"""The path of an accelerator, on the only device that is everywhere."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ww_train import batching, decomposition
from ww_train.batching import Bucket, warn_once
from ww_train.decomposition import Job
from ww_train.linalg import gram, gram_eigenvalues, symmetric_eigenvalues

from .oracles import stack_of

CPU = torch.device("cpu")
SIZES = (12, 9, 12, 12, 9, 5, 12)


def jobs(*more):
    stacks = [stack_of(1 + M % 3, 30, M, seed=i) for i, M in enumerate(SIZES)]
    return stacks, [Job(lambda s=s: [s, 2 * s], s.shape[-1], CPU) for s in stacks]


def solve(chosen, route="batched"):
    order = list(range(len(chosen)))
    return dict(decomposition._batched(chosen, order, CPU, lambda n, number: route, warn_once()))


def assert_right(results, stacks):
    assert sorted(results) == list(range(len(stacks)))
    for i, stack in enumerate(stacks):
        expected = gram_eigenvalues(stack).numpy()
        own, double = results[i]
        np.testing.assert_allclose(own.numpy(), expected, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(double.numpy(), 4 * expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("route", ["batched", "looped", "host"])
@pytest.mark.parametrize("limit", [1, 5 * 8 * 12 * 12, 1 << 28])
def test_every_way_gives_what_each_layer_gives_alone(monkeypatch, route, limit):
    monkeypatch.setattr(batching, "BATCH_BYTES", limit)
    stacks, chosen = jobs()
    assert_right(solve(chosen, route), stacks)


class Counted(TorchDispatchMode):
    """How often an operation is called that an accelerator and the host must wait for."""

    WAITS = ("_local_scalar_dense", "_linalg_eigh", "nonzero", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITS:
            self.calls.append(name)
        return function(*args, **(kwargs or {}))


def test_each_size_waits_once(monkeypatch):
    _, chosen = jobs()
    with Counted() as counted:
        solve(chosen)
    assert counted.calls == ["_linalg_eigh"] * len(set(SIZES))


def test_the_way_is_asked_for_the_size_and_the_number():
    asked = []
    bucket = Bucket(CPU, lambda *question: (asked.append(question), "looped")[1], bool)
    for i in range(3):
        list(bucket.add(i, lambda: [stack_of(2, 30, 12)]))
    assert [owner for owner, _ in bucket.solve()] == [0, 1, 2]
    assert asked == [(12, 6)]
    assert list(bucket.solve()) == []


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_batch_that_is_too_large_is_halved(monkeypatch, most):
    sizes = []

    def short_of_memory(grams):
        if len(grams) > most:
            raise torch.OutOfMemoryError("no memory")
        sizes.append(len(grams))
        return symmetric_eigenvalues(grams)

    monkeypatch.setattr(batching, "symmetric_eigenvalues", short_of_memory)
    stacks, chosen = jobs()
    with pytest.warns(UserWarning, match="memory of cpu does not suffice") as caught:
        assert_right(solve(chosen), stacks)
    assert len(caught) == 1
    assert max(sizes) == most


def test_what_does_not_fit_alone_goes_to_the_host(monkeypatch):
    tries = itertools.count()

    def no_memory_at_first(grams):
        if next(tries) == 0:
            raise torch.OutOfMemoryError("no memory")
        return symmetric_eigenvalues(grams)

    monkeypatch.setattr(batching, "symmetric_eigenvalues", no_memory_at_first)
    warned = []
    bucket = Bucket(CPU, lambda *_: "batched", warned.append)
    stack = stack_of(1, 30, 12)
    list(bucket.add(0, lambda: [stack]))
    ((_, (evals,)),) = bucket.solve()
    assert torch.equal(evals, gram_eigenvalues(stack))
    assert warned == [CPU]


@pytest.mark.parametrize("failures", [1, 2])
def test_without_memory_for_a_product_the_waiting_ones_are_solved_first(monkeypatch, failures):
    tries = itertools.count()

    def short_of_memory(stack):
        if next(tries) in (2, 3)[:failures]:
            raise torch.OutOfMemoryError("no memory")
        return gram(stack)

    monkeypatch.setattr(batching, "gram", short_of_memory)
    warned, retreats, stack = [], [], stack_of(2, 30, 12)
    bucket = Bucket(CPU, lambda *_: "batched", warned.append)
    assert list(bucket.add(0, lambda: [stack, stack])) == []
    ((owner, _),) = bucket.add(1, lambda: [stack, stack], lambda: retreats.append(1))
    ((other, evals),) = bucket.solve()
    assert (owner, other, warned) == (0, 1, [CPU])
    assert len(retreats) == failures - 1
    assert len(evals) == 2
    for part in evals:
        assert torch.equal(part, gram_eigenvalues(stack))


def test_a_layer_without_stacks_has_no_eigenvalues():
    empty = Job(list, 12, CPU)
    assert solve([empty]) == {0: []}
    assert solve([empty, *jobs()[1]])[0] == []


def test_one_bad_matrix_spoils_only_itself():
    stacks, chosen = jobs()
    stacks[2][0, 3, 4] = torch.nan
    results = solve(chosen)
    assert results[2][0][0].isnan().all()
    assert all(part.isfinite().all() for i in (0, 3, 6) for part in results[i])


def test_the_warning_is_given_once():
    warn = warn_once()
    with pytest.warns(UserWarning, match="fewer layers at a time"):
        warn(CPU)
    warn(CPU)
