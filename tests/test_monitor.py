import copy
import inspect
import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ww_train import WWPGD, ManifoldProjection, Projected, Skipped, measure
from ww_train.callbacks.boundary import BoundaryMonitor
from ww_train.callbacks.early_stopping import alpha_below, traps_appear
from ww_train.callbacks.monitor import SpectralMonitor, find_wwpgd
from ww_train.callbacks.options import MonitorOptions
from ww_train.callbacks.survey import undisturbed

from .accelerator import GPU, move
from .oracles import gaussian
from .watching import SUMMARIES

SIZE = 24


def watch(*arguments, **options):
    """Without a budget: on a loaded machine even tiny measurements may not fit in."""
    return SpectralMonitor(*arguments, **{"budget": None, **options})


def net(seed=0):
    """A small network, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
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
    model, monitor = net(), watch(seed=3)
    scalars = boundary(monitor, model)
    expected = measure(model, randomize=True, seed=3)
    assert scalars.pop("ww/seconds") > 0
    assert scalars.pop("ww/overhead") > 0
    assert scalars.pop("ww/num_measured") == 2.0
    assert scalars == expected.scalars()
    assert [layer.name for layer in monitor.report] == ["0", "2"]
    assert monitor.report["0"].alpha == expected["0"].alpha
    assert monitor.projected == ()


def test_tags_and_types_without_a_projection():
    scalars = boundary(watch(), net())
    layers = {f"ww_{m}/{n}" for m in ("alpha", "erg_gap", "trace_log", "traps") for n in "02"}
    assert scalars.keys() == SUMMARIES | {"ww/overhead"} | layers
    assert {type(value) for value in scalars.values()} == {float}


def test_traps_can_be_left_out():
    scalars = boundary(watch(randomize=False), net())
    assert not [tag for tag in scalars if "traps" in tag]
    assert "ww_alpha/0" in scalars


def test_the_seed_decides_the_shuffles():
    model, tops = net(), []
    for seed in (0, 0, 1):
        boundary(monitor := watch(seed=seed), model)
        tops.append(monitor.report["0"].traps.max_rand_eval)
    assert tops[0] == tops[1] != tops[2]


def test_a_projection_comes_first_and_is_told():
    model = net()
    opt = WWPGD(adamw(model), model=model, strength=1.0)
    train(model, opt)
    untouched = copy.deepcopy(model)
    monitor = watch()
    scalars = boundary(monitor, model, [opt])
    distances = {
        name: ManifoldProjection().project_(untouched.get_submodule(name).weight.data).distance
        for name in "02"
    }
    assert scalars["ww_distance/0"] == pytest.approx(distances["0"], rel=1e-12)
    assert scalars["ww_distance/2"] == pytest.approx(distances["2"], rel=1e-12)
    assert scalars["ww/distance_mean"] == pytest.approx(np.mean(list(distances.values())))
    assert scalars["ww/strength"] == 1.0
    after = measure(model)["0"].alpha
    assert scalars["ww_alpha/0"] == pytest.approx(after, rel=1e-6)  # after the projection
    assert same(model, untouched)  # whose weights were projected just above
    assert [type(result) for result in monitor.projected] == [Projected, Projected]
    assert {type(value) for value in scalars.values()} == {float}


@pytest.mark.parametrize("project", [False, True])
def test_project_decides(project):
    model = net()
    opt = WWPGD(adamw(model), model=model, strength=1.0)
    train(model, opt)
    before = copy.deepcopy(model)
    monitor = watch()
    scalars = boundary(monitor, model, opt, project=project)
    assert same(model, before) is not project
    assert ("ww/distance_mean" in scalars) is project
    assert opt.state_dict()["ww_pgd"]["epochs"] == int(project)
    assert len(monitor.projected) == 2 * project


def test_a_second_boundary_without_a_step_has_nothing_to_do():
    model = net()
    opt = WWPGD(adamw(model), model=model, strength=0.5)
    train(model, opt)
    monitor = watch()
    boundary(monitor, model, opt)
    after = copy.deepcopy(model)
    assert boundary(monitor, model, opt) == {}
    assert monitor.projected == ()
    assert same(model, after)
    assert len(monitor.history) == 1


def test_every_wwpgd_among_the_optimizers_projects():
    first, second = net(), net(1)
    model = nn.ModuleDict({"a": first, "b": second})
    optimizers = [
        WWPGD(adamw(first), model=model, strength=0.25),
        adamw(nn.Linear(3, 3)),
        WWPGD(adamw(second), model=model, strength=0.25),
    ]
    monitor = watch()
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
    boundary(watch(), model, opt)
    assert same(model, before)
    assert torch.equal(torch.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    assert model.training


def test_an_optimizer_without_a_model_gets_the_one_that_is_trained():
    model = nn.Sequential(nn.Embedding(50, SIZE), *net())
    opt = WWPGD(adamw(model), strength=1.0)
    scalars = boundary(watch(), model, opt)
    assert opt.model is model
    assert {tag for tag in scalars if "distance/" in tag} == {"ww_distance/1", "ww_distance/3"}


def test_an_optimizer_with_a_model_keeps_it():
    model = nn.ModuleDict({"inner": net()})
    opt = WWPGD(adamw(model), model=model["inner"], strength=1.0)
    scalars = boundary(watch(), model, opt)
    assert opt.model is model["inner"]
    assert "ww_distance/0" in scalars


def test_history_has_a_record_for_each_measured_boundary():
    model, monitor = net(), watch(every_n_epochs=2)
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
    monitor = watch(every_n_epochs=3)
    train(model, opt)
    scalars = boundary(monitor, model, opt, epoch=1)
    assert scalars.keys() == {
        "ww/distance_mean",
        "ww/strength",
        "ww_distance/0",
        "ww_distance/2",
    }
    assert monitor.report is None
    assert opt.state_dict()["ww_pgd"]["epochs"] == 1


@pytest.mark.parametrize("every", [0, -1])
def test_every_n_epochs_must_be_positive(every):
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1"):
        watch(every_n_epochs=every)


def test_a_layer_of_nan_warns_once_and_the_others_are_measured():
    model, monitor = net(), watch()
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
    monitor = watch()
    (message,), scalars = collect(lambda: boundary(monitor, nn.LayerNorm(8)))
    assert message == "no layer to watch (the model holds no matrix)"
    assert scalars["ww/num_layers"] == 0
    assert collect(lambda: boundary(monitor, nn.LayerNorm(8)))[0] == []


def test_a_model_of_small_layers_warns_with_the_reason():
    (message,), _ = collect(lambda: boundary(watch(), nn.Linear(3, 30)))
    assert "3 eigenvalues, fewer than min_evals=8" in message


def test_the_message_stays_readable_for_a_model_of_many_layers():
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(200)])
    (message,), _ = collect(lambda: boundary(watch(), model))
    assert len(message) < 500
    assert message.endswith("and 195 more)")


def test_a_measurement_that_fails_warns_once_and_the_projection_is_logged():
    model = net()
    opt = WWPGD(adamw(model), model=model, strength=1.0)
    monitor = watch()

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
    monitor = watch()
    messages, scalars = collect(lambda: boundary(monitor, model, opt))
    assert any("layer 0 is left as it is" in message for message in messages)
    assert "ww_alpha/0" in scalars
    assert "ww/distance_mean" not in scalars
    assert [isinstance(result, Skipped) for result in monitor.projected] == [True, True]


def test_a_projection_that_fails_raises_if_the_optimizer_is_strict():
    model = net()
    opt = WWPGD(adamw(model), model=model, projection=Failing(), strict=True)
    with pytest.raises(RuntimeError, match="no luck"):
        boundary(watch(), model, opt)


def test_an_end_of_epoch_that_fails_as_a_whole_warns_once():
    class Broken(WWPGD):
        def end_epoch(self):
            raise RuntimeError("no luck")

    model, monitor = net(), watch()
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
    scalars = boundary(watch(), compiled, opt)
    assert {"ww_alpha/0", "ww_distance/0"} <= scalars.keys()


# A loop of one's own


def test_a_plain_loop_needs_only_epoch_end(capsys):
    model = net()
    opt = WWPGD(adamw(model), model=model, strength=1.0)
    seen = []
    with watch(model, opt, log_to=lambda scalars, step: seen.append(step)) as monitor:
        for _ in range(3):
            train(model, opt)
            scalars = monitor.epoch_end()
    assert [record["epoch"] for record in monitor.history] == [0.0, 1.0, 2.0, 3.0]
    assert seen == [0, 1, 2, 3]
    assert scalars["ww/strength"] == 1.0
    assert {tag: scalars[tag] for tag in scalars} == {
        tag: value for tag, value in monitor.history[-1].items() if tag not in ("epoch", "step")
    }
    assert opt.state_dict()["ww_pgd"]["epochs"] == 3
    assert monitor.verdict == monitor.report.verdict == "critical (2 layers)"
    printed = capsys.readouterr().out
    assert "the model: critical (2 layers)" in printed
    assert printed == monitor.summarise(3).text() + "\n"


def test_steps_are_counted_and_measured():
    model = net()
    opt, monitor = adamw(model), watch(model, every_n_steps=2, summary=False)
    monitor.start()
    for _ in range(2):
        for _ in range(3):
            train(model, opt, 1)
            monitor.step()
        monitor.epoch_end()
    monitor.close()
    assert [record["step"] for record in monitor.history] == [0.0, 2.0, 3.0, 4.0, 6.0]
    assert [record["epoch"] for record in monitor.history] == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_an_epoch_that_was_cut_short_is_not_projected():
    model = net()
    opt = WWPGD(adamw(model), model=model, strength=1.0)
    train(model, opt)
    scalars = watch(model, opt).epoch_end(project=False)
    assert "ww_alpha/0" in scalars
    assert "ww/strength" not in scalars


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({}, [0, 2, 4, 5]),
        ({"at_start": False}, [2, 4, 5]),
        ({"at_end": False}, [0, 2, 4]),
        ({"every_n_epochs": None}, [0, 5]),
        ({"every_n_epochs": 1}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_when_it_measures(options, epochs):
    model, settings = net(), {"every_n_epochs": 2, "summary": False, **options}
    with watch(model, **settings) as monitor:
        for _ in range(5):
            monitor.epoch_end()
    assert [record["epoch"] for record in monitor.history] == epochs


def test_a_loop_without_a_model_is_told_so():
    with pytest.raises(ValueError, match="give the model"):
        watch().epoch_end()


def test_a_training_that_fails_prints_no_summary(capsys):
    with pytest.raises(RuntimeError, match="no luck"), watch(net()) as monitor:
        raise RuntimeError("no luck")
    assert capsys.readouterr().out == ""
    assert len(monitor.history) == 1


@pytest.mark.parametrize("every", ["every_n_epochs", "every_n_steps"])
def test_every_n_must_be_positive(every):
    with pytest.raises(ValueError, match=f"{every} must be at least 1 or None"):
        watch(**{every: 0})


def test_only_chosen_layers_are_watched():
    scalars = boundary(watch(layers="2"), net())
    assert scalars["ww/num_layers"] == 1.0
    assert "ww_alpha/2" in scalars
    assert "ww_alpha/0" not in scalars


def test_a_choice_that_matches_nothing_warns_once_and_training_goes_on():
    monitor = watch(layers="fc*")
    (message,), scalars = collect(lambda: boundary(monitor, net()))
    assert "no layer matches 'fc*'" in message
    assert scalars == {}
    assert collect(lambda: boundary(monitor, net(), epoch=2)) == ([], {})


def test_vectors_and_intervals_on_request():
    monitor = watch(vectors=True, replicates=10)
    boundary(monitor, net())
    assert monitor.report["0"].localization
    assert monitor.report["0"].confidence
    boundary(plain := watch(), net())
    assert plain.report["0"].localization is plain.report["0"].confidence is None


def test_options_of_the_callbacks_are_those_of_the_monitor():
    parameters = inspect.signature(BoundaryMonitor).parameters.values()
    own = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert own == MonitorOptions.__annotations__.keys()
    assert all(f"{name}: " in inspect.getdoc(SpectralMonitor) for name in own)
    plain = own - {"log_to", "early_stop", "on_verdict", "clock"}
    assert watch().settings.keys() == plain
    assert watch(**watch(seed=3).settings).settings["seed"] == 3


# One decomposition for the projection and the measurement


def count_decompositions(monkeypatch):
    counted = []

    def spy(name):
        solve = getattr(torch.linalg, name)

        def counting(matrices, *args, **options):
            counted.append(name)
            return solve(matrices, *args, **options)

        monkeypatch.setattr(torch.linalg, name, counting)

    spy("eigh")
    spy("eigvalsh")
    return counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_projected_layer_is_not_decomposed_again(monkeypatch, dtype):
    model = net().to(dtype)
    opt = WWPGD(torch.optim.SGD(model.parameters(), lr=0.1), model=model, strength=1.0)
    counted = count_decompositions(monkeypatch)
    monitor = watch(randomize=False)
    boundary(monitor, model, opt)
    assert counted.count("eigh") == 2
    assert counted.count("eigvalsh") == (2 if dtype is torch.bfloat16 else 0)  # rounded after it
    assert monitor.report["0"].alpha == pytest.approx(measure(model)["0"].alpha, rel=1e-6)


def test_names_of_another_model_are_not_taken_for_ours(monkeypatch):
    inner = net()
    model = nn.ModuleDict({"0": nn.Linear(SIZE, 40), "inner": inner})
    opt = WWPGD(adamw(inner), model=inner, strength=1.0)
    scalars = boundary(watch(), model, opt)
    assert scalars["ww_alpha/0"] == measure(model)["0"].alpha
    assert scalars["ww_alpha/inner.0"] == pytest.approx(2.0, abs=1e-3)


# What must not change


@pytest.mark.parametrize("options", [{"budget": 0.01}, {"vectors": True}, {"every_n_steps": 1}])
def test_training_is_bitwise_the_same(options):
    models = []
    for watched in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(net(), nn.Dropout(0.5), nn.BatchNorm1d(SIZE))
        opt = adamw(model)
        monitor = watch(model, opt, summary=False, **options) if watched else None
        for _ in range(3):
            for i in range(4):
                opt.zero_grad()
                model(torch.randn(8, SIZE) + i).square().mean().backward()
                opt.step()
                if monitor:
                    monitor.step()
            if monitor:
                monitor.epoch_end()
        models.append(model)
    assert same(*models)


def inference():
    return torch.inference_mode()


def cast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


class Doubled(nn.Module):
    def forward(self, x):
        return x @ torch.eye(len(x.T)) * 2.0  # a product that autocast would round


@pytest.mark.parametrize("context", [inference, cast])
@pytest.mark.parametrize("training", [True, False])
def test_inside_other_contexts_the_numbers_are_the_same(context, training):
    model = net().train(training)
    torch.nn.utils.parametrize.register_parametrization(model[2], "weight", Doubled())
    expected = measure(model, randomize=True).scalars()
    with context():
        scalars = boundary(watch(), model)
    assert {tag: scalars[tag] for tag in expected} == expected
    assert model.training is training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_projection_inside_inference_mode():
    model = net()
    opt = WWPGD(adamw(model), model=model, strength=1.0)
    with torch.inference_mode():
        boundary(watch(), model, opt)
    train(model, opt)
    assert measure(model)["0"].alpha != 2.0


# Verdicts, hooks, stopping


def spike(model, name="0", value=30.0):
    with torch.no_grad():
        model.get_submodule(name).weight[3, 4] = value


def test_a_layer_that_becomes_trapped_is_named_once_with_advice():
    model, monitor = net(), watch()
    boundary(monitor, model, epoch=0)
    spike(model)
    assert collect(lambda: boundary(monitor, model, epoch=1))[0] == []
    (message,), _ = collect(lambda: boundary(monitor, model, epoch=2))
    assert message.startswith("layer 0: ")
    assert "lower its learning rate" in message
    assert "(3, 4) = 30" in message
    assert collect(lambda: boundary(monitor, model, epoch=3))[0] == []


def test_a_model_that_comes_with_traps_is_not_complained_about():
    model, monitor = net(), watch()
    spike(model)
    for epoch in range(4):
        assert collect(lambda e=epoch: boundary(monitor, model, epoch=e))[0] == []
    assert monitor.report["0"].verdict == "trapped"


def test_the_hook_hears_of_every_change_of_verdict():
    heard = []
    monitor = watch(on_verdict=lambda layer, previous: heard.append((layer, previous)))
    model = net()
    boundary(monitor, model, epoch=0)
    before = monitor.report["0"].verdict
    assert heard == []
    spike(model)
    boundary(monitor, model, epoch=1)
    collect(lambda: boundary(monitor, model, epoch=2))
    ((layer, previous),) = heard
    assert (layer.name, layer.verdict, previous) == ("0", "trapped", before)


@pytest.mark.parametrize("option", ["on_verdict", "early_stop"])
def test_a_hook_that_fails_warns_once(option):
    def fail(*_):
        raise RuntimeError("no luck")

    model, monitor = net(), watch(**{option: fail})
    messages = []
    for epoch in range(3):
        found, scalars = collect(lambda e=epoch: boundary(monitor, model, epoch=e))
        messages += [m for m in found if option in m]
        assert "ww_alpha/0" in scalars
        spike(model, value=30.0 * (epoch % 2 == 0))
    assert len(messages) == 1
    assert "no luck" in messages[0]
    assert not monitor.should_stop


def test_a_rule_stops_once_training_has_begun():
    model, monitor = net(), watch(early_stop=alpha_below(100.0))
    boundary(monitor, model, epoch=0)
    assert not monitor.should_stop
    boundary(monitor, model, epoch=1)
    assert monitor.should_stop
    monitor.begin(step=10)
    assert not monitor.should_stop


def test_traps_stop_the_training():
    model, monitor = net(), watch(early_stop=traps_appear())
    for epoch in range(3):
        boundary(monitor, model, epoch=epoch)
        assert not monitor.should_stop
    spike(model)
    boundary(monitor, model, epoch=3)
    assert monitor.should_stop


# State


def test_the_state_is_plain_json_and_goes_on():
    model = net()
    opt = adamw(model)
    whole, first, second = (watch(model, opt, summary=False) for _ in range(3))
    for monitor in (whole, first):
        monitor.start()
    for epoch in range(4):
        if epoch == 2:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            second.begin(step=2)
        train(model, opt)
        whole.epoch_end()
        (first if epoch < 2 else second).epoch_end()
    strip = ("ww/seconds", "ww/overhead")
    histories = [
        [{k: v for k, v in record.items() if k not in strip} for record in monitor.history]
        for monitor in (whole, second)
    ]
    assert histories[0] == histories[1]
    assert whole.changes == second.changes
    assert whole.logbook.latest.keys() == second.logbook.latest.keys()
    assert whole.timeline.state_dict() == second.timeline.state_dict()


def test_a_new_training_counts_changes_from_its_own_start():
    model, monitor = net(), watch()
    boundary(monitor, model, epoch=0)
    train(model, adamw(model), 20)
    boundary(monitor, model, epoch=1)
    assert monitor.changes["0"] != 0.0
    monitor.begin(step=0)
    boundary(monitor, model, epoch=0)
    assert monitor.changes == {"0": 0.0, "2": 0.0}
    assert len(monitor.history) == 3


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    model = net()
    try:
        accelerator = accelerate.Accelerator(cpu=True)
        prepared, opt = accelerator.prepare(model, WWPGD(adamw(model), model=model, strength=1.0))
        with watch(prepared, opt, summary=False) as monitor:
            for _ in range(2):
                train(prepared, opt)
                monitor.epoch_end()
    finally:
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
    assert monitor.history[-1]["ww/strength"] == 1.0
    assert monitor.verdict == "critical (2 layers)"


# Devices


def test_the_devices_of_the_model_are_awaited(gpu, monkeypatch):
    awaited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", awaited.append)
    model = move(net())
    model.append(nn.Linear(SIZE, SIZE))
    with undisturbed(model):
        assert awaited == [GPU]
    with undisturbed(model, wait=False):
        assert awaited == [GPU]


def test_a_device_that_cannot_be_awaited_is_measured_all_the_same(gpu, monkeypatch):
    def unknown(device):
        raise RuntimeError("no accelerator")

    monkeypatch.setattr(torch.accelerator, "synchronize", unknown)
    monitor = watch(move(net()), at_end=False, summary=False)
    monitor.epoch_end()
    assert monitor.history[0]["ww/num_measured"] == 2.0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_casting_is_off_also_with_devices_that_know_none(device):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with undisturbed(nn.Linear(2, 2, device=device)):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
