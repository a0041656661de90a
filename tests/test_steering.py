import copy
import dataclasses
import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ww_train import (
    ManifoldProjection,
    Projected,
    Skipped,
    WeightMatrix,
    project_,
    weight_matrices,
)
from ww_train.batching import warn_once
from ww_train.power_law import fit_power_law
from ww_train.steering import tasks as tasks_room
from ww_train.steering.projection import Move, SpectralProjection
from ww_train.steering.tasks import Failed, Task, assign, project_all_

from .oracles import evals_by_svd, gaussian, quick, zoo
from .training import assert_projected, collect, net, same, weights


def layers(*shapes, dtype=torch.float32, seed=0):
    """Linear layers in one model."""
    model = nn.Module()
    for i, (rows, cols) in enumerate(shapes):
        layer = nn.Linear(cols, rows, bias=False)
        layer.weight = nn.Parameter(gaussian(rows, cols, seed + i, dtype))
        model.add_module(f"l{i}", layer)
    return model


def tasks_of(model, projection=None):
    projection = projection or ManifoldProjection()
    return [Task(m, projection) for m in weight_matrices(model) if isinstance(m, WeightMatrix)]


def close(model, other, tolerance):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def assert_same_outcomes(first, second):
    assert [type(a) for a in first] == [type(b) for b in second]
    for a, b in zip(first, second, strict=True):
        assert a.name == b.name
        if isinstance(a, Projected):
            assert (a.strength, a.tail_size) == (b.strength, b.tail_size)
            assert a.distance == pytest.approx(b.distance, rel=1e-9)
            np.testing.assert_allclose(a.after.evals, b.after.evals, rtol=1e-9, atol=1e-12)
        else:
            assert a.reason == b.reason


