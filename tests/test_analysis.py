import math
import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from ww_train.analysis import analyze, describe, esd, measure
from ww_train.power_law import PowerLaw, fit_power_law
from ww_train.report import Report
from ww_train.traps import shuffle

from .oracles import (
    dense,
    detx_num,
    evals_by_svd,
    gaussian,
    heavy,
    orthogonal,
    pareto,
    power_law_scan,
    zoo,
)


def weight(rows=128, cols=64, seed=0, dtype=torch.float32):
    return torch.tensor(heavy(rows, cols, seed), dtype=dtype)


def numbers(layer):
    """Values of a layer that do not depend on the units of the weights."""
    row = layer.to_dict()
    keys = ["alpha", "D", "sigma", "num_pl_spikes", "detX_num", "ERG_gap", "trace_log"]
    keys += ["stable_rank", "matrix_rank", "entropy", "rank_loss"]
    return {key: row[key] for key in keys}


def test_every_number_of_a_dense_layer_against_the_oracles():
    w = weight()
    row = measure(nn.Sequential(dense(w)))["0"].to_dict()
    evals = evals_by_svd(w)
    _, i, alpha, distance = power_law_scan(evals)
    norm, top, tail = evals.sum(), evals[-1], len(evals) - i
    expected = {
        "layer_id": 0,
        "name": "0",
        "longname": "0",
        "layer_type": "dense",
        "N": 128,
        "M": 64,
        "Q": 2.0,
        "rf": 1,
        "num_evals": 64,
        "alpha": alpha,
        "D": distance,
        "sigma": (alpha - 1) / math.sqrt(tail),
        "xmin": evals[i],
        "xmax": top,
        "num_pl_spikes": tail,
        "alpha_weighted": alpha * math.log10(top),
        "log_alpha_norm": math.log10(sum(x**alpha for x in evals)),
        "detX_num": detx_num(evals),
        "num_ERG_spikes": detx_num(evals),
        "detX_val": evals[-detx_num(evals)],
        "ERG_gap": detx_num(evals) - tail,
        "trace_log": math.fsum(math.log(x / evals.mean()) for x in evals[i:]),
        "norm": norm,
        "log_norm": math.log10(norm),
        "spectral_norm": top,
        "log_spectral_norm": math.log10(top),
        "stable_rank": norm / top,
        "matrix_rank": 64,
        "lambda_max": top,
        "sv_max": math.sqrt(top),
        "sv_min": math.sqrt(evals[0]),
        "rank_loss": 0,
        "weak_rank_loss": int((evals < 1e-6 * top).sum()),
        "status": "success",
    }
    for key, value in expected.items():
        assert row[key] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)
    assert "num_traps" not in row


def test_every_randomised_number_belongs_to_the_shuffled_matrix():
    layer = measure(nn.Sequential(dense(weight())), randomize=True, seed=2)["0"]
    row, s, mp = layer.to_dict(), layer.spectrum, layer.traps.mp
    top = evals_by_svd(shuffle(weight()[None], 2, "0")[0])[-1]
    expected = {
        "max_rand_eval": top,
        "rand_bulk_min": mp.bulk_min,
        "rand_bulk_max": mp.bulk_max,
        "rand_sigma_mp": mp.sigma_mp,
        "rand_mp_softrank": mp.bulk_max / top,
        "rand_W_scale": math.sqrt(64 / s.norm),
        "ww_softrank": top / s.lambda_max,
        "ww_maxdist": s.lambda_max - top,
    }
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=1e-9)
    assert row["num_traps"] == row["rand_num_spikes"] == layer.num_traps > 0


def test_a_convolution_pools_its_slices_at_half_their_energy():
    conv = nn.Conv2d(16, 24, 3)
    layer = measure(nn.Sequential(conv))["0"]
    w = conv.weight.detach()
    slices = [w[:, :, i, j] for i in range(3) for j in range(3)]
    expected = evals_by_svd(*slices, scale=0.5**0.5)
    np.testing.assert_allclose(layer.spectrum.evals, expected, rtol=1e-9)
    assert layer.spectrum.norm == pytest.approx(0.5 * float((w.double() ** 2).sum()), rel=1e-9)
    assert layer.spectrum.sv_min == pytest.approx(math.sqrt(expected[0]), rel=1e-9)


