"""What the library does on an accelerator, by one that is simulated: see `tests/accelerator.py`."""

import copy
import gc
import json
import warnings
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ww_train import (
    WWPGD,
    AlphaTracker,
    KernelMP,
    ManifoldProjection,
    TailProjection,
    TrapProjection,
    WeightWatcher,
    compare,
    distances,
    esd,
    measure,
    project_,
    tracking,
    traps,
    weight_matrices,
)
from ww_train.analysis import _planned
from ww_train.calibration import _remembered, cache_file, calibrate, costs_of, machine
from ww_train.callbacks.monitor import SpectralMonitor
from ww_train.cli import main
from ww_train.editing import remove_traps_, svd_smoothing_
from ww_train.linalg import gram_eigenvalues, svd_eigenvalues
from ww_train.steering import momentum
from ww_train.steering.tasks import Failed
from ww_train.weights.adapters import SUFFIX

from .accelerator import DEVICE, GPU, OnDevice, move, on_device, prefer
from .oracles import dense, gaussian, heavy
from .watching import of_layers


def network():
    """Layers of three sizes, of one of them three, with tails and traps."""
    tailed = [
        dense(torch.from_numpy(heavy(rows, cols)).float())
        for rows, cols in [(60, 40), (40, 40), (64, 40), (24, 90)]
    ]
    tailed[2].weight.data[3, 4] = 9.0
    conv = nn.Conv2d(10, 30, 3, bias=False)
    conv.weight.data = gaussian(300, 9).reshape(30, 10, 3, 3)
    return nn.Sequential(*tailed, conv)


def twins():
    """A model and its copy on the device."""
    return network(), move(network())


def numbers(report):
    return [
        {k: v for k, v in layer.to_dict().items() if isinstance(v, int | float)} for layer in report
    ]


def assert_same_numbers(here, there):
    assert [layer.name for layer in here] == [layer.name for layer in there]
    for a, b in zip(numbers(here), numbers(there), strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12)


def assert_same_weights(model, other):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert isinstance(b.data, OnDevice)
        torch.testing.assert_close(a.detach(), b.detach().elem, rtol=1e-6, atol=1e-7)


PROJECTIONS = [ManifoldProjection(min_evals=10), TailProjection(), TrapProjection()]