@pytest.fixture
def threads():
    """Sets the number of threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Which projection


def named(*names):
    return [WeightMatrix(name, "dense", gaussian(30, 20)[None]) for name in names]


A, B, C = (ManifoldProjection(alpha=alpha) for alpha in (2.0, 3.0, 4.0))


@pytest.mark.parametrize(
    ("projections", "expected"),
    [
        (B, [B, B, B]),
        ({"enc.0": A, "enc.*": B, "*": C}, [A, B, C]),
        ({"*": C, "enc.0": A}, [C, C, C]),
        ({re.compile(r"\.\d$"): B, "head": A}, [B, B, A]),
        ({-1: A, 0: B}, [B, None, A]),
        ({("head", "enc.0"): A}, [A, None, A]),
        ({"-head": A}, [A, A, None]),
        ({}, [None, None, None]),
    ],
    ids=["one", "first wins", "all first", "regex", "position", "several", "all but", "none"],
)
def test_the_first_pattern_that_matches_gives_the_projection(projections, expected):
    found = assign(named("enc.0", "enc.1", "head"), projections)
    assert [getattr(task, "projection", None) for task in found] == expected
    for task in found:
        if isinstance(task, Skipped):
            assert task.reason == "no pattern of the projections matches it"


def test_what_is_skipped_stays_so_with_its_reason():
    skipped = Skipped("emb", "an embedding")
    assert assign([skipped, *named("fc")], {"emb": A, "fc": B})[0] is skipped
    assert assign([skipped], A) == [skipped]


@pytest.mark.parametrize("pattern", ["hed", "enc.2"])
def test_a_pattern_without_a_layer_names_the_nearest(pattern):
    nearest = {"hed": "head", "enc.2": r"enc\.[01]"}[pattern]
    with pytest.raises(ValueError, match=f"no layer matches '{pattern}'; did you mean '{nearest}'"):
        assign(named("enc.0", "enc.1", "head"), {"*": A, pattern: B})


# Many at once

SHAPE = st.tuples(st.integers(15, 60), st.integers(15, 60))


@pytest.mark.parametrize("number", [1, 3])
@quick
@given(st.lists(SHAPE, max_size=6), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_together_is_one_by_one(number, shapes, strength, seed):
    model = layers(*shapes, seed=seed)
    before = torch.get_num_threads()
    twin = copy.deepcopy(model)
    try:
        torch.set_num_threads(number)
        together = project_all_(tasks_of(model), strength)
        assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
    alone = [task.projection.project_(task.matrix, strength) for task in tasks_of(twin)]
    assert_same_outcomes(together, alone)
    assert same(model, twin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_the_zoo_together_is_one_by_one(threads, dtype, strength):
    model = zoo().to(dtype)
    twin = copy.deepcopy(model)
    threads(3)
    projection = ManifoldProjection(min_evals=10)
    together = project_all_(tasks_of(model, projection), strength)
    threads(1)
    alone = [projection.project_(task.matrix, strength) for task in tasks_of(twin)]
    assert_same_outcomes(together, alone)
    assert same(model, twin)
    assert sum(isinstance(outcome, Projected) for outcome in together) > 10


def test_large_layers_use_all_threads_in_turn(threads, monkeypatch):
    monkeypatch.setattr(tasks_room, "LARGE", 40)  # a real one takes seconds
    model = layers((60, 50), (60, 30), (50, 60), (25, 35), seed=5)
    twin = copy.deepcopy(model)
    threads(2)
    outcomes = project_all_(tasks_of(model), 1.0)
    threads(1)
    alone = [task.projection.project_(task.matrix, 1.0) for task in tasks_of(twin)]
    assert_same_outcomes(outcomes, alone)
    close(model, twin, 1e-6)


def test_nothing_to_project(threads):
    threads(2)
    assert project_all_([], 1.0) == []


def in_a_batch(tasks, strength, then=None):
    """What an accelerator does."""
    return tasks_room._project_batch(tasks, strength, then, warn_once())


@quick
@given(
    st.integers(20, 40),
    st.lists(st.tuples(st.integers(10, 70), st.booleans()), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 99),
)
def test_a_batch_is_one_by_one(M, sides, strength, seed):
    shapes = [(M + n, M) if tall else (M, M + n) for n, tall in sides]
    model = layers(*shapes, dtype=torch.float64, seed=seed)
    twin = copy.deepcopy(model)
    batch = in_a_batch(tasks_of(model), strength)
    assert_same_outcomes(batch, project_all_(tasks_of(twin), strength))
    close(model, twin, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_convolutions_and_gates(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Conv2d(20, 24, 3), nn.LSTM(30, 20), nn.Linear(20, 50)])
    model = model.to(dtype)
    twin = copy.deepcopy(model)
    tasks = tasks_of(model)
    assert {task.matrix.M for task in tasks} == {20}
    assert_same_outcomes(in_a_batch(tasks, 0.5), project_all_(tasks_of(twin), 0.5))
    close(model, twin, 1e-6 if dtype == torch.float32 else 0.02)


def test_in_a_batch_each_layer_has_its_own_projection_and_operator():
    model = layers((40, 30), (30, 50), (60, 30), dtype=torch.float64)
    twin, seen = copy.deepcopy(model), []
    tasks = [Task(t.matrix, p) for t, p in zip(tasks_of(model), (A, B, C), strict=True)]
    before = [task.matrix.stack.clone() for task in tasks]
    outcomes = in_a_batch(tasks, 1.0, lambda matrix, op: seen.append((matrix, op)))
    assert [outcome.alpha for outcome in outcomes] == pytest.approx([2.0, 3.0, 4.0], abs=1e-6)
    assert [matrix for matrix, _ in seen] == [task.matrix for task in tasks]
    for (matrix, operator), old in zip(seen, before, strict=True):
        torch.testing.assert_close(operator(old), matrix.stack)
    assert not same(model, twin)


def unfit(model):
    """Layers of one Gram size that are skipped for three reasons, and two that are not."""
    with torch.no_grad():
        model.l1.weight[2, 3] = torch.nan
        model.l2.weight.zero_()
    return [Task(t.matrix, t.projection) for t in tasks_of(model)]


def test_in_a_batch_a_layer_that_is_skipped_does_not_stop_the_others():
    model = layers((40, 30), (40, 30), (30, 60), (50, 30))
    tasks = unfit(model)
    locked = WeightMatrix("locked", "dense", gaussian(40, 30)[None], read_only="because")
    tasks.insert(1, Task(locked, ManifoldProjection()))
    first, second, third, fourth, fifth = in_a_batch(tasks, 1.0)
    assert second == Skipped("locked", "because")
    assert "NaN" in third.reason
    assert fourth.reason == "all weights are zero"
    assert isinstance(first, Projected)
    assert isinstance(fifth, Projected)
    assert_projected(nn.ModuleList([model.l0, model.l3]))


def test_a_batch_of_which_every_layer_is_skipped():
    tasks = tasks_of(layers((40, 8), (8, 30)))
    assert [outcome.reason for outcome in in_a_batch(tasks, 1.0)] == [
        "8 eigenvalues, fewer than min_evals=20"
    ] * 2
    broken = layers((40, 30), (40, 30))
    with torch.no_grad():
        for weight in broken.parameters():
            weight.fill_(torch.inf)
    assert all("infinite" in outcome.reason for outcome in in_a_batch(tasks_of(broken), 1.0))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.linalg.LinAlgError])
def test_a_batch_that_fails_is_done_one_by_one(monkeypatch, error):
    eigh = torch.linalg.eigh

    def small_only(grams):  # neither can be provoked for a batch, let alone here
        if len(grams) > 1:
            raise error("too many")
        return eigh(grams)

    model = layers((40, 30), (30, 50), (60, 30))
    twin = copy.deepcopy(model)
    expected = project_all_(tasks_of(twin), 0.5)
    monkeypatch.setattr(torch.linalg, "eigh", small_only)
    assert_same_outcomes(in_a_batch(tasks_of(model), 0.5), expected)
    assert same(model, twin)


@quick
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), max_size=12), st.integers(1, 2000))
def test_batches_hold_one_size_and_little_memory(layers, limit):
    tasks = [
        Task(WeightMatrix(str(i), "dense", torch.zeros(rf, M, M + 2)), ManifoldProjection())
        for i, (M, rf) in enumerate(layers)
    ]
    before = tasks_room.BATCH_BYTES
    try:
        tasks_room.BATCH_BYTES = limit
        batches = list(tasks_room._batches(tasks, range(len(tasks))))
    finally:
        tasks_room.BATCH_BYTES = before
    assert sorted(i for batch in batches for i in batch) == list(range(len(tasks)))
    for batch in batches:
        (M,) = {tasks[i].matrix.M for i in batch}
        held = sum(tasks[i].matrix.rf for i in batch) * M * M * 8
        assert held <= limit or len(batch) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_an_accelerator_does_what_the_cpu_does(strength):
    model = zoo().double()
    twin = copy.deepcopy(model).cuda()
    projection = ManifoldProjection(min_evals=10)
    expected = project_all_(tasks_of(model, projection), strength)
    assert_same_outcomes(project_all_(tasks_of(twin, projection), strength), expected)
    close(model, twin.cpu(), 1e-9)


# What goes wrong


class Halfway(SpectralProjection):
    """Fails on some layers after it has written to them."""

    def __init__(self, *names, error=RuntimeError):
        self.names, self.error = names, error

    def move(self, spectrum, strength):
        evals = spectrum.evals[::-1]
        return Move(np.ascontiguousarray(evals) * 0.5, 0.5, len(evals))

    def apply_(self, matrix, strength, evals, vectors, *, then=None):
        done = super().apply_(matrix, strength, evals, vectors, then=then)
        if matrix.name in self.names:
            raise self.error("broke off")
        return done


def all_ways(threads):
    """The three ways in which layers are projected."""

    def in_parallel(tasks, strength, then=None):
        threads(3)
        return project_all_(tasks, strength, then)

    return {"alone": project_all_, "in parallel": in_parallel, "batch": in_a_batch}


WAYS = pytest.mark.parametrize("way", ["alone", "in parallel", "batch"])


@WAYS
def test_a_layer_that_fails_is_put_back_and_the_others_are_projected(threads, way):
    model = layers((40, 30), (30, 40), (50, 30))
    before = copy.deepcopy(model)
    outcomes = all_ways(threads)[way](tasks_of(model, Halfway("l1")), 1.0)
    assert [type(outcome) for outcome in outcomes] == [Projected, Failed, Projected]
    assert outcomes[1].reason == "the projection failed: RuntimeError: broke off"
    assert isinstance(outcomes[1].error, RuntimeError)
    assert torch.equal(model.l1.weight, before.l1.weight)
    torch.testing.assert_close(model.l0.weight, before.l0.weight * 0.5**0.5)
    torch.testing.assert_close(model.l2.weight, before.l2.weight * 0.5**0.5)


@WAYS
def test_a_layer_is_put_back_if_what_is_called_after_it_fails(threads, way):
    model = layers((40, 30), (30, 40), (50, 30))
    before = copy.deepcopy(model)

    def then(matrix, operator):
        operator(matrix.stack)
        if matrix.name != "l0":
            raise ValueError("and then")

    outcomes = all_ways(threads)[way](tasks_of(model), 1.0, then)
    assert [type(outcome) for outcome in outcomes] == [Projected, Failed, Failed]
    assert torch.equal(model.l1.weight, before.l1.weight)
    assert torch.equal(model.l2.weight, before.l2.weight)
    assert not torch.equal(model.l0.weight, before.l0.weight)


class Refusing(ManifoldProjection):
    """A projection of one's own that fails before it begins."""

    def refusal(self, matrix):
        raise KeyError("refusal")