def test_module_and_state_dict_give_the_same_report():
    model = zoo()
    of_module, of_state = (
        measure(model, randomize=True),
        measure(model.state_dict(), randomize=True),
    )
    assert len(of_module) > 30
    rows = [[layer.to_dict() for layer in report] for report in (of_module, of_state)]
    for a, b in zip(*rows, strict=True):
        a.pop("layer_type"), b.pop("layer_type")  # a state dict does not know an embedding
        assert a == b


@pytest.mark.parametrize("exponent", [-50, 50])
def test_scaling_by_a_power_of_two_is_exact(exponent):
    w = weight()
    assert numbers(measure(w * 2.0**exponent)["W"]) == numbers(measure(w)["W"])


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_invariance(scale, dtype):
    w = weight(dtype=torch.float64)
    a = measure(w.to(dtype), randomize=True)["W"]
    b = measure((w * scale).to(dtype), randomize=True)["W"]
    assert numbers(b) == pytest.approx(numbers(a), rel=1e-5 if dtype == torch.float32 else 1e-9)
    assert a.num_traps == b.num_traps
    assert a.verdict == b.verdict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_numbers_are_those_of_the_stored_values_whatever_the_dtype(dtype):
    stored = weight().to(dtype)
    a, b = measure(stored)["W"], measure(stored.double())["W"]
    assert numbers(a) == pytest.approx(numbers(b), rel=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.T,
        lambda w: w.flip(0),
        lambda w: w[:, torch.randperm(64, generator=torch.Generator().manual_seed(1))],
        lambda w: orthogonal(128) @ w,
        lambda w: w @ orthogonal(64),
        lambda w: -w,
        lambda w: torch.cat([w, torch.zeros(30, 64, dtype=w.dtype)]),
    ],
    ids=["transpose", "rows", "columns", "rotate left", "rotate right", "sign", "zero rows"],
)
def test_what_does_not_change_the_numbers(change):
    w = weight(dtype=torch.float64)
    assert numbers(measure(change(w))["W"]) == pytest.approx(numbers(measure(w)["W"]), rel=1e-8)


def test_measuring_twice_gives_the_same_report():
    model = zoo()
    first, second = measure(model, randomize=True), measure(model, randomize=True)
    assert first.scalars() == second.scalars()
    assert [x.to_dict() for x in first] == [x.to_dict() for x in second]


def test_a_layer_does_not_depend_on_the_others():
    model = zoo()
    together = measure(model)
    alone = measure({"fc.weight": model.fc.weight})["fc"]
    assert numbers(together["fc"]) == pytest.approx(numbers(alone), rel=1e-12)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_nothing_and_is_left_alone(threads):
    model = zoo()
    report = measure(model, randomize=True)
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as pool:  # new threads inherit the last number that was set
        assert pool.submit(torch.get_num_threads).result() == threads
    torch.set_num_threads(1)
    expected = measure(model, randomize=True)
    assert report.scalars() == pytest.approx(expected.scalars(), rel=1e-12)
    assert [x.name for x in report] == [x.name for x in expected]


def test_nothing_of_the_model_changes():
    model = zoo().train()
    model.fc.eval()
    model.embed.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    attributes = [set(vars(m)) for m in model.modules()]
    measure(model, randomize=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert all(p.grad is None for p in model.parameters() if p is not model.fc.weight)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_nothing_of_a_parametrized_model_changes(kind):
    parametrize = getattr(torch.nn.utils.parametrizations, kind)
    model = nn.Sequential(parametrize(nn.Linear(12, 10))).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    measure(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_global_generator_is_used():
    torch_state = torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002
    python_state = random.getstate()
    measure(weight(), randomize=True)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # noqa: NPY002
    assert random.getstate() == python_state


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode,
        torch.enable_grad,
        lambda: torch.device("meta"),
    ],
    ids=["autocast", "inference mode", "enable grad", "default device"],
)
def test_the_numbers_do_not_depend_on_the_surrounding_context(context, threads):
    model = zoo()
    expected = measure(model, randomize=True).scalars()
    with context():
        assert measure(model, randomize=True).scalars() == expected


