"""What decompositions cost: curves, the choice of a way, and what is kept on disk."""

import json
import math
from dataclasses import replace

import pytest
import torch

from ww_train import calibration
from ww_train.calibration import cache_file, calibrate, costs_of, machine, stopwatch
from ww_train.costs import Costs, Curve, Machine
from ww_train.operations import (
    eigenvalues_on_host,
    spread_eigenvalues,
    spread_eigenvectors,
    symmetric,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ww_train"


def cubic(factor, sizes=(64, 512, 4096)):
    return Curve(sizes, tuple(factor * n**3 for n in sizes))


def flat(seconds, sizes=(64, 4096)):
    return Curve(sizes, (seconds,) * len(sizes))


def made(**parts):
    """Costs of a device that exists on paper."""
    usual = {
        "machine": Machine("Paper 1", "cuda", "2.99", "13.0", 4),
        "looped": cubic(2e-11),
        "batched": cubic(1e-11),
        "host": Curve(),
        "eigh": cubic(8e-11),
        "gram32": cubic(2e-13),
        "gram16": cubic(1e-13),
        "shuffle": Curve((4096, 1 << 24), (1e-6, 1e-3), 1.0),
        "copy_rate": 1e10,
    }
    return Costs(**(usual | parts))


def modelled(operation, stack):
    """A stopwatch that runs small matrices and says what they would take on a slow device."""
    if stack.shape[-1] <= 128:
        operation(stack)
    return len(stack) * 1e-10 * stack.shape[-1] ** 3


# curves


def test_a_power_law_is_continued_exactly():
    curve = cubic(3e-10, (64, 100, 1000))
    for n in (64, 65, 99, 100, 512, 1000, 1001, 16384):
        assert curve(n) == pytest.approx(3e-10 * n**3, rel=1e-12)


def test_below_the_first_size_seconds_stay_and_above_they_grow_with_the_power():
    curve = Curve((64, 128), (1e-3, 1.1e-3))
    assert curve(1) == curve(64) == 1e-3
    assert curve(256) == pytest.approx(8.8e-3)
    assert Curve((10,), (2.0,), 1.0)(25) == pytest.approx(5.0)
    assert 1e-3 < curve(90) < 1.1e-3


def test_a_curve_of_nothing_is_never_the_fastest():
    assert Curve()(100) == math.inf


@pytest.mark.parametrize(
    ("sizes", "seconds"),
    [
        ((64,), ()),
        ((64, 64), (1.0, 1.0)),
        ((128, 64), (1.0, 1.0)),
        ((0, 64), (1.0, 1.0)),
        ((64,), (math.nan,)),
        ((64,), (0.0,)),
        ((64,), (math.inf,)),
    ],
)
def test_what_is_no_curve_is_refused(sizes, seconds):
    with pytest.raises(ValueError, match="curve"):
        Curve(sizes, seconds)


# the choice


def test_the_fastest_way_is_that_of_least_total_time():
    costs = made(looped=flat(3e-3), batched=flat(1e-3), host=flat(2e-3))
    assert costs.fastest(256, 1) == "host"  # 3, 3 (no batch is faster than one alone), 2
    assert costs.fastest(256, 2) == "batched"  # 6, 3, 4
    assert costs.eigenvalue_seconds(256, 2) == pytest.approx(3e-3)
    assert costs.eigenvalue_seconds(256, 100) == pytest.approx(0.1)
    assert made(looped=flat(1e-3), batched=flat(2e-3)).fastest(256, 50) == "looped"


def test_one_matrix_alone_is_no_batch():
    assert made().fastest(512) == "looped"
    assert made().fastest(512, 2) == "batched"


def test_a_size_of_which_no_two_make_a_batch_is_not_batched():
    costs = made(batched=cubic(1e-12, (64, 512)))
    assert costs.fastest(512, 8) == "batched"
    assert costs.fastest(513, 8) == "looped"


def test_without_float64_only_the_host_is_left():
    costs = made(looped=Curve(), batched=Curve(), host=flat(1e-3))
    assert {costs.fastest(n, k) for n in (8, 64, 5000) for k in (1, 99)} == {"host"}


def test_gram_matrices_cost_by_their_operations():
    costs = made()
    assert costs.gram_seconds(512, 512) == pytest.approx(2e-13 * 512**3)
    assert costs.gram_seconds(5120, 512) == pytest.approx(10 * costs.gram_seconds(512, 512))
    assert costs.gram_seconds(512, 512, torch.bfloat16) == pytest.approx(1e-13 * 512**3)
    assert costs.gram_rate(512) == pytest.approx(1e13)
    # below the smallest size a call costs what it costs, however thin the matrix
    assert costs.gram_seconds(64, 8) == costs.gram_seconds(64, 64)
    assert costs.gram_seconds(64 * 6400, 8) == pytest.approx(100 * costs.gram_seconds(64, 64))
    assert made(gram32=Curve()).gram_seconds(64, 64) == math.inf


# calibration


def test_calibration_measures_every_curve_until_the_limit():
    costs = calibrate("cpu", watch=modelled)
    # 1e-10 n³ is 0.86 s at 2048, so that 4096 would take longer than the limit
    assert costs.looped.sizes == costs.gram32.sizes == (64, 128, 256, 512, 1024, 2048)
    assert costs.batched.sizes == costs.eigh.sizes == (64, 128, 256, 512, 1024)  # two are too much
    for curve in (costs.looped, costs.batched, costs.eigh, costs.gram32, costs.gram16):
        assert curve(100) == pytest.approx(1e-10 * 100**3)
    assert costs.host == Curve()  # the device is the host
    assert costs.shuffle.sizes[0] == 64**2
    assert costs.shuffle(2 * 2048**2) == pytest.approx(2 * costs.shuffle(2048**2))
    assert costs.machine == machine(CPU)
    assert costs.machine.threads == torch.get_num_threads()
    assert costs.machine.torch == torch.__version__


def test_a_batch_is_as_large_as_time_and_memory_allow(monkeypatch):
    monkeypatch.setattr(calibration, "BATCH_BYTES", 1 << 24)
    monkeypatch.setattr(calibration, "SIZES", (64, 128, 512, 1024, 2048))
    batches = {}

    def watch(operation, stack):
        if operation.__name__ not in ("eigenvalues", "spread_eigenvalues"):
            return calibration.LIMIT
        batches[operation.__name__, stack.shape[-1]] = len(stack)
        return len(stack) * 5e-10 * stack.shape[-1] ** 3

    calibrate("cpu", watch=watch)
    assert {k for (name, _), k in batches.items() if name == "eigenvalues"} == {1}
    spread = {n: k for (name, n), k in batches.items() if name == "spread_eigenvalues"}
    # 0.13, 1 and 67 ms each: as many as there may be, as fit an eighth of the limit, and a pair;
    # of 1024, for which there is memory for two, one takes half of the limit
    assert spread == {64: calibration.BATCH, 128: 119, 512: 2}


def test_all_cores_get_a_matrix():
    limit = calibration.LIMIT
    assert calibration._batch_size(512, 0.9 * limit, 16) == 16
    assert calibration._batch_size(512, limit / 16, 16) == 32
    assert calibration._batch_size(64, 1e-6, 16) == calibration.BATCH
    assert calibration._batch_size(2048, 0.9 * limit, 16) == 8  # there is no memory for more
    assert calibration._batch_size(512, 0.9 * limit, 1) == 0
    assert calibration._batch_size(512, math.inf, 4) == 0
    assert calibration._batch_size(8192, 0.1 * limit, 4) == 0


def test_what_the_device_refuses_ends_its_table_only():
    def watch(operation, stack):
        if operation.__name__ == "spread_eigenvectors" and stack.shape[-1] > 128:
            raise torch.OutOfMemoryError("no memory")
        if stack.dtype == torch.bfloat16:
            raise NotImplementedError("not on this device")
        return modelled(operation, stack)

    costs = calibrate("cpu", watch=watch)
    assert costs.eigh.sizes == (64, 128)
    assert costs.gram16 == Curve()
    assert costs.looped.sizes[-1] == 2048


def test_a_device_without_float64_has_the_host_only(monkeypatch):
    monkeypatch.setattr(calibration, "has_float64", lambda device: False)
    monkeypatch.setattr(calibration, "SIZES", (64, 128))
    seen = set()

    def watch(operation, stack):
        seen.add(stack.dtype)
        return modelled(operation, stack)

    # the CPU stands for it: an accelerator's name would be looked up
    costs = calibrate("cpu", watch=watch)
    assert torch.float64 not in seen
    assert (costs.looped, costs.batched) == (Curve(), Curve())
    assert costs.eigh.sizes == costs.gram32.sizes == (64, 128)


def test_the_host_route_gives_the_eigenvalues_where_they_are_wanted():
    noise = torch.randn(1, 20, 20)
    evals = eigenvalues_on_host(noise + noise.mT)
    assert evals.dtype == torch.float32
    assert torch.allclose(evals, torch.linalg.eigvalsh(noise + noise.mT), atol=1e-4)


def test_the_vectors_of_many_matrices_are_found():
    stack = symmetric(CPU, torch.float64, 30, 4)
    for matrix, vectors in zip(stack, spread_eigenvectors(stack), strict=True):
        assert torch.allclose(vectors @ vectors.mT, torch.eye(30, dtype=torch.float64))
        rotated = vectors.mT @ matrix @ vectors
        assert torch.allclose(rotated, rotated.diag().diag(), atol=1e-12)


def test_the_routes_of_many_matrices_agree_and_leave_the_threads_alone():
    stack = symmetric(CPU, torch.float64, 40, 5)
    threads = torch.get_num_threads()
    together = torch.stack(list(spread_eigenvalues(stack)))
    assert torch.allclose(together, torch.linalg.eigvalsh(stack), rtol=1e-12)
    assert torch.get_num_threads() == threads


def test_calibration_draws_nothing_from_the_global_generator(monkeypatch):
    monkeypatch.setattr(calibration, "SIZES", (64, 128))
    before = torch.get_rng_state()
    calibrate("cpu", watch=modelled)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_stopwatch_takes_the_least_of_few_calls():
    calls = []
    taken = stopwatch(calls.append, torch.zeros(1, 2, 2))
    assert 0.0 <= taken < math.inf
    assert 1 <= len(calls) <= 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured_and_named():
    costs = calibrate("cuda")
    assert costs.machine.kind == "cuda"
    assert costs.machine.device == torch.cuda.get_device_name()
    assert costs.machine.cuda == torch.version.cuda
    assert min(len(c.sizes) for c in (costs.looped, costs.batched, costs.host, costs.eigh)) >= 3
    assert costs.copy_rate > 0
    assert Costs.from_json(costs.to_json()) == costs


# on disk


def counting(costs):
    """A calibration that costs nothing, and how often it was asked for."""
    asked = []

    def measure(device):
        asked.append(device)
        return replace(costs, machine=machine(device))

    return measure, asked


def test_json_gives_the_same_costs_back():
    costs = made(machine=machine(CPU), looped=Curve((64, 100), (1 / 3, math.pi)))
    assert Costs.from_json(costs.to_json()) == costs
    assert Costs.from_json(made(copy_rate=None).to_json()) == made(copy_rate=None)


def test_costs_are_measured_once_and_then_read(cache):
    measure, asked = counting(made())
    costs = costs_of(CPU, measure=measure)
    assert costs_of("cpu", measure=measure) is costs  # a process looks once
    other, unasked = counting(made())
    assert costs_of(CPU, measure=other) == costs  # another process reads
    assert (len(asked), len(unasked)) == (1, 0)
    (path,) = cache.iterdir()
    assert path == cache_file(machine(CPU))
    assert torch.__version__ in path.name
    assert Costs.from_json(path.read_text(encoding="utf-8")) == costs


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"null",
        b"[" * 100_000,
        made().to_json().encode(),  # of another machine
        made(machine=machine(CPU)).to_json().replace("1e-06", "NaN").encode(),
        made(machine=machine(CPU)).to_json().replace("64", "-64").encode(),
    ],
)
def test_a_file_that_cannot_be_used_is_written_anew(cache, content):
    cache.mkdir(parents=True)
    path = cache_file(machine(CPU))
    path.write_bytes(content)
    measure, asked = counting(made())
    costs = costs_of(CPU, measure=measure)
    assert len(asked) == 1
    assert Costs.from_json(path.read_bytes()) == costs


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, cache):
    cache.parent.write_text("a file where the folder should be", encoding="utf-8")
    measure, asked = counting(made())
    costs = costs_of(CPU, measure=measure)
    assert costs_of(CPU, measure=measure) is costs
    assert len(asked) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_file_that_is_a_folder_is_no_error(cache):
    cache_file(machine(CPU)).mkdir(parents=True)
    measure, asked = counting(made())
    assert costs_of(CPU, measure=measure).machine == machine(CPU)
    assert len(asked) == 1