def test_a_projection_that_fails_before_the_decomposition_does_not_stop_the_batch():
    model = layers((40, 30), (30, 40))
    tasks = tasks_of(model)
    tasks[0] = Task(tasks[0].matrix, Refusing())
    failed, done = in_a_batch(tasks, 1.0)
    assert isinstance(failed, Failed)
    assert isinstance(done, Projected)


def test_the_number_of_threads_is_put_back_whatever_is_raised(threads):
    threads(3)
    with pytest.raises(KeyboardInterrupt):
        project_all_(
            tasks_of(layers((40, 30), (30, 40)), Halfway("l1", error=KeyboardInterrupt)), 1
        )
    assert torch.get_num_threads() == 3
    seen = []
    worker = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    worker.start()
    worker.join(60)
    assert seen == [3]  # a new thread takes over the number that was set last


# Contexts


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_in_every_context_weights_change_and_can_be_trained_on(threads, context, number):
    model = net()
    threads(number)
    with context():
        outcomes = project_all_(tasks_of(model), 1.0, lambda matrix, op: op(matrix.stack))
    assert [type(outcome) for outcome in outcomes] == [Projected, Projected]
    assert_projected(model)
    model(gaussian(3, 24)).sum().backward()
    assert all(p.is_leaf and p.grad is not None for p in model.parameters())