def test_global_seeds_do_not_matter():
    w = weight()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = measure(w, randomize=True)["W"].traps
        torch.manual_seed(2)
        second = measure(w, randomize=True)["W"].traps
    assert first == second


def test_tied_weights_are_measured_once():
    model = nn.ModuleDict({"embed": nn.Embedding(30, 12), "head": nn.Linear(12, 30, bias=False)})
    model["head"].weight = model["embed"].weight
    report = measure(model)
    assert [x.name for x in report] == ["embed"]
    assert [(x.name, x.reason) for x in report.skipped] == [
        ("head", "shares its weights with embed")
    ]


def test_layers_keep_the_order_and_the_ids_of_the_model():
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 3), nn.Conv2d(9, 10, 2))
    report = measure(model)
    assert [(x.layer_id, x.name) for x in report] == [(0, "0"), (2, "2")]
    assert [x.name for x in report.skipped] == ["1"]
    assert report["2"].to_dict()["name"] == "2"


def test_skipped_layers_keep_the_order_of_the_model():
    weights = [torch.full((9, 9), torch.nan), torch.ones(9, 3), torch.zeros(9, 9), torch.ones(3, 9)]
    report = measure(nn.Sequential(*map(dense, weights)))
    assert [x.name for x in report.skipped] == ["0", "1", "2", "3"]


def test_nested_layers_have_a_short_and_a_long_name():
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"fc": nn.Linear(12, 10)})})
    row = measure(model)["encoder.fc"].to_dict()
    assert (row["name"], row["longname"]) == ("fc", "encoder.fc")


def test_bounds_on_the_number_of_eigenvalues():
    model = nn.Sequential(nn.Linear(20, 9), nn.Linear(20, 10), nn.Linear(20, 11))
    report = measure(model, min_evals=10, max_evals=10)
    assert [x.name for x in report] == ["1"]
    reasons = {x.name: x.reason for x in report.skipped}
    assert reasons == {
        "0": "9 eigenvalues, fewer than min_evals=10",
        "2": "11 eigenvalues, more than max_evals=10",
    }
    assert len(measure(model, max_evals=None)) == 3


def test_unknown_layer_names_the_known_ones():
    report = measure(nn.Sequential(nn.Linear(20, 9), nn.Linear(9, 20)))
    with pytest.raises(KeyError, match=r"no layer 'fc'.*0, 1"):
        report["fc"]


def layer_with(alpha):
    """A report whose one layer has about this alpha: a power law of quantiles."""
    quantiles = (1 - (np.arange(200) + 0.5) / 200) ** (-1 / (alpha - 1))
    w = torch.diag(torch.tensor(np.sqrt(quantiles)))
    return measure(w)["W"]


def test_a_short_tail_and_a_poor_fit_are_named():
    clusters = torch.diag(torch.tensor([1.0] * 10 + [2.0] * 10 + [50.0] * 4))
    layer = measure(clusters)["W"]
    assert layer.fit.D > 0.1
    assert f"poor fit (D {layer.fit.D:.2f})" in layer.warning
    short = measure(clusters[10:, 10:])["W"]
    assert (short.fit.num_pl_spikes < 10) == ("tail of" in short.warning)


@pytest.mark.parametrize(
    ("alpha", "verdict", "warning"),
    [
        (1.5, "over-trained", "over-trained"),
        (2.0, "critical", None),
        (3.0, "well-trained", ""),
        (9.0, "under-trained", "under-trained"),
    ],
)
def test_verdict(alpha, verdict, warning):
    layer = layer_with(alpha)
    assert layer.alpha == pytest.approx(alpha, rel=0.05)
    assert layer.verdict == verdict
    if warning is not None:
        assert layer.warning == warning


