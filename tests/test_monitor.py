import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ww_train import WWPGD, ManifoldProjection, Projected, Skipped, measure
from ww_train.callbacks.monitor import SpectralMonitor, find_wwpgd

from .oracles import gaussian

SIZE = 24
SUMMARIES = {
    "ww/num_layers",
    "ww/alpha_mean",
    "ww/alpha_min",
    "ww/alpha_max",
    "ww/erg_gap_mean",
    "ww/trace_log_mean",
    "ww/traps_total",
    "ww/seconds",
}


def net(seed=0):
    """A small network, without touching the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(SIZE, 32), nn.Tanh(), nn.Linear(32, SIZE))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, opt, steps=2):
    for i in range(steps):
        opt.zero_grad()
        x = gaussian(8, SIZE, seed=i)
        (model(x) - x.flip(1)).square().mean().backward()
        opt.step()


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return all(torch.equal(a[key], b[key]) for key in a)


def boundary(monitor, model, optimizers=(), epoch=1, **options):
    return monitor.boundary(model, optimizers, epoch=epoch, step=10 * epoch, **options)


def collect(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return [str(w.message) for w in caught], result


def test_the_numbers_are_those_of_the_report():
    model, monitor = net(), SpectralMonitor(seed=3)
    scalars = boundary(monitor, model)
    expected = measure(model, randomize=True, seed=3)
    assert scalars.pop("ww/seconds") > 0
    assert scalars == expected.scalars()
    assert [layer.name for layer in monitor.report] == ["0", "2"]
    assert monitor.report["0"].alpha == expected["0"].alpha
    assert monitor.projected == ()


def test_tags_and_types_without_a_projection():
    scalars = boundary(SpectralMonitor(), net())
    layers = {f"ww_{m}/{n}" for m in ("alpha", "erg_gap", "trace_log", "traps") for n in "02"}
    assert scalars.keys() == SUMMARIES | layers
    assert {type(value) for value in scalars.values()} == {float}


def test_traps_can_be_left_out():
    scalars = boundary(SpectralMonitor(randomize=False), net())
    assert not [tag for tag in scalars if "traps" in tag]
    assert "ww_alpha/0" in scalars


def test_the_seed_decides_the_shuffles():
    model, tops = net(), []
    for seed in (0, 0, 1):
        boundary(monitor := SpectralMonitor(seed=seed), model)
        tops.append(monitor.report["0"].traps.max_rand_eval)
    assert tops[0] == tops[1] != tops[2]


def test_a_projection_comes_first_and_is_told():
    model = net()
    opt = WWPGD(adamw(model), model=model, strength=1.0)
    train(model, opt)
    untouched = copy.deepcopy(model)
    monitor = SpectralMonitor()
    scalars = boundary(monitor, model, [opt])
    distances = {
        name: ManifoldProjection().project_(untouched.get_submodule(name).weight.data).distance
        for name in "02"
    }
    assert scalars["ww_distance/0"] == pytest.approx(distances["0"], rel=1e-12)
    assert scalars["ww_distance/2"] == pytest.approx(distances["2"], rel=1e-12)
    assert scalars["ww/distance_mean"] == pytest.approx(np.mean(list(distances.values())))
    assert scalars["ww/strength"] == 1.0
    assert scalars["ww_alpha/0"] == measure(model)["0"].alpha  # after the projection
    assert same(model, untouched)  # whose weights were projected just above
    assert [type(result) for result in monitor.projected] == [Projected, Projected]
    assert {type(value) for value in scalars.values()} == {float}


@pytest.mark.parametrize("project", [False, True])
def test_project_decides(project):
    model = net()
    opt = WWPGD(adamw(model), model=model, strength=1.0)
    train(model, opt)
    before = copy.deepcopy(model)
    monitor = SpectralMonitor()
    scalars = boundary(monitor, model, opt, project=project)
    assert same(model, before) is not project
    assert ("ww/distance_mean" in scalars) is project
    assert opt.state_dict()["ww_pgd"]["epochs"] == int(project)
    assert len(monitor.projected) == 2 * project


def test_a_second_boundary_without_a_step_measures_but_does_not_project():
    model = net()
    opt = WWPGD(adamw(model), model=model, strength=0.5)
    train(model, opt)
    monitor = SpectralMonitor()
    boundary(monitor, model, opt)
    after = copy.deepcopy(model)
    scalars = boundary(monitor, model, opt)
    assert "ww_alpha/0" in scalars
    assert "ww/distance_mean" not in scalars
    assert monitor.projected == ()
    assert same(model, after)


def test_every_wwpgd_among_the_optimizers_projects():
    first, second = net(), net(1)
    model = nn.ModuleDict({"a": first, "b": second})
    optimizers = [
        WWPGD(adamw(first), model=model, strength=0.25),
        adamw(nn.Linear(3, 3)),
        WWPGD(adamw(second), model=model, strength=0.25),
    ]
    monitor = SpectralMonitor()
    scalars = boundary(monitor, model, optimizers)
    assert {tag for tag in scalars if tag.startswith("ww_distance/")} == {
        "ww_distance/a.0",
        "ww_distance/a.2",
        "ww_distance/b.0",
        "ww_distance/b.2",
    }
    assert scalars["ww/strength"] == 0.25
    assert sum(isinstance(result, Projected) for result in monitor.projected) == 4


def test_only_a_wwpgd_changes_weights_and_no_generator_is_used():
    model = net()
    opt = adamw(model)
    train(model, opt)
    before = copy.deepcopy(model)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    boundary(SpectralMonitor(), model, opt)
    assert same(model, before)
    assert torch.equal(torch.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    assert model.training


def test_an_optimizer_without_a_model_gets_the_one_that_is_trained():
    model = nn.Sequential(nn.Embedding(50, SIZE), *net())
    opt = WWPGD(adamw(model), strength=1.0)
    scalars = boundary(SpectralMonitor(), model, opt)
    assert opt.model is model
    assert {tag for tag in scalars if "distance/" in tag} == {"ww_distance/1", "ww_distance/3"}


def test_an_optimizer_with_a_model_keeps_it():
    model = nn.ModuleDict({"inner": net()})
    opt = WWPGD(adamw(model), model=model["inner"], strength=1.0)
    scalars = boundary(SpectralMonitor(), model, opt)
    assert opt.model is model["inner"]
    assert "ww_distance/0" in scalars


def test_history_has_a_record_for_each_measured_boundary():
    model, monitor = net(), SpectralMonitor(every_n_epochs=2)
    results = [boundary(monitor, model, epoch=epoch) for epoch in range(6)]
    assert [bool(scalars) for scalars in results] == [True, False, True, False, True, False]
    assert [record["epoch"] for record in monitor.history] == [0.0, 2.0, 4.0]
    assert [record["step"] for record in monitor.history] == [0.0, 20.0, 40.0]
    for record, scalars in zip(monitor.history, results[::2], strict=True):
        assert record == {"epoch": record["epoch"], "step": record["step"], **scalars}
        assert {type(value) for value in record.values()} == {float}


def test_projections_happen_at_every_boundary_that_is_not_measured_too():
    model = net()
    opt = WWPGD(adamw(model), model=model, strength=1.0)
    monitor = SpectralMonitor(every_n_epochs=3)
    train(model, opt)
    scalars = boundary(monitor, model, opt, epoch=1)
    assert scalars.keys() == {
        "ww/distance_mean",
        "ww/strength",
        "ww/seconds",
        "ww_distance/0",
        "ww_distance/2",
    }
    assert monitor.report is None
    assert opt.state_dict()["ww_pgd"]["epochs"] == 1


@pytest.mark.parametrize("every", [0, -1])
def test_every_n_epochs_must_be_positive(every):
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1"):
        SpectralMonitor(every_n_epochs=every)


def test_a_layer_of_nan_warns_once_and_the_others_are_measured():
    model, monitor = net(), SpectralMonitor()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    (message,), scalars = collect(lambda: boundary(monitor, model))
    assert message.startswith("layer 0 is not watched: NaN")
    assert "ww_alpha/2" in scalars
    assert "ww_alpha/0" not in scalars
    assert all(math.isfinite(value) for value in scalars.values())
    assert collect(lambda: boundary(monitor, model, epoch=2))[0] == []
    assert len(monitor.history) == 2


def test_a_model_without_a_matrix_warns_once():
    monitor = SpectralMonitor()
    (message,), scalars = collect(lambda: boundary(monitor, nn.LayerNorm(8)))
    assert message == "no layer to watch (the model holds no matrix)"
    assert scalars["ww/num_layers"] == 0
    assert collect(lambda: boundary(monitor, nn.LayerNorm(8)))[0] == []


def test_a_model_of_small_layers_warns_with_the_reason():
    (message,), _ = collect(lambda: boundary(SpectralMonitor(), nn.Linear(3, 30)))
    assert "3 eigenvalues, fewer than min_evals=8" in message


def test_the_message_stays_readable_for_a_model_of_many_layers():
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(200)])
    (message,), _ = collect(lambda: boundary(SpectralMonitor(), model))
    assert len(message) < 500
    assert message.endswith("and 195 more)")


def test_a_measurement_that_fails_warns_once_and_the_projection_is_logged():
    model = net()
    opt = WWPGD(adamw(model), model=model, strength=1.0)
    monitor = SpectralMonitor()

    def run():
        train(model, opt)
        return monitor.boundary("no model", opt, epoch=1, step=1)

    (message,), scalars = collect(run)
    assert "no spectra in epoch 1" in message
    assert "expected an nn.Module" in message
    assert "ww/distance_mean" in scalars
    messages, scalars = collect(run)
    assert messages == []
    assert "ww/distance_mean" in scalars


class Failing:
    def project_(self, matrix, strength):
        raise RuntimeError("no luck")


def test_a_projection_that_fails_does_not_stop_the_measurement():
    model = net()
    opt = WWPGD(adamw(model), model=model, projection=Failing())
    monitor = SpectralMonitor()
    messages, scalars = collect(lambda: boundary(monitor, model, opt))
    assert any("layer 0 is left as it is" in message for message in messages)
    assert "ww_alpha/0" in scalars
    assert "ww/distance_mean" not in scalars
    assert [type(result) for result in monitor.projected] == [Skipped, Skipped]


def test_a_projection_that_fails_raises_if_the_optimizer_is_strict():
    model = net()
    opt = WWPGD(adamw(model), model=model, projection=Failing(), strict=True)
    with pytest.raises(RuntimeError, match="no luck"):
        boundary(SpectralMonitor(), model, opt)


def test_an_end_of_epoch_that_fails_as_a_whole_warns_once():
    class Broken(WWPGD):
        def end_epoch(self):
            raise RuntimeError("no luck")

    model, monitor = net(), SpectralMonitor()
    opt = Broken(adamw(model))
    (message,), scalars = collect(lambda: boundary(monitor, model, opt))
    assert "no projection" in message
    assert "no luck" in message
    assert "ww_alpha/0" in scalars
    assert collect(lambda: boundary(monitor, model, opt))[0] == []


# Where the WWPGD is


def test_find_wwpgd():
    model = net()
    opt = WWPGD(adamw(model))
    assert find_wwpgd(opt) is opt
    assert find_wwpgd(opt.base) is None
    assert find_wwpgd(None) is None


def test_find_a_subclass():
    class Own(WWPGD):
        pass

    opt = Own(adamw(net()))
    assert find_wwpgd(opt) is opt


def test_find_inside_the_proxy_of_lightning():
    pytest.importorskip("lightning")
    from lightning.pytorch.core.optimizer import LightningOptimizer

    opt = WWPGD(adamw(net()))
    assert find_wwpgd(LightningOptimizer(opt)) is opt
    assert find_wwpgd(LightningOptimizer(opt.base)) is None


def test_find_inside_fabric():
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    model = net()
    opt = WWPGD(adamw(model))
    assert find_wwpgd(fabric.setup(model, opt)[1]) is opt


def test_find_inside_accelerate():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    opt = WWPGD(adamw(net()))
    try:
        prepared = accelerate.Accelerator(cpu=True).prepare(opt)
        assert find_wwpgd(prepared) is opt
    finally:
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()


def test_the_model_may_be_compiled():
    model = net()
    compiled = torch.compile(model, backend="eager")
    opt = WWPGD(adamw(compiled), strength=1.0)
    scalars = boundary(SpectralMonitor(), compiled, opt)
    assert {"ww_alpha/0", "ww_distance/0"} <= scalars.keys()