def test_from_another_thread(threads):
    model, twin, outcomes = net(), net(), []
    threads(2)
    worker = threading.Thread(target=lambda: outcomes.extend(project_all_(tasks_of(model), 1.0)))
    worker.start()
    worker.join(60)
    project_all_(tasks_of(twin), 1.0)
    assert [type(outcome) for outcome in outcomes] == [Projected, Projected]
    assert same(model, twin)
    assert torch.get_num_threads() == 2


# A model at once


def quietly(model, *args, **settings):
    return collect(lambda: project_(model, *args, **settings))[1]


def test_a_model_is_projected_once_and_a_warning_says_what_that_costs():
    model = nn.Sequential(nn.Embedding(30, 24), *net(), nn.Linear(24, 3))
    messages, results = collect(lambda: project_(model))
    assert len(messages) == 1
    assert "a projection of strength 1 costs a finished model accuracy" in messages[0]
    assert [type(result) for result in results] == [Skipped, Projected, Projected, Skipped]
    assert [result.name for result in results] == ["0", "1", "3", "4"]
    assert_projected(model[1:4])


def test_the_warning_points_at_the_caller():
    with pytest.warns(UserWarning, match="costs a finished model accuracy") as caught:
        project_(net())
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("strength", [0.0, 0.05, 0.1])
def test_a_mild_projection_warns_not(strength):
    model = net()
    before = copy.deepcopy(model)
    assert {result.strength for result in project_(model, strength)} == {strength}
    assert same(model, before) == (strength == 0.0)