def test_a_layer_without_a_power_law_says_so():
    layer = measure(torch.ones(30, 20))["W"]
    assert layer.alpha is None
    assert layer.ERG_gap is None
    assert layer.verdict == "malformed"
    assert "no power law" in layer.warning
    assert layer.to_dict()["status"] == "failed"
    assert (layer.spectrum.matrix_rank, layer.num_traps) == (1, None)


def test_scalars_are_plain_floats_that_summarise_the_layers():
    in_the_bulk = torch.diag(torch.tensor(np.sqrt(pareto(64, 2.5)), dtype=torch.float32))
    weights = {"a": weight(seed=1), "b": in_the_bulk, "flat": torch.ones(30, 20)}
    report = measure(nn.ModuleDict({k: dense(w) for k, w in weights.items()}), randomize=True)
    scalars = report.scalars()
    assert all(type(v) is float and math.isfinite(v) for v in scalars.values())
    a, b = report["a"], report["b"]
    assert scalars["ww/alpha_mean"] == pytest.approx((a.alpha + b.alpha) / 2)
    assert scalars["ww/alpha_min"] == min(a.alpha, b.alpha)
    assert scalars["ww/alpha_max"] == max(a.alpha, b.alpha)
    assert scalars["ww/erg_gap_mean"] == (abs(a.ERG_gap) + abs(b.ERG_gap)) / 2
    assert b.trace_log < 0 < a.trace_log
    expected = (a.trace_log - b.trace_log) / 2
    assert scalars["ww/trace_log_mean"] == pytest.approx(expected)
    assert scalars["ww/traps_total"] == a.num_traps + b.num_traps + report["flat"].num_traps
    assert scalars["ww/num_layers"] == 3
    assert scalars["ww_alpha/a"] == a.alpha
    assert scalars["ww_erg_gap/b"] == b.ERG_gap
    assert scalars["ww_traps/flat"] == 1
    assert "ww_alpha/flat" not in scalars


def test_scalars_of_an_empty_report():
    assert Report((), ()).scalars() == {"ww/num_layers": 0.0}


def test_dataframe_has_one_row_a_layer_and_nan_for_what_is_missing():
    model = nn.ModuleDict({"a": dense(weight()), "flat": dense(torch.ones(30, 20))})
    model["tiny"] = nn.Linear(9, 3)
    frame = measure(model, randomize=True).to_dataframe()
    assert frame["longname"].tolist() == ["a", "flat"]
    assert frame["alpha"].isna().tolist() == [False, True]
    assert frame["status"].tolist() == ["success", "failed"]
    assert frame.attrs["skipped"] == {"tiny": "3 eigenvalues, fewer than min_evals=8"}
    texts = {"name", "longname", "layer_type", "status", "warning", "trap_causes"}
    for column in set(frame.columns) - texts:
        assert frame[column].dtype.kind in "iufb", column
    values = frame[[c for c in frame.columns if frame[c].dtype.kind == "f"]]
    assert not (values == -1).any().any()


def test_analyze_is_the_dataframe_of_measure():
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 20))
    frame = analyze(model, randomize=True, seed=3, progress=False)
    expected = measure(model, randomize=True, seed=3).to_dataframe()
    assert frame.equals(expected)
    assert {"num_traps", "max_rand_eval", "rand_sigma_mp"} <= set(frame.columns)


def test_analyze_warns_when_nothing_could_be_analysed():
    with pytest.warns(UserWarning, match="no layer could be analysed.*fewer than min_evals"):
        frame = analyze(nn.Sequential(nn.Linear(9, 3)))
    assert len(frame) == 0
    assert list(frame.attrs["skipped"]) == ["0"]
    with pytest.warns(UserWarning, match="holds no matrix"):
        analyze(nn.ReLU())


def test_repr_names_every_layer():
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(9, 3))
    lines = repr(measure(model)).splitlines()
    assert "alpha" in lines[1]
    assert "1: skipped" in lines[2]


def test_nothing_is_printed(capfd):
    measure(zoo(), randomize=True, progress=True)  # standard error is no terminal here
    assert capfd.readouterr() == ("", "")


