import copy
import json
import statistics

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ww_train.analysis import measure
from ww_train.comparing.comparison import compare
from ww_train.comparing.readings import METRICS, OF_ALPHA

from .oracles import gaussian, zoo
from .peer import contained, import_peer

KEYS = ("log_norm", "alpha", "alpha_weighted", "log_alpha_norm", "log_spectral_norm", "stable_rank")


def tuned(model, seed=9):
    """The model with a rank-one update of its first matrices."""
    new = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in list(new.parameters()):
            if parameter.ndim == 2 and min(parameter.shape) >= 12:
                u, v = gaussian(parameter.shape[0], 1, seed), gaussian(1, parameter.shape[1], seed)
                parameter += 0.1 * u @ v
    return new


@pytest.fixture
def models():
    base = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 30), nn.Conv2d(12, 16, 3))
    return base, tuned(base)


def test_the_three_reports_are_those_of_measure(models):
    base, finetuned = models
    found = compare(base, finetuned, mp_fit=True, randomize=True)
    options = {"mp_fit": True, "randomize": True}
    for report, expected in (
        (found.base, measure(base, **options)),
        (found.finetuned, measure(finetuned, **options)),
        (found.delta, measure(finetuned, base_model=base, **options)),
    ):
        assert [x.to_dict() for x in report] == [x.to_dict() for x in expected]
    assert found.matching.matched == ("0", "1", "2")
    assert [(x.name, x.reason) for x in found.delta.skipped] == [
        ("2", "identical to the base model")
    ]


def test_summary_of_models_of_the_same_layers_is_weightwatchers(models):
    base, finetuned = models
    summary = compare(base, finetuned).metrics_summary()
    assert list(summary) == ["weightwatcher"]
    (inner,) = summary.values()
    assert list(inner) == ["baseline", "finetuned", "changes"]
    for name, model in (("baseline", base), ("finetuned", finetuned)):
        expected = measure(model).summary()
        assert {key: inner[name][key] for key in KEYS} == pytest.approx(
            {key: expected[key] for key in KEYS}
        )
    for key, change in inner["changes"].items():
        assert change == inner["finetuned"][key] - inner["baseline"][key]


def test_a_layer_that_one_model_lacks_changes_no_mean(models):
    base, finetuned = models
    whole = compare(base, finetuned).metrics_summary()
    base.add_module("gone", nn.Linear(60, 60))
    finetuned.add_module("new", nn.Linear(70, 70))
    found = compare(base, finetuned)
    assert found.metrics_summary() == whole
    assert (found.matching.missing, found.matching.extra) == (("gone",), ("new",))
    assert [x.name for x in found.base] == [x.name for x in found.finetuned] == ["0", "1", "2"]


def test_a_fit_that_fails_in_one_model_takes_the_layer_out_of_that_mean(models):
    base, finetuned = models
    with torch.no_grad():  # equal singular values: norms, but no tail
        finetuned[1].weight.copy_(torch.linalg.qr(gaussian(40, 30)).Q.T)
    found = compare(base, finetuned)
    assert found.finetuned["1"].alpha is None
    baseline = found.metrics_summary()["weightwatcher"]["baseline"]
    both = [found.base[name].alpha for name in ("0", "2")]
    assert baseline["alpha"] == pytest.approx(statistics.fmean(both))
    norms = [x.spectrum.log_norm for x in found.base]
    assert baseline["log_norm"] == pytest.approx(statistics.fmean(norms))


def test_a_layer_that_was_measured_in_one_model_only_is_left_out(models):
    base, finetuned = models
    with torch.no_grad():
        finetuned[0].weight[3, 4] = torch.nan
    found = compare(base, finetuned)
    frame = found.to_dataframe()
    assert frame.longname.tolist() == ["1", "2"]
    assert "NaN" in frame.attrs["skipped"]["0"]
    norms = [found.base[name].spectrum.log_norm for name in ("1", "2")]
    baseline = found.metrics_summary()["weightwatcher"]["baseline"]
    assert baseline["log_norm"] == pytest.approx(statistics.fmean(norms))


def test_a_model_against_itself_changes_nothing():
    model = zoo()
    found = compare(model, model.state_dict(), min_evals=1)
    assert found.reading() == ()
    assert len(found.delta) == 0
    assert set(found.metrics_summary()["weightwatcher"]["changes"].values()) == {0.0}
    frame = found.to_dataframe()
    assert (frame.relative_delta == 0.0).all()
    assert len(frame) == len(found.matching.matched) > 15


def test_the_table_has_each_metric_of_base_finetuned_change_and_difference(models):
    base, finetuned = models
    found = compare(base, finetuned, randomize=True)
    frame = found.to_dataframe().set_index("longname")
    for name, row in frame.iterrows():
        assert row.alpha_base == found.base[name].alpha
        assert row.alpha_finetuned == found.finetuned[name].alpha
        assert row.alpha_change == pytest.approx(row.alpha_finetuned - row.alpha_base)
    before, after = (model[0].weight.detach().double() for model in (base, finetuned))
    difference = (after - before).norm()
    ratio = difference / before.norm()
    assert frame.relative_delta["0"] == pytest.approx(float(ratio), rel=1e-9)
    assert frame.log_norm_of_delta["0"] == pytest.approx(2 * np.log10(float(difference)))
    assert np.isnan(frame.log_norm_of_delta["2"])
    assert {c.rsplit("_", 1)[0] for c in frame if c.endswith("_base")} == {
        metric.name for metric in METRICS if metric.name != "mp_softrank"
    }
    assert frame.drop(columns="layer_type").dtypes.eq(float).all()