def test_the_place_of_the_file(monkeypatch, tmp_path):
    here = Machine("A/B: C\\D ../e", "cuda", "2.13.0+cu130", "13.0", 8)
    path = cache_file(here)
    assert path.parent == tmp_path / "cache" / "ww_train"
    assert path.name == "A-B-C-D-..-e-torch-2.13.0+cu130-8-threads.json"
    assert cache_file(replace(here, torch="2.12")) != path
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for relative in ("", "here"):  # the XDG specification: ignore what is not absolute
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_file(here).parent == tmp_path / "home" / ".cache" / "ww_train"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("looped"), "'looped'"),
        (lambda d: d["eigh"].pop("sizes"), "'sizes'"),
        (lambda d: d["machine"].pop("torch"), "'torch'"),
        (lambda d: d["eigh"].update(seconds=["x"] * 3), "could not convert"),
        (lambda d: d.update(eigh=3), "not subscriptable"),
        (lambda d: d.update(copy_rate=-1.0), "copy_rate"),
    ],
)
def test_json_that_is_something_else_says_what(change, says):
    document = json.loads(made().to_json())
    change(document)
    with pytest.raises(ValueError, match=says) as caught:
        Costs.from_json(json.dumps(document))
    assert "ww-train calibrate" in str(caught.value)