def test_the_fit_is_that_of_the_eigenvalues_above_rounding():
    w = gaussian(128, 20) @ gaussian(20, 64, seed=1)
    layer = measure(w)["W"]
    expected = fit_power_law(evals_by_svd(w)[-20:])
    assert layer.spectrum.matrix_rank == 20
    assert layer.alpha == pytest.approx(expected.alpha, rel=1e-9)
    assert layer.fit.num_pl_spikes == expected.num_pl_spikes <= 20


def encoder():
    """Two dense layers, a convolution and an embedding with dotted names."""
    blocks = {f"block{i}": nn.ModuleDict({"fc": nn.Linear(20, 12)}) for i in range(2)}
    blocks["conv"] = nn.Conv2d(12, 16, 2)
    blocks["embed"] = nn.Embedding(30, 12)
    return nn.ModuleDict(blocks)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"layers": "block0.fc"}, ["block0.fc"]),
        ({"layers": "block*"}, ["block0.fc", "block1.fc"]),
        ({"layers": ["embed", 0]}, ["block0.fc", "embed"]),
        ({"layers": -1}, ["embed"]),
        ({"layers": "-block*"}, ["conv", "embed"]),
        ({"layers": ["block*", "-block0.fc"]}, ["block1.fc"]),
        ({"layers": re.compile(r"1|em")}, ["block1.fc", "embed"]),
        ({"types": "conv2d"}, ["conv"]),
        ({"types": ("dense", "embedding")}, ["block0.fc", "block1.fc", "embed"]),
        ({"layers": "block1*", "types": "dense"}, ["block1.fc"]),
    ],
    ids=str,
)
def test_layers_are_chosen_and_keep_their_ids(options, names):
    model = encoder()
    chosen = measure(model, **options)
    assert [x.name for x in chosen] == names
    assert chosen.skipped == ()
    everything = measure(model)
    assert [x.layer_id for x in chosen] == [everything[name].layer_id for name in names]
    assert [numbers(x) for x in chosen] == [numbers(everything[name]) for name in names]
    assert describe(model, **options)["longname"].tolist() == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "block0.fd"}, r"no layer matches 'block0.fd'; did you mean 'block0.fc'"),
        ({"layers": 4}, r"no layer 4.*4 layers"),
        ({"types": "conv3d"}, r"no layer is of type conv3d; the types here are conv2d, dense"),
    ],
)
def test_a_layer_that_does_not_exist_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        measure(encoder(), **options)


def test_slices_can_be_measured_one_by_one():
    conv = nn.Conv2d(16, 24, (1, 2))
    report = measure(nn.ModuleDict({"conv": conv}), pool=False)
    assert [x.name for x in report] == ["conv[0]", "conv[1]"]
    for i, layer in enumerate(report):
        expected = evals_by_svd(conv.weight.detach()[:, :, 0, i], scale=0.5**0.5)
        np.testing.assert_allclose(layer.spectrum.evals, expected, rtol=1e-9)
    rows = [layer.to_dict() for layer in report]
    assert [(r["longname"], r["slice_id"], r["rf"]) for r in rows] == [
        ("conv", 0, 1),
        ("conv", 1, 1),
    ]


def test_differences_to_a_base_model():
    base, model = encoder(), encoder()
    model.load_state_dict(base.state_dict())
    change = gaussian(12, 20) * 1e-3
    model["block1"]["fc"].weight.data += change
    report = measure(model, base_model=base.state_dict())
    assert [x.name for x in report] == ["block1.fc"]
    difference = model["block1"]["fc"].weight.double() - base["block1"]["fc"].weight.double()
    np.testing.assert_allclose(
        report["block1.fc"].spectrum.evals, evals_by_svd(difference), rtol=1e-7
    )
    unchanged = dict.fromkeys(("block0.fc", "conv", "embed"), "identical to the base model")
    assert {x.name: x.reason for x in report.skipped} == unchanged