class Descent(torch.optim.Optimizer):
    """SGD with momentum; those of PyTorch ask its C++ core for the device."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("momentum_buffer", torch.zeros_like(parameter))
            state["momentum_buffer"].mul_(0.9).add_(parameter.grad)
            parameter.sub_(1e-3 * state["momentum_buffer"])


def descend(opts, model, there, steps, first=0):
    """Steps of both with the same gradients."""
    for i in range(first, first + steps):
        for k, (a, b) in enumerate(zip(model.parameters(), there.parameters(), strict=True)):
            a.grad = gaussian(1, a.numel(), seed=10 * i + k).reshape(a.shape)
            b.grad = on_device(a.grad)
        for opt in opts:
            opt.step()


# The simulation itself


def test_tensors_of_two_devices_do_not_meet(gpu):
    there = on_device(torch.ones(3, 3))
    assert there.is_cuda
    assert there.device == GPU
    with pytest.raises(RuntimeError, match="same device"):
        there @ torch.ones(3, 3)
    with pytest.raises(TypeError, match="cuda:0"):
        there.numpy()
    assert (there + torch.tensor(1.0)).cpu().tolist() == [[2.0] * 3] * 3


def test_memory_is_counted_and_ends(gpu):
    gpu.reset(free=1000)
    there = torch.zeros(100, device=GPU)
    view = there[:50]
    assert gpu.peak - (gpu.memory - 1000) == 400
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(200, device=GPU)
    del there, view
    torch.zeros(200, device=GPU)


# Measuring


OPTIONS = {
    "default": {},
    "slices": {"pool": False},
    "traps": {"randomize": True},
    "shuffles": {"randomize": 3, "pool": False},
    "bulk": {"mp_fit": True},
    "kernel": {"mp_fit": KernelMP()},
    "vectors": {"vectors": True},
    "confidence": {"replicates": 5},
    "inverse": {"inverse": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_number_is_that_of_the_cpu(gpu, options):
    model, there = twins()
    assert_same_numbers(measure(model, **options), measure(there, **options))


@pytest.mark.parametrize("solver", [gram_eigenvalues, svd_eigenvalues])
def test_every_arithmetic(gpu, solver):
    model, there = twins()
    assert_same_numbers(measure(model, eigensolver=solver), measure(there, eigensolver=solver))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_precision(gpu, dtype):
    model, there = network().to(dtype), move(network().to(dtype))
    assert_same_numbers(measure(model), measure(there))


@pytest.mark.parametrize("route", ["looped", "batched", "host"])
def test_every_way(gpu, route):
    prefer(route)
    model, there = twins()
    assert_same_numbers(measure(model, randomize=True), measure(there, randomize=True))


def test_a_report_waits_once_for_each_size(gpu):
    _, there = twins()
    sizes = len({layer.spectrum.evals.size for layer in measure(there, pool=False)})
    gpu.reset()
    measure(there)
    assert gpu.waits == {"_linalg_eigh": sizes, "copy": sizes}


def test_shuffles_wait_with_them(gpu):
    there = move(nn.Sequential(*(dense(gaussian(50, 30, seed=i)) for i in range(4))))
    gpu.reset()
    report = measure(there, randomize=5)
    assert not any(layer.trap_causes for layer in report)  # looking for them takes copies
    assert gpu.waits == {"_linalg_eigh": 1, "copy": 1}


def test_differences_to_a_base_model(gpu):
    model, there = twins()
    base = copy.deepcopy(model)
    for parameter in base.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    expected = measure(model, base_model=base)
    assert_same_numbers(expected, measure(there, base_model=move(copy.deepcopy(base))))
    assert_same_numbers(expected, measure(there, base_model=base))


def test_what_was_saved_is_measured_on_the_device(gpu, tmp_path, capsys):
    model = network()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    outputs = []
    for device in ("cpu", "cuda"):
        to = tmp_path / f"{device}.json"
        path = str(tmp_path / "model.safetensors")
        assert main(["analyze", path, "--device", device, "--randomize", "--json", str(to)]) == 0
        outputs.append(json.loads(to.read_text()))
    assert gpu.waits["_linalg_eigh"] > 0
    assert len(outputs[0]["layers"]) == len(model)
    for here, there in zip(*(o["layers"] for o in outputs), strict=True):
        assert here["alpha"] == pytest.approx(there["alpha"], rel=1e-9)


def test_weights_of_a_file_are_read_once(gpu, tmp_path):
    save_file(network().state_dict(), tmp_path / "model.safetensors")
    expected = measure(tmp_path / "model.safetensors", randomize=True, vectors=True)
    assert any(layer.trap_causes for layer in expected)  # these need the weights again
    read = []

    def counted(matrix):
        load = matrix.weights.load

        def once():
            read.append(matrix.name)
            return load()

        return replace(matrix, weights=replace(matrix.weights, load=once)).to(GPU)

    matrices = [counted(m) for m in weight_matrices(tmp_path / "model.safetensors")]
    assert_same_numbers(expected, measure(matrices, randomize=True, vectors=True))
    assert sorted(read) == sorted(matrix.name for matrix in matrices)


def test_a_report_leaves_nothing_on_the_device(gpu, tmp_path):
    save_file(network().state_dict(), tmp_path / "model.safetensors")
    _, there = twins()
    gpu.reset()
    before = gpu.used
    gc.disable()  # what is in a cycle would stay until the collector finds it
    try:
        for source in (there, [m.to(GPU) for m in weight_matrices(tmp_path / "model.safetensors")]):
            measure(source, randomize=True, vectors=True, base_model=there)
            assert gpu.used == before
    finally:
        gc.enable()


def test_the_faces_of_measure(gpu):
    model, there = twins()
    np.testing.assert_allclose(esd(model, "0"), esd(there, "0"), rtol=1e-9)
    here, other = (WeightWatcher(model=m).analyze(randomize=True) for m in (model, there))
    np.testing.assert_allclose(here.alpha, other.alpha, rtol=1e-9)
    assert list(here.num_traps if "num_traps" in here else here.rand_num_spikes) == list(
        other.num_traps if "num_traps" in other else other.rand_num_spikes
    )


def test_comparisons_and_distances(gpu):
    model, there = twins()
    later = network()
    for parameter in later.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    expected = compare(model, later)
    assert str(compare(there, move(copy.deepcopy(later)))) == str(expected)
    here, other = distances(model, later), distances(there, move(copy.deepcopy(later)))
    for a, b in zip(here.layers, other.layers, strict=True):
        there_too = [pytest.approx(v, rel=1e-9) if isinstance(v, float) else v for v in astuple(b)]
        assert list(astuple(a)) == there_too


# Too little memory


@pytest.mark.parametrize("free", [0, 30_000, 60_000, 150_000])
def test_without_memory_the_numbers_are_the_same_and_one_warning_says_so(gpu, free):
    model, there = twins()
    expected = measure(model, randomize=True)
    gpu.reset(free=free)
    with pytest.warns(UserWarning, match="the memory of cuda:0 does not suffice") as caught:
        report = measure(there, randomize=True)
    assert len(caught) == 1
    assert_same_numbers(expected, report)


@pytest.mark.parametrize("free", [0, 20_000, 100_000])
@pytest.mark.parametrize("solver", [gram_eigenvalues, svd_eigenvalues])
def test_without_memory_every_arithmetic_goes_on(gpu, free, solver):
    model, there = twins()
    expected = measure(model, eigensolver=solver, vectors=True)
    gpu.reset(free=free)
    with pytest.warns(UserWarning, match="does not suffice") as caught:
        assert_same_numbers(expected, measure(there, eigensolver=solver, vectors=True))
    assert len(caught) == 1


@pytest.mark.parametrize("free", [0, 20_000, 60_000])
@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: type(p).__name__)
def test_without_memory_projections_are_made_on_the_host(gpu, free, projection):
    model, there = twins()
    gpu.reset(free=free)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        project_(model, 0.1, projection=projection)
        outcomes = project_(there, 0.1, projection=projection)
    assert [str(w.message)[:22] for w in caught] == ["the memory of cuda:0 d"]
    assert not any(isinstance(outcome, Failed) for outcome in outcomes)
    assert_same_weights(model, there)


def test_what_the_momentum_needs_is_made_on_the_host_too(gpu):
    model, there = twins()
    opts = [
        WWPGD(Descent(m.parameters()), model=m, momentum=momentum.project, every_n_steps=2)
        for m in (model, there)
    ]
    descend(opts, model, there, steps=1)
    gpu.reset(free=60_000)
    with pytest.warns(UserWarning, match="does not suffice") as caught:
        descend(opts, model, there, steps=1, first=1)
    assert len(caught) == 1
    assert_same_weights(model, there)
    buffers = [
        [opt.state[p]["momentum_buffer"] for p in m.parameters()]
        for opt, m in zip(opts, (model, there), strict=True)
    ]
    for a, b in zip(*buffers, strict=True):
        torch.testing.assert_close(a, b.elem, rtol=1e-5, atol=1e-6)


def lora():
    """A model whose layers carry LoRA updates of rank 12."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=12, target_modules=["0", "3"], init_lora_weights=False)
    return peft.get_peft_model(network(), config)