def test_a_frozen_model_is_projected_and_stays_frozen():
    model = net().requires_grad_(False).eval()
    assert [type(result) for result in quietly(model)] == [Projected, Projected]
    assert_projected(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    ("settings", "projected"),
    [
        ({"include": "2"}, ["2"]),
        ({"exclude": "2"}, ["0"]),
        ({"include": lambda matrix: matrix.stack.shape[1] == matrix.N}, ["0"]),
        ({"projection": {"2": ManifoldProjection()}}, ["2"]),
    ],
)
def test_parts_of_a_model(settings, projected):
    model = net()
    before = copy.deepcopy(model)
    results = quietly(model, **settings)
    assert [result.name for result in results if isinstance(result, Projected)] == projected
    for name in ("0", "2"):
        index = int(name)
        changed = not torch.equal(model[index].weight, before[index].weight)
        assert changed == (name in projected)


def test_alpha_by_pattern():
    model = net()
    quietly(model, projection={"0": ManifoldProjection(alpha=3.0), "*": ManifoldProjection()})
    alphas = [fit_power_law(evals_by_svd(weight)).alpha for weight in weights(model)]
    assert alphas == pytest.approx([3.0, 2.0], abs=1e-3)


def test_a_layer_that_fails_is_in_the_results_and_said():
    model = net()
    projection = {"0": Halfway("0"), "2": ManifoldProjection()}
    messages, (failed, done) = collect(lambda: project_(model, 0.05, projection=projection))
    assert isinstance(failed, Failed)
    assert isinstance(done, Projected)
    assert messages == ["layer 0 is left as it is, the projection failed: RuntimeError: broke off"]


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(24, 3)), nn.Sequential(nn.ReLU())])
def test_a_model_without_a_layer_to_project_is_said(model):
    (message,), _ = collect(lambda: project_(model, 0.1))
    assert message.startswith("no layer is projected (")
    assert "3 eigenvalues, fewer than" in message or "the model holds no matrix" in message


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_is_between_zero_and_one(strength):
    model = net()
    with pytest.raises(ValueError, match="strength must be between 0 and 1, got"):
        project_(model, strength)
    assert same(model, net())


def test_a_pattern_must_match_a_layer():
    with pytest.raises(ValueError, match="no layer matches '9'; the first of"):
        project_(net(), include="9")


@pytest.mark.parametrize("model", [None, "net", torch.ones(30, 20), nn.Linear])
def test_it_takes_a_module(model):
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got"):
        project_(model)


def test_a_device_without_float64_gets_the_weights_of_a_copy(monkeypatch):
    models = [layers((24, 32), (40, 24)) for _ in range(2)]
    project_all_(tasks_of(models[0]), 0.5)
    copies = []

    def to(matrix, device):
        copies.append(device)
        return dataclasses.replace(matrix, weights=matrix.stack.clone(), parameter=None)

    monkeypatch.setattr(tasks_room, "has_float64", lambda device: False)
    monkeypatch.setattr(WeightMatrix, "to", to)
    changed = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = project_all_(tasks_of(models[1]), 0.5, lambda matrix, _: changed.append(matrix))
    finally:
        torch.set_num_threads(before)
    assert all(isinstance(result, Projected) for result in done)
    assert copies == [torch.device("cpu")] * 2
    assert same(*models)
    owners = [matrix.parameter for matrix in changed]
    assert [id(p) for p in owners] == [id(p) for p in models[1].parameters()]