def test_a_base_model_need_not_have_the_same_layers():
    model = encoder()
    base = {"block0.fc.weight": torch.ones(12, 19), "other.weight": torch.ones(12, 20)}
    reasons = {x.name: x.reason for x in measure(model, base_model=base).skipped}
    assert "(1, 12, 20) here, (1, 12, 19) in the base" in reasons["block0.fc"]
    assert reasons["block1.fc"] == "the base model has no layer of this name"


def test_the_rank_of_a_low_rank_difference():
    base = weight(256, 128)
    update = 0.01 * gaussian(256, 4) @ gaussian(4, 128, 1)
    assert measure(base + update, base_model=base)["W"].spectrum.matrix_rank == 4


def test_the_inverse_spectrum():
    w = weight()
    layer = measure(w, inverse=True)["W"]
    expected = np.sort(1 / evals_by_svd(w))
    np.testing.assert_allclose(layer.spectrum.evals, expected, rtol=1e-8)
    assert layer.alpha == pytest.approx(fit_power_law(expected).alpha, rel=1e-7)
    with pytest.raises(ValueError, match="inverse=True"):
        measure(w, inverse=True, randomize=True)


def test_the_fit_can_be_chosen():
    w = weight()
    evals = evals_by_svd(w)
    given = PowerLaw(drop_top=3)
    layer = measure(w, fit=given)["W"]
    assert layer.fit.xmax == pytest.approx(evals[-4], rel=1e-9)
    assert layer.alpha == pytest.approx(fit_power_law(evals[:-3]).alpha, rel=1e-9)
    assert measure(w, fit=lambda evals: None)["W"].alpha is None


def test_the_random_bulk_of_the_layer_itself():
    u, v = torch.ones(128) / 128**0.5, torch.ones(64) / 8
    row = measure(gaussian(128, 64) + 60 * torch.outer(u, v), mp_fit=True)["W"].to_dict()
    assert row["num_spikes"] == 1
    assert row["bulk_max"] == pytest.approx((128**0.5 + 8) ** 2, rel=0.1)
    assert row["mp_softrank"] == pytest.approx(row["bulk_max"] / row["lambda_max"])
    assert row["W_scale"] == pytest.approx(math.sqrt(64 / row["norm"]))


def test_a_limit_on_the_larger_dimension():
    report = measure(encoder(), max_N=20)
    assert [x.name for x in report] == ["block0.fc", "block1.fc", "conv"]
    assert report.skipped[0].reason == "N = 30, more than max_N=20"


def test_describe_says_what_would_be_analysed():
    model = encoder()
    model["tiny"] = nn.Linear(20, 3)
    frame = describe(model, max_evals=20).set_index("longname")
    report = measure(model, max_evals=20)
    assert frame["skipped"].to_dict() == {
        **{x.name: "" for x in report},
        **{x.name: x.reason for x in report.skipped},
    }
    for layer in report:
        row = layer.to_dict()
        for column in ("layer_id", "layer_type", "N", "M", "Q", "rf", "num_evals"):
            assert frame[column][layer.name] == row[column]


def test_the_esd_of_one_layer_is_that_of_its_report():
    model = encoder()
    model["tiny"] = nn.Linear(20, 3)
    np.testing.assert_array_equal(esd(model, "conv"), measure(model)["conv"].spectrum.evals)
    np.testing.assert_allclose(esd(model, "tiny"), evals_by_svd(model["tiny"].weight), rtol=1e-9)
    with pytest.raises(ValueError, match="NaN"):
        esd(torch.full((9, 9), torch.nan), 0)


def test_the_summary_is_the_mean_of_the_layers_that_have_the_number():
    model = nn.ModuleDict({"a": dense(weight(seed=1)), "flat": dense(torch.ones(30, 20))})
    model["b"] = dense(weight(seed=2))
    report = measure(model)
    summary = report.summary()
    assert summary["alpha"] == pytest.approx((report["a"].alpha + report["b"].alpha) / 2)
    norms = [layer.spectrum.log_norm for layer in report]
    assert summary["log_norm"] == pytest.approx(sum(norms) / 3)
    assert "mp_softrank" not in summary