@pytest.mark.parametrize("free", [0, 20_000, 1 << 40])
@pytest.mark.parametrize("options", [{}, {"randomize": True, "vectors": True}])
def test_updates_are_measured_with_little_memory_too(gpu, free, options):
    expected = measure(lora(), min_evals=8, **options)
    assert any(layer.name.endswith(SUFFIX) for layer in expected)
    there = move(lora())
    gpu.reset(free=free)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = measure(there, min_evals=8, **options)
    assert_same_numbers(expected, report)


@pytest.mark.parametrize("free", [0, 20_000])
def test_what_has_to_be_loaded_is_loaded_on_the_host_if_need_be(gpu, free, tmp_path):
    model, there = twins()
    base = copy.deepcopy(model)
    for parameter in base.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    onto = move(copy.deepcopy(base))
    gpu.reset(free=free)
    with pytest.warns(UserWarning, match="does not suffice"):
        changes = measure(there, base_model=onto)
    assert_same_numbers(measure(model, base_model=base), changes)
    stored = [m.to(GPU) for m in weight_matrices(tmp_path / "model.safetensors")]
    with pytest.warns(UserWarning, match="does not suffice"):
        report = measure(stored, randomize=True)
    assert_same_numbers(measure(model, randomize=True), report)


@pytest.mark.parametrize("message", ["CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory"])
def test_a_shortage_of_the_libraries_is_a_shortage(gpu, monkeypatch, message):
    model, there = twins()
    product = torch.Tensor.baddbmm_

    def short(result, *factors):
        if result.is_cuda:
            raise RuntimeError(f"CUDA error: {message} when calling `cublasCreate(handle)`")
        return product(result, *factors)

    monkeypatch.setattr(OnDevice, "baddbmm_", short, raising=False)
    with pytest.warns(UserWarning, match="does not suffice"):
        assert_same_numbers(measure(model), measure(there))