def test_layers_types_and_slices(models):
    base, finetuned = models
    assert compare(base, finetuned, types="dense").to_dataframe().longname.tolist() == ["0", "1"]
    found = compare(base, finetuned, layers=[-1, "0"], pool=False)
    assert found.to_dataframe().longname.tolist() == ["0", *(f"2[{i}]" for i in range(9))]


def test_reading_and_repr_say_what_changed(models):
    found = compare(*models)
    metrics = [reading.metric for reading in found.reading()]
    assert "alpha" in metrics
    lines = repr(found).splitlines()
    assert lines[0] == "Comparison of 3 layers (0 missing, 0 extra, 0 reshaped)"
    assert [line.split()[0] for line in lines[1:]] == metrics


def test_alpha_of_noise_is_no_claim():
    generator = np.random.default_rng(3)
    noise = {f"{i}.weight": gaussian(60, 40, seed=i) for i in range(3)}
    trained = {name: w + 3 * gaussian(60, 5) @ gaussian(5, 40) for name, w in noise.items()}
    learned = {name: torch.from_numpy(generator.standard_t(2.0, (60, 40))) for name in noise}
    said = {
        whose: [r for r in compare(*pair).reading() if r.metric in OF_ALPHA]
        for whose, pair in {
            "base": (noise, learned),
            "fine-tuned model": (learned, noise),
            "base and of the fine-tuned model": (
                noise,
                {k: 2.0 * w + gaussian(60, 40, seed=9) for k, w in noise.items()},
            ),
        }.items()
    }
    for whose, readings in said.items():
        assert [reading.metric for reading in readings] == list(OF_ALPHA)
        for reading in readings:
            assert reading.verdict == "no claim"
            assert f"(most layers of the {whose} are random-like: alpha says" in str(reading)
    (alpha,) = (r for r in compare(learned, trained).reading() if r.metric == "alpha")
    assert alpha.verdict != "no claim"
    one = {**learned, "0.weight": noise["0.weight"]}
    (alpha,) = (r for r in compare(one, learned).reading() if r.metric == "alpha")
    assert alpha.verdict != "no claim"


def test_the_file_is_the_summary_and_is_replaced_whole(models, tmp_path):
    found = compare(*models)
    path = tmp_path / "metrics_summary.json"
    path.write_text("old")
    found.write_metrics_summary(path)
    assert json.loads(path.read_text()) == found.metrics_summary()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(OSError, match="no folder"):
        found.write_metrics_summary(tmp_path / "nowhere" / "summary.json")


def test_strangers_and_options_of_one_model_are_refused(models):
    base, _ = models
    with pytest.raises(ValueError, match="no layer in common"):
        compare(base, nn.ModuleDict({"other": nn.Linear(9, 9)}))
    for option in ("base_model", "spectra"):
        with pytest.raises(TypeError, match=f"{option}= belongs to one model"):
            compare(base, base, **{option: base})
    with pytest.raises(TypeError, match="nonsense"):
        compare(base, base, nonsense=1)


def test_nothing_is_changed(models):
    before = [copy.deepcopy(model.state_dict()) for model in models]
    state = torch.get_rng_state()
    compare(*models, randomize=True)
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(value, old[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpoints_are_compared_as_the_models_in_them(models, tmp_path):
    base, finetuned = models
    for name, model in (("base", base), ("finetuned", finetuned)):
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors")
    found = compare(tmp_path / "base", tmp_path / "finetuned")
    expected = compare(base, finetuned)
    assert found.metrics_summary() == expected.metrics_summary()
    pd.testing.assert_frame_equal(found.to_dataframe(), expected.to_dataframe())
    assert compare(base, tmp_path / "base").reading() == ()


def test_a_layer_in_front_does_not_shift_the_others():
    class Model(nn.Module):
        def __init__(self, extra):
            super().__init__()
            self.fc1 = nn.Linear(64, 32, bias=False)
            if extra:
                self.extra = nn.Linear(64, 32, bias=False)
            self.fc2 = nn.Linear(64, 32, bias=False)

    finetuned, base = Model(False), Model(True)
    base.load_state_dict(finetuned.state_dict(), strict=False)
    found = compare(base, finetuned)
    assert found.to_dataframe().relative_delta.tolist() == [0.0, 0.0]
    assert found.matching.missing == ("extra",)
    weightwatcher = import_peer()
    with contained():  # walks over both models in step, and compares the second with the extra one
        theirs = weightwatcher.WeightWatcher(model=finetuned, base_model=base).analyze()
    assert theirs.norm.iloc[-1] > 1.0