def test_where_the_solver_of_vectors_gives_up_lapack_does_not(gpu, monkeypatch):
    model, there = twins()
    solve = torch.linalg.eigh

    def gives_up(matrices):
        if matrices.is_cuda:
            raise RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR")
        return solve(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    assert_same_numbers(measure(model, vectors=True), measure(there, vectors=True))
    project_(model, 0.1)
    assert not any(isinstance(outcome, Failed) for outcome in project_(there, 0.1))
    assert_same_weights(model, there)


def test_a_failed_projection_holds_no_memory(gpu, monkeypatch):
    _, there = twins()

    def breaks(self, spectrum, strength):
        raise RuntimeError("broke off")

    monkeypatch.setattr(ManifoldProjection, "move", breaks)
    gpu.reset()
    before = gpu.used
    with pytest.warns(UserWarning, match="broke off"):
        outcomes = project_(there, 0.1)
    assert any(isinstance(outcome, Failed) for outcome in outcomes)
    assert gpu.used == before


def test_a_layer_too_large_for_a_permutation_is_shuffled_on_the_host(gpu, monkeypatch):
    model, there = twins()
    expected = measure(model, randomize=True)
    monkeypatch.setattr(traps, "LARGEST", 1000)
    permute = torch.randperm

    def of_few(number, *, device, **options):
        assert number < 1000 or torch.device(device).type == "cpu"
        return permute(number, device=device, **options)

    monkeypatch.setattr(torch, "randperm", of_few)
    assert_same_numbers(expected, measure(there, randomize=True))


def test_where_the_solver_of_the_device_gives_up_lapack_does_not(gpu, monkeypatch):
    model, there = twins()
    solve = torch.linalg.eigvalsh

    def gives_up(matrices):
        if matrices.is_cuda and matrices.shape[-1] == 40:
            raise RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")
        return solve(matrices)

    monkeypatch.setattr(torch.linalg, "eigvalsh", gives_up)
    assert_same_numbers(measure(model), measure(there))


# Tracking


def test_tracking(gpu, monkeypatch):
    monkeypatch.setattr(tracking, "SMALLEST", 24)
    model, there = twins()
    trackers = AlphaTracker(model), AlphaTracker(there)
    for i in range(4):
        here, other = (tracker.read() for tracker in trackers)
        for a, b in zip(here, other, strict=True):
            assert a.refreshed == b.refreshed
            assert a.alpha == pytest.approx(b.alpha, rel=1e-6)
            assert a.error == pytest.approx(b.error, rel=1e-3, abs=1e-9)
        for k, parameter in enumerate(model.parameters()):
            if parameter.ndim > 1:
                noise = gaussian(*parameter.shape[:2], seed=10 * i + k)
                noise = noise.reshape(noise.shape + (1,) * (parameter.ndim - 2))
                parameter.data += 1e-5 * noise
        for a, b in zip(model.parameters(), there.parameters(), strict=True):
            b.data.copy_(a.data)


# Changing weights


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections(gpu, projection, dtype):
    model, there = network().to(dtype), move(network().to(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        here = project_(model, 0.5, projection=projection)
        other = project_(there, 0.5, projection=projection)
    assert [type(outcome) for outcome in here] == [type(outcome) for outcome in other]
    assert any(outcome.distance > 0 for outcome in here if hasattr(outcome, "distance"))
    if dtype == torch.float32:
        assert_same_weights(model, there)


def test_a_projection_waits_a_few_times_for_each_layer(gpu):
    _, there = twins()
    gpu.reset()
    with pytest.warns(UserWarning, match="costs a finished model accuracy"):
        outcomes = project_(there, 0.5)
    assert gpu.waits.total() <= 6 * len(outcomes)


@pytest.mark.parametrize("policy", [momentum.keep, momentum.project, momentum.reset])
def test_the_optimizer(gpu, policy):
    models = twins()
    opts = [
        WWPGD(Descent(model.parameters()), model=model, momentum=policy, every_n_steps=2)
        for model in models
    ]
    descend(opts, *models, steps=4)
    assert_same_weights(*models)
    state = opts[1].state_dict()
    opts[1].load_state_dict(state)


def test_edits(gpu):
    model, there = twins()
    for edit_ in (remove_traps_, svd_smoothing_):
        here, other = edit_(model), edit_(there)
        assert [a.name for a in here.layers] == [b.name for b in other.layers]
        assert_same_weights(model, there)


# Watching


def records(model, **options):
    monitor = SpectralMonitor(model, budget=None, summary=False, vectors=True, **options)
    for epoch in range(3):
        for parameter in model.parameters():
            parameter.data.mul_(1.0 + 0.1 * epoch)
        monitor.epoch_end()
        if monitor.background:
            monitor.settle()
    monitor.close()
    return of_layers(monitor.history)


@pytest.mark.parametrize("background", [False, True])
def test_the_monitor(gpu, background):
    model, there = twins()
    here = records(model, background=background)
    other = records(there, background=background)
    assert list(here) == list(other)
    for step in here:
        assert here[step] == pytest.approx(other[step], rel=1e-9)


def test_copies_that_do_not_fit_are_made_on_the_host(gpu):
    model, there = twins()
    expected = records(model)
    gpu.reset(free=2_000_000)
    assert records(there, background=True).keys() == expected.keys()


def test_a_device_that_is_lost_does_not_take_training_with_it(gpu):
    _, there = twins()
    monitor = SpectralMonitor(there, budget=None, summary=False, background=True)
    monitor.epoch_end()
    gpu.lost = True

    def go_on():
        for _ in range(3):
            monitor.epoch_end()
            monitor.settle()

    with pytest.warns(UserWarning, match="illegal memory access"):
        go_on()
    monitor.close()


def test_a_calibration_measures_every_way(gpu, monkeypatch):
    monkeypatch.setattr("ww_train.calibration.SIZES", (64, 128))
    costs = calibrate("cuda")
    assert costs.machine.device == "simulated"
    assert [len(c.sizes) for c in (costs.looped, costs.batched, costs.host, costs.eigh)] == [2] * 4
    assert costs.copy_rate is not None
    assert DEVICE.waits["copy"] > 0


def test_a_calibration_without_room_is_not_kept(gpu, monkeypatch):
    monkeypatch.setattr("ww_train.calibration.SIZES", (64, 128))
    path = cache_file(machine(GPU))
    for free, kept in [(100_000, False), (1 << 40, True)]:
        path.unlink(missing_ok=True)
        gpu.reset(free=free)
        _remembered.cache_clear()
        costs_of(GPU)
        assert path.exists() == kept


# A device without float64, such as Apple's


@pytest.fixture
def single(gpu, monkeypatch):
    """The simulated device, which knows no float64."""
    make = OnDevice.__init__

    def of_single(self, elem, requires_grad=False):
        if elem.dtype is torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        make(self, elem, requires_grad)

    monkeypatch.setattr(OnDevice, "__init__", of_single)
    return gpu


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_without_float64_every_number_is_that_of_the_cpu(single, options):
    model, there = twins()
    assert_same_numbers(measure(model, **options), measure(there, **options))


def test_without_float64_updates_are_measured(single):
    assert_same_numbers(measure(lora(), randomize=True), measure(move(lora()), randomize=True))


def test_without_float64_layers_are_copied_one_by_one(single, monkeypatch):
    _, there = twins()
    plans, _ = _planned(there, None, (), None, True, (8, None, None))
    assert all(plan.matrix.deferred for plan in plans)
    assert all(plan.matrix.device.type == "cpu" for plan in plans)


def test_without_float64_models_are_changed_and_compared(single):
    model, there = twins()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for change_ in (project_, remove_traps_, svd_smoothing_):
            before = network()
            change_(model)
            change_(there)
            assert_same_weights(model, there)
            assert any(
                not torch.equal(a, b)
                for a, b in zip(model.parameters(), before.parameters(), strict=True)
            )
    here, other = distances(network(), model), distances(move(network()), there)
    for a, b in zip(here.layers, other.layers, strict=True):
        assert a.frobenius == pytest.approx(b.frobenius, rel=1e-6)


@pytest.mark.parametrize("background", [False, True])
def test_without_float64_the_monitor_works(single, background):
    model, there = twins()
    here, other = (records(m, background=background) for m in (model, there))
    assert here.keys() == other.keys()
    for step in here:
        assert here[step] == pytest.approx(other[step], rel=1e-9)
