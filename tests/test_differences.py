"""Live against weightwatcher 0.7.7: what `benchmarks/differences.md` says, row by row.

Outside of that table every number agrees to 1e-6, with all options that both libraries have; inside
it a test computes both sides and, where there is a right answer, the answer from its definition.
"""

import ast
import contextlib
import copy
import fnmatch
import functools
import inspect
import io
import math
import pathlib
import re
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ww_train import (
    ClipXmax,
    KernelMP,
    PowerLaw,
    TruncatedPowerLaw,
    WeightWatcher,
    XminPeak,
    analyze,
    describe,
    distances,
    esd,
    measure,
)
from ww_train.divergence import jensen_shannon_distance
from ww_train.linalg import svd_eigenvalues
from ww_train.power_law import fit_power_law

from .oracles import (
    Experts,
    dense,
    evals_by_svd,
    gaussian,
    heavy,
    named,
    orthogonal,
    pareto,
    power_law_scan,
)
from .peer import contained
from .test_parity import peer  # noqa: F401

TESTS = pathlib.Path(__file__).parent
TABLE = TESTS.parent / "benchmarks" / "differences.md"

ALWAYS = {"layer_id", "detX_val_unrescaled", "weak_rank_loss", "warning"}
"""Columns that the table lists without a condition."""

CONV = ALWAYS | {"sv_min"}


class Peer:
    """The peer's calls, silent and repeatable: its shuffles draw from numpy's global generator."""

    def __init__(self, module):
        self.module = module
        self.rmt = sys.modules["weightwatcher.RMT_Util"]

    @contextlib.contextmanager
    def _repeatable(self):
        state = np.random.get_state()  # noqa: NPY002
        np.random.seed(0)  # noqa: NPY002
        try:
            with contained():
                yield
        finally:
            np.random.set_state(state)  # noqa: NPY002

    def analyze(self, model, base_model=None, **options):
        with self._repeatable():
            watcher = self.module.WeightWatcher(model=model, base_model=base_model)
            return watcher.analyze(**options)

    def describe(self, model, **options):
        with self._repeatable():
            return self.module.WeightWatcher(model=model).describe(**options)

    def esd(self, model, **options):
        with self._repeatable():
            return self.module.WeightWatcher(model=model).get_ESD(**options)

    def summary(self, model):
        with self._repeatable():
            watcher = self.module.WeightWatcher(model=model)
            watcher.analyze()
            return watcher.get_summary()

    def fit(self, evals):
        with self._repeatable():
            return sys.modules["weightwatcher.WW_powerlaw"].WWFit(evals)


@pytest.fixture(scope="module")
def ww(peer):  # noqa: F811
    """The peer; the fixture of test_parity has imported it and undone what that does."""
    found = Peer(sys.modules["weightwatcher"])
    if found.rmt.EPSILON != 1e-10:
        pytest.skip("where there is a GPU the peer rounds all weights to float16")
    return found


def frame(model, **options):
    return measure(model, **options).to_dataframe()


def row(model, **options):
    """Our only row."""
    (found,) = measure(model, **options)
    return found.to_dict()


def model_of(**weights):
    """Dense layers with these weights."""
    return nn.ModuleDict({k: dense(torch.as_tensor(w).float()) for k, w in weights.items()})


def slices_of(conv):
    """The matrices of a convolution, one for each position of its kernel, in order."""
    return list(conv.weight.detach().flatten(2).permute(2, 0, 1))


def assert_agree(ours, theirs, different, key="longname"):
    """All columns of the peer in the rows that both have: numbers to 1e-6, counts and words exactly."""
    ours, theirs = ours.set_index(key), theirs.set_index(key)
    both = theirs.index.intersection(ours.index)
    assert len(both) == len(ours) > 0
    for column in set(theirs.columns) - different:
        a, b = ours.loc[both, column].tolist(), theirs.loc[both, column].tolist()
        if any(isinstance(x, float | np.floating) for x in a + b):
            np.testing.assert_allclose(a, np.array(b, float), rtol=1e-6, err_msg=column)
        else:
            assert a == b, column


# Agreement, option by option


@pytest.fixture(scope="module")
def net():
    """A small convolutional net after some steps on handwritten digits; its head is not analysed."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 24, 3), nn.ReLU(), nn.Conv2d(24, 40, 3), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(640, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 7)),
            nn.Linear(7, 10),
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(30):
        batch = slice(50 * step, 50 * step + 50)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def dense_net():
    """Three dense layers of different shapes; the first has a heavy tail."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 64), nn.Linear(64, 40))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(heavy(64, 96) * 0.05))
    return model


def test_agree_on_a_trained_convolutional_net(ww, net):
    theirs = ww.analyze(net, detX=True)
    assert set(theirs.longname) == {"0", "2", "5", "7"}
    assert_agree(frame(net), theirs, CONV)


def test_agree_on_describe(ww, net):
    ours = describe(net)
    ours = ours[ours.skipped == ""]
    assert_agree(ours, ww.describe(net), {"layer_id", "name"})


def test_agree_on_the_inverse_of_dense_layers(ww, dense_net):
    theirs = ww.analyze(dense_net, inverse=True, detX=True)
    assert_agree(frame(dense_net, inverse=True), theirs, ALWAYS | {"sv_max", "sv_min"})


def test_agree_on_clip_xmax(ww, dense_net):
    theirs = ww.analyze(dense_net, fix_fingers="clip_xmax", detX=True)
    ours = frame(dense_net, fit=ClipXmax(max_fingers=9))
    assert ours.num_fingers.tolist() == [0, 2, 0]
    assert_agree(ours, theirs, ALWAYS | {"num_fingers", "num_pl_spikes"})


@pytest.mark.parametrize("xmax", [1, 5, -5, 20])
def test_agree_on_dropped_eigenvalues(ww, dense_net, xmax):
    theirs = ww.analyze(dense_net, xmax=xmax, detX=True)
    ours = frame(dense_net, fit=PowerLaw(drop_top=abs(xmax)))
    assert_agree(ours, theirs, ALWAYS | {"ERG_gap"})


def test_agree_on_single_slices(ww, net):
    theirs = ww.analyze(net, pool=False, detX=True)
    ours = frame(net, pool=False).fillna({"slice_id": 0})
    assert ours.slice_id.tolist() == [*range(9), 0, 0]
    without_units = ("name", "layer_type", "N", "M", "Q", "num_evals", "alpha", "D", "sigma")
    without_units += ("num_pl_spikes", "detX_num", "ERG_gap", "stable_rank", "entropy", "status")
    assert_agree(ours, theirs, set(theirs) - {*without_units}, key=["longname", "slice_id"])
    scale = 9 * (ours.longname == "2") + (ours.longname != "2")  # of the eigenvalues
    for column in ("norm", "lambda_max", "xmin", "xmax", "detX_val"):
        np.testing.assert_allclose(scale * ours[column], theirs[column].astype(float), rtol=1e-6)
    assert ww.analyze(net, ww2x=True).alpha.tolist() == theirs.alpha.tolist()


def test_agree_on_the_kernel_fit_of_the_bulk(ww, net):
    model = nn.ModuleDict({"conv": net[2], "wide": net[7], "square": dense(gaussian(32, 32))})
    theirs = ww.analyze(model, mp_fit=True, detX=True)
    assert {"num_spikes", "sigma_mp", "mp_softrank", "bulk_min", "bulk_max"} < set(theirs)
    assert_agree(frame(model, mp_fit=KernelMP()), theirs, CONV)


def test_agree_on_vectors(ww, dense_net):
    theirs = ww.analyze(dense_net, vectors=True, detX=True).set_index("longname")
    for layer in measure(dense_net, vectors=True):
        # rounding decides on which side of xmin the peer finds xmin
        found = layer.localization
        sides = [found, replace(found, num_tail=found.num_tail - 1)]
        sides = [{k: v for k, v in x.to_dict().items() if "info" not in k} for x in sides]
        assert len(sides[0]) == 12
        peers = theirs.loc[layer.name, list(sides[0])].to_dict()
        assert any(peers == pytest.approx(side, rel=1e-6) for side in sides)


def test_agree_on_differences_to_a_base_model(ww, dense_net):
    base = copy.deepcopy(dense_net)
    for index, layer in enumerate(base):
        layer.weight.data += 0.01 * gaussian(*layer.weight.shape, seed=index)
    theirs = ww.analyze(dense_net, base_model=base, detX=True)
    assert_agree(frame(dense_net, base_model=base), theirs, ALWAYS)


def test_agree_on_the_eigenvalues_of_one_layer(ww, dense_net):
    for name in ("0", "1", "2"):
        np.testing.assert_allclose(esd(dense_net, name), ww.esd(dense_net, layer=name), rtol=1e-6)


def test_agree_on_the_summary(ww, net):
    model = nn.Sequential(net[2], net[5])
    assert measure(model).summary() == pytest.approx(dict(ww.summary(model)), rel=1e-6)


def test_agree_on_d_which_is_one_sided(ww):
    weight = torch.diag(torch.tensor(np.sqrt(pareto(60, 2.5))))
    found = row(weight)
    assert pytest.approx(found["D"], rel=1e-6) == ww.analyze({"w.weight": weight}).D[0]
    tail = evals_by_svd(weight)[-found["num_pl_spikes"] :]
    law = 1 - (tail / tail[0]) ** (1 - found["alpha"])
    steps = np.arange(len(tail) + 1) / len(tail)
    below, above = abs(law - steps[:-1]).max(), abs(law - steps[1:]).max()
    assert pytest.approx(below, rel=1e-9) == found["D"]
    assert max(below, above) > found["D"]


# Which layers have a row, and how they are called


def test_layer_id_counts_matrices_from_zero(ww):
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4), nn.Linear(20, 12))
    assert frame(model).layer_id.tolist() == [0, 2]
    assert ww.analyze(model).layer_id.tolist() == [1, 4]  # modules, the root included
    assert frame(model.state_dict()).layer_id.tolist() == [0, 2]
    assert ww.analyze(model.state_dict()).layer_id.tolist() == [1, 3]
    assert ww.analyze(model, start_ids=5).layer_id.tolist() == [6, 9]


def test_names_do_not_depend_on_how_a_model_is_passed(ww):
    state = {"encoder.fc.weight": gaussian(20, 12)}
    assert row(state)["longname"] == ww.analyze(state).longname[0] == "encoder.fc"
    assert (row(state)["name"], ww.analyze(state).name[0]) == ("fc", "encoder.fc")
    layer = nn.Linear(20, 12)
    assert row(layer)["longname"] == row(layer.state_dict())["longname"] == "weight"
    assert ww.analyze(layer).longname[0] == "Linear"


def test_wrappers_are_no_part_of_a_name(ww):
    model = nn.ModuleDict({"_orig_mod": nn.Sequential(nn.Linear(20, 12))})  # as torch.compile does
    assert row(model)["longname"] == "0"
    assert ww.analyze(model).longname[0] == "_orig_mod.0"


PASSED_OVER = {
    "attention": (nn.MultiheadAttention(16, 4), [f"in_proj_weight.{part}" for part in "qkv"]),
    "LSTM": (nn.LSTM(11, 12), [f"weight_{x}_l0.{gate}" for x in ("ih", "hh") for gate in "ifgo"]),
    "GRU": (nn.GRU(11, 12), [f"weight_{x}_l0.{gate}" for x in ("ih", "hh") for gate in "rzn"]),
    "RNN": (nn.RNN(11, 12), ["weight_ih_l0", "weight_hh_l0"]),
    "ConvTranspose2d": (nn.ConvTranspose2d(10, 12, 2), [""]),
    "Conv3d": (nn.Conv3d(10, 12, (1, 2, 3)), [""]),
    "experts": (Experts(), [f"gate_up_proj.{index}" for index in range(3)]),
}
TYPES = {"attention", "recurrent", "conv2d", "conv3d", "expert", "bilinear"}


@pytest.mark.parametrize("kind", PASSED_OVER)
def test_layers_that_the_peer_passes_over(ww, kind):
    module, names = PASSED_OVER[kind]
    model = nn.ModuleDict({"x": module, "fc": nn.Linear(20, 12)})
    names = [f"x.{name}".rstrip(".") for name in names]
    report = measure(model)
    assert [x.name for x in report if x.name.startswith("x") and "out_proj" not in x.name] == names
    assert {report[name].layer_type for name in names} < TYPES
    assert set(ww.analyze(model).longname) <= {"x.out_proj", "fc"}
    weights = [w.detach() for n, w in module.named_parameters() if w.ndim > 1 and "out_" not in n]
    if kind in ("ConvTranspose2d", "Conv3d"):
        literal = [evals_by_svd(*slices_of(module), scale=0.5**0.5)]
    elif kind == "experts":
        literal = [evals_by_svd(expert) for expert in weights[0]]
    else:
        parts = {"attention": 3, "LSTM": 4, "GRU": 3, "RNN": 1}[kind]
        literal = [evals_by_svd(part) for w in weights for part in w.chunk(parts)]
    for name, evals in zip(names, literal, strict=True):
        np.testing.assert_allclose(report[name].spectrum.evals, evals, rtol=1e-9)


def test_conv1d_and_bilinear_are_stacks_of_matrices(ww):
    conv, bilinear = nn.Conv1d(32, 64, 16), nn.Bilinear(16, 20, 32)
    np.testing.assert_allclose(
        row(conv)["norm"], evals_by_svd(*slices_of(conv), scale=0.5**0.5).sum(), rtol=1e-9
    )
    np.testing.assert_allclose(
        row(bilinear)["norm"], evals_by_svd(*bilinear.weight).sum(), rtol=1e-9
    )
    assert (row(conv)["N"], row(conv)["M"], row(conv)["rf"]) == (64, 32, 16)
    assert (row(bilinear)["layer_type"], row(bilinear)["rf"]) == ("bilinear", 32)
    theirs = ww.analyze(nn.ModuleDict({"a": conv, "b": bilinear}))
    assert (theirs.N[0], theirs.M[0], theirs.num_evals[0]) == (64, 16, 16)
    assert theirs.norm[0] < 0.2 * row(conv)["norm"]
    assert theirs.norm[1] < 0.2 * row(bilinear)["norm"]
    assert len(ww.analyze(nn.Sequential(nn.Conv1d(32, 64, 3)))) == 0


def test_a_grouped_convolution_is_one_matrix_for_each_group(ww):
    conv = nn.Conv2d(32, 32, 3, groups=2)
    maps = torch.zeros(9, 32, 32)  # what each position of the kernel does to the channels
    for position, weight in enumerate(slices_of(conv)):
        maps[position] = torch.block_diag(*weight.chunk(2))
    evals = evals_by_svd(*maps, scale=0.5**0.5)
    report = measure(conv)
    np.testing.assert_allclose(report["weight"].spectrum.evals, evals, rtol=1e-9)
    theirs = ww.analyze(nn.Sequential(conv))
    assert (theirs.num_evals[0], len(evals)) == (144, 288)
    assert theirs.lambda_max[0] > 1.1 * evals[-1]


def test_slices_that_are_vectors_are_skipped(ww):
    depthwise, one_channel = nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(1, 64, 3)
    report = measure(nn.Sequential(depthwise, one_channel))
    assert len(report) == 0
    assert all("slices are vectors" in x.reason for x in report.skipped)
    theirs = ww.analyze(nn.Sequential(depthwise, one_channel))
    assert theirs.status.tolist() == ["success", "success"]
    lengths = [float((0.5 * w.double() ** 2).sum()) for w in slices_of(depthwise)]
    assert theirs.alpha[0] == pytest.approx(ww.fit(np.array(lengths)).alpha)


def test_the_weight_in_use_is_measured_if_it_is_computed(ww):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        old = nn.utils.weight_norm(nn.Linear(20, 12))
    pruned = prune.random_unstructured(nn.Linear(20, 12), "weight", 0.5)
    with torch.no_grad():
        old.weight_g *= 3  # an optimizer step
        pruned.weight_orig *= 3
    stale = [float((layer.weight.detach() ** 2).sum()) for layer in (old, pruned)]
    model = nn.ModuleDict({"old": old, "pruned": pruned})
    assert ww.analyze(model).norm.tolist() == pytest.approx(stale)
    ours = frame(model).norm.tolist()
    old(torch.ones(20)), pruned(torch.ones(20))  # the next forward pass
    assert ours == pytest.approx(
        [float((layer.weight.detach() ** 2).sum()) for layer in (old, pruned)]
    )
    assert ours == pytest.approx([9 * norm for norm in stale])
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(20, 12))
    norm = float((parametrized.weight.detach() ** 2).sum())
    assert row(nn.Sequential(parametrized))["norm"] == pytest.approx(norm)
    with pytest.raises(AttributeError):
        ww.analyze(nn.Sequential(parametrized))


def test_large_embeddings_are_not_left_out(ww):
    model = nn.ModuleDict({"embed": nn.Embedding(50_001, 8), "fc": nn.Linear(20, 12)})
    assert frame(model).longname.tolist() == ["embed", "fc"]
    assert ww.analyze(model).longname.tolist() == ["fc"]
    assert frame(model, max_N=50_000).longname.tolist() == ["fc"]


def test_limits_may_be_none_or_large(ww):
    model = nn.Sequential(nn.Linear(20, 12))
    for limits in ({"max_evals": None}, {"max_N": None}, {"max_evals": 60_000}):
        assert len(measure(model, **limits)) == 1
        with pytest.raises(Exception, match=r"NoneType|params not valid"):
            ww.analyze(model, **limits)


def with_weight(weight, name="Linear8bitLt"):
    """A module of this class name that holds a weight and nothing else."""
    module = type(name, (nn.Module,), {})()
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


WEIGHT = gaussian(20, 12)
CODES = torch.randint(-127, 127, (20, 12), generator=torch.Generator().manual_seed(0))
UNUSABLE = {
    "NaN": (dense(torch.where(WEIGHT > 2, torch.nan, WEIGHT)), "NaN or infinite weights"),
    "meta": (nn.Linear(20, 12, device="meta"), "on the meta device"),
    "codes": (with_weight(CODES.to(torch.int8)), "quantised or integer codes"),
    "packed": (with_weight(torch.ones(120, 1, dtype=torch.uint8), "Linear4bit"), "integer codes"),
    "complex": (with_weight(torch.complex(WEIGHT, WEIGHT)), "complex weights"),
    "small": (nn.Linear(20, 4), "4 eigenvalues, fewer than min_evals=8"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_cannot_be_analysed_is_skipped_with_the_reason(ww, kind):
    layer, reason = UNUSABLE[kind]
    model = nn.ModuleDict({"bad": layer, "fc": nn.Linear(20, 12)})
    ours = frame(model)
    assert ours.longname.tolist() == ["fc"]
    assert reason in ours.attrs["skipped"]["bad"]
    if kind in ("NaN", "meta"):  # all layers are lost
        with pytest.raises((ValueError, NotImplementedError)):
            ww.analyze(model)
        return
    theirs = ww.analyze(model).set_index("longname")
    if kind == "codes":  # without the scales that turn them into weights
        assert theirs.norm["bad"] == pytest.approx(float((CODES.double() ** 2).sum()))
    elif kind == "complex":  # half of it
        assert theirs.norm["bad"] == pytest.approx(float((WEIGHT**2).sum()))
    else:
        assert list(theirs.index) == ["fc"]


def test_an_empty_result_is_said(ww):
    model = nn.Sequential(nn.Linear(9, 3))
    assert ww.analyze(model).shape == (0, 0)
    with pytest.warns(UserWarning, match=r"no layer could be analysed \(0: 3 eigenvalues, fewer"):
        assert len(analyze(model)) == 0


class Named(nn.Module):
    """Layers whose names the peer mistakes."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(12, 12)
        self.blocks = nn.ModuleList([nn.Linear(12, 12)])
        self.add_module("my-head", nn.Linear(12, 12))
        self.conv = nn.Conv2d(10, 12, 2)


EVERY = ["dense", "blocks.0", "my-head", "conv"]


@pytest.mark.parametrize(
    ("layers", "ours", "theirs"),
    [
        (["-dense"], EVERY[1:], EVERY[1:]),
        (["dense"], ["dense"], EVERY[:3]),  # a type
        (["blocks.0"], ["blocks.0"], []),  # short names only
        (["my-head"], ["my-head"], EVERY),  # an exclusion
        ((1,), ["blocks.0"], EVERY),  # lists only
        (["blocks.*"], ["blocks.0"], []),  # no globs
        ([-1], ["conv"], EVERY[1:]),  # the last, or all but the first
    ],
    ids=named,
)
def test_layers_are_chosen_by_what_is_written(ww, layers, ours, theirs):
    model = Named()
    assert [x.name for x in measure(model, layers=layers)] == ours
    described = ww.describe(model, layers=layers)
    assert (described.longname.tolist() if len(described) else []) == theirs


def test_a_layer_that_does_not_exist_is_an_error(ww):
    model = Named()
    with pytest.raises(ValueError, match=r"no layer matches 'covn'; did you mean 'conv'"):
        measure(model, layers="covn")
    assert len(ww.describe(model, layers=["covn"])) == 0
    assert [x.name for x in measure(model, types="conv2d")] == ["conv"]
    assert ww.describe(model, layers=["conv2d", 1]).longname.tolist() == ["dense"]  # 1 wins


def test_layers_are_chosen_by_what_a_frame_holds():
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(20, 13))
    ours = frame(model)
    for layers in (ours.longname[1:], ours.layer_id[1:], np.array([1]), np.int64(1)):
        assert [x.name for x in measure(model, layers=layers)] == ["1"]


def test_the_first_layer_may_be_chosen_by_a_numpy_integer():
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(20, 13))
    assert [x.name for x in measure(model, layers=np.int64(0))] == ["0"]


# The spectrum


@pytest.mark.parametrize("kernel", [2, (1, 4)])
def test_n_is_the_larger_dimension_for_every_kernel(ww, kernel):
    model = nn.Sequential(nn.Conv2d(64, 16, kernel))
    ours = row(model, mp_fit=KernelMP())
    assert (ours["N"], ours["M"], ours["Q"]) == (64, 16, 4.0)
    assert describe(model).num_evals[0] == ours["num_evals"] == 64
    theirs = ww.analyze(model, mp_fit=True)
    assert (theirs.N[0], theirs.M[0], theirs.Q[0]) == (16, 64, 0.25)
    assert (ww.describe(model).num_evals[0], theirs.num_evals[0]) == (256, 64)
    assert theirs.bulk_max[0] != pytest.approx(ours["bulk_max"], rel=0.01)


def test_a_convolution_has_one_normalisation(ww):
    conv = nn.Conv2d(16, 32, 3)
    model = nn.Sequential(conv)
    energy = float((conv.weight.detach().double() ** 2).sum())
    ours, theirs = row(model), ww.analyze(model)
    norms = ours["norm"], frame(model, pool=False).norm.sum(), esd(model, "0").sum()
    assert norms == pytest.approx([0.5 * energy] * 3)
    eigenvalues = ww.esd(model, layer="0")
    norms = theirs.norm[0], ww.analyze(model, pool=False).norm.sum(), eigenvalues.sum()
    assert norms == pytest.approx([0.5 * energy, 4.5 * energy, energy])
    assert np.count_nonzero(esd(model, "0") >= ours["xmin"]) == ours["num_pl_spikes"]
    assert np.count_nonzero(eigenvalues >= theirs.xmin[0]) != theirs.num_pl_spikes[0]


def test_conv2d_norm_is_a_factor_and_nothing_else(ww):
    model = nn.Sequential(nn.Conv2d(16, 32, 3))
    theirs = ww.analyze(model, conv2d_norm=False)
    assert theirs.norm[0] == pytest.approx(2 * row(model)["norm"])
    assert theirs.alpha[0] == pytest.approx(row(model)["alpha"])


def test_slices_have_no_further_slices(ww):
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Linear(20, 12))
    ours, theirs = frame(model, pool=False), ww.analyze(model, pool=False)
    assert (set(ours.rf), set(theirs.rf)) == ({1}, {1, 9})
    assert (ours.slice_id.isna().sum(), theirs.slice_id.tolist()[-1]) == (1, 0)


def test_the_inverse_of_a_convolution(ww):
    conv = nn.Conv2d(16, 32, 3)
    literal = (1 / evals_by_svd(*slices_of(conv), scale=0.5**0.5)).sum()
    assert row(conv, inverse=True)["norm"] == pytest.approx(literal, rel=1e-9)
    assert ww.analyze(nn.Sequential(conv), inverse=True).norm[0] < 0.9 * literal


def test_the_inverse_of_a_singular_matrix_is_its_pseudo_inverse(ww):
    weight = gaussian(64, 10) @ gaussian(10, 40, 1)
    literal = (1 / evals_by_svd(weight)[-10:]).sum()
    ours = row(weight, inverse=True)
    assert (ours["num_evals"], ours["norm"]) == (10, pytest.approx(literal, rel=1e-6))
    assert ww.analyze({"w.weight": weight}, inverse=True).norm[0] > 1e9 * literal


def test_singular_values_of_the_inverse_are_inverted(ww, dense_net):
    ours, theirs = frame(dense_net, inverse=True), ww.analyze(dense_net, inverse=True)
    np.testing.assert_allclose(ours.sv_max**2, ours.lambda_max, rtol=1e-9)
    np.testing.assert_allclose(theirs.lambda_max, ours.lambda_max, rtol=1e-6)
    np.testing.assert_allclose(theirs.sv_max, 1 / ours.sv_min, rtol=1e-6)
    np.testing.assert_allclose(theirs.sv_min, 1 / ours.sv_max, rtol=1e-6)


def test_the_inverse_has_no_random_bulk(ww):
    model = nn.Sequential(nn.Linear(20, 12))
    for option in ("mp_fit", "randomize", "vectors"):
        with pytest.raises(ValueError, match="inverse=True has no random bulk"):
            measure(model, inverse=True, **{option: True})
    assert "num_spikes" in ww.analyze(model, inverse=True, mp_fit=True)


def test_weak_rank_loss_is_relative(ww):
    weight = torch.diag(torch.logspace(0, -4, 20, dtype=torch.float64))
    for scale, theirs in ((1.0, 5), (5e-4, 20), (1e3, 0)):
        (layer,) = measure(weight * scale)
        assert layer.to_dict()["weak_rank_loss"] == 5
        assert ww.analyze({"w.weight": weight * scale}).weak_rank_loss[0] == theirs
    assert layer.spectrum.weak_rank_loss(1e-4) == 10
    assert ww.analyze({"w.weight": weight}, tolerance=1e-4).weak_rank_loss[0] == 10


def test_entropy_is_relative_to_the_true_rank(ww):
    weight = (orthogonal(64)[:, :8] @ orthogonal(40, 1)[:8]).float()  # eight equal eigenvalues
    assert row(weight)["entropy"] == pytest.approx(1.0, abs=1e-6)
    assert ww.analyze({"w.weight": weight}).entropy[0] < 0.6
    rank_one = torch.outer(torch.arange(1.0, 31.0), torch.arange(1.0, 21.0))
    assert row(rank_one)["entropy"] == 0.0
    assert ww.analyze({"w.weight": rank_one}).entropy[0] > 100


def test_entropy_does_not_depend_on_a_device(ww, monkeypatch):
    weight = orthogonal(512)
    assert row(weight)["entropy"] == pytest.approx(1.0, abs=1e-9)
    assert ww.analyze({"w.weight": weight}).entropy[0] == pytest.approx(1.0, abs=1e-6)
    monkeypatch.setattr(ww.rmt, "EPSILON", ww.rmt.HALF_EPSILON)  # as where there is a GPU
    assert ww.analyze({"w.weight": weight}).entropy[0] > 1.02
    assert ww.rmt.matrix_entropy(np.ones(4096), 4096) == pytest.approx(1.21, abs=0.01)


def test_the_smallest_eigenvalues_need_an_svd(ww):
    spread = torch.logspace(0, -6, 40, dtype=torch.float64)
    weight = (orthogonal(60)[:, :40] * spread @ orthogonal(40, 1)).float()
    literal = math.sqrt(evals_by_svd(weight)[0])
    assert ww.analyze({"w.weight": weight}).sv_min[0] == pytest.approx(literal, rel=1e-9)
    assert row(weight, eigensolver=svd_eigenvalues)["sv_min"] == pytest.approx(literal, rel=1e-9)
    assert row(weight)["sv_min"] != pytest.approx(literal, rel=1e-6)
    error = abs(row(weight)["sv_min"] ** 2 - literal**2)
    assert error < 40 * 2.3e-16 * row(weight)["lambda_max"]


def test_float64_weights_are_not_rounded(ww):
    weight = gaussian(64, 8, dtype=torch.float64) @ gaussian(8, 40, 1, torch.float64)
    ours, theirs = row(weight), ww.analyze({"w.weight": weight}).iloc[0]
    literal = evals_by_svd(weight)
    assert ours["lambda_max"] == pytest.approx(literal[-1], rel=1e-12)
    assert theirs.lambda_max != pytest.approx(literal[-1], rel=1e-10)
    single = evals_by_svd(weight.float())
    assert theirs.lambda_max == pytest.approx(single[-1], rel=1e-12)


def test_weights_are_not_rounded_to_half_precision(ww, monkeypatch):
    base = torch.tensor(heavy(128, 64) * 0.02, dtype=torch.float32)
    update = 5e-7 * gaussian(128, 4) @ gaussian(4, 64, 1)
    model, before = model_of(a=base + update), model_of(a=base)
    literal = float(((model["a"].weight.double() - base.double()) ** 2).sum())
    assert row(model, base_model=before)["norm"] == pytest.approx(literal, rel=1e-9)
    # as where there is a GPU
    monkeypatch.setattr(ww.module.weightwatcher, "torch_T_to_np", lambda t: t.half().numpy())
    assert ww.analyze(model, base_model=before).norm[0] > 3 * literal
    with pytest.raises(ValueError, match="infs or NaNs"):
        ww.analyze(model_of(a=base * 1e7))


# The power law


def test_rounding_errors_of_large_weights_are_not_fitted(ww):
    weight = gaussian(64, 8) @ gaussian(8, 40, 1)
    large = weight * 2.0**20
    literal = fit_power_law(evals_by_svd(weight)[-8:]).alpha
    assert row(weight)["alpha"] == pytest.approx(literal, rel=1e-6)
    assert row(large)["alpha"] == row(weight)["alpha"]
    assert ww.analyze({"w.weight": large}).alpha[0] != pytest.approx(literal, rel=0.1)


def test_equal_eigenvalues_have_no_power_law(ww):
    weight = orthogonal(64).float()
    ours = row(weight)
    assert (ours["alpha"], ours["status"]) == (None, "failed")
    assert ours["warning"] == "no power law in 64 eigenvalues above rounding"
    theirs = ww.analyze({"w.weight": weight})
    assert theirs.alpha[0] > 1e6  # of the rounding errors
    assert theirs.status[0] == "success"


def test_fewer_than_eight_eigenvalues_have_no_fit(ww):
    evals = pareto(7, 2.5)
    assert fit_power_law(evals) is None
    assert ww.fit(evals).sigma < 0


def test_num_pl_spikes_is_what_alpha_was_computed_from(ww):
    evals = np.round(pareto(40, 2.5, seed=1) * 2) / 2
    weight = torch.diag(torch.tensor(evals))
    ours, theirs = row(weight), ww.analyze({"w.weight": weight}, detX=True).iloc[0]
    _, start, alpha, _ = power_law_scan(evals**2)
    assert ours["alpha"] == pytest.approx(alpha)
    assert theirs.alpha == pytest.approx(alpha)
    assert ours["num_pl_spikes"] == len(evals) - start == 17
    assert theirs.num_pl_spikes == np.count_nonzero(evals**2 >= ours["xmin"]) == 29
    assert ours["ERG_gap"] - theirs.ERG_gap == 29 - 17


@pytest.fixture(scope="module")
def failing():
    """A layer with a fit, and one without: constant weights have a single eigenvalue."""
    return model_of(good=gaussian(64, 32), constant=torch.ones(64, 32))


def test_a_failed_fit_is_nan_and_neither_over_nor_under_trained(ww, failing):
    columns = ["alpha", "D", "sigma", "xmin", "num_pl_spikes"]
    ours, theirs = frame(failing).loc[1], ww.analyze(failing).loc[1]
    assert ours[columns].isna().all()
    assert (theirs[columns] == -1).all()
    assert (ours.status, theirs.status) == ("failed", "failed")
    assert ours.warning == "no power law in 1 eigenvalues above rounding"
    assert theirs.warning == "over-trained"
    assert math.isnan(ours.alpha_weighted)
    assert theirs.alpha_weighted == pytest.approx(-theirs.log_spectral_norm)


def test_the_summary_leaves_out_what_failed(ww, failing):
    ours, theirs = measure(failing).summary(), ww.summary(failing)
    alpha = row(failing["good"])["alpha"]
    assert ours["alpha"] == pytest.approx(alpha)
    assert theirs["alpha"] == pytest.approx((alpha - 1) / 2)
    assert ours["log_norm"] == pytest.approx(theirs["log_norm"])


def test_warnings_begin_with_the_peers_word(ww, net, dense_net):
    notes, words = set(), set()
    for model in (net, dense_net):
        theirs = ww.analyze(model).set_index("longname").warning
        for layer in measure(model):
            parts = layer.warning.split("; ") if layer.warning else []
            if theirs[layer.name]:
                words.add(theirs[layer.name])
                assert parts.pop(0) == theirs[layer.name]
            notes |= {re.sub(r"[\d.]+", "#", part) for part in parts}
    assert words == {"under-trained"}
    assert notes == {"poor fit (D #)", "tail of # eigenvalues"}


def test_log_alpha_norm_does_not_overflow(ww):
    weight = gaussian(64, 32) * 2e37
    ours, theirs = row(weight), ww.analyze({"w.weight": weight}).iloc[0]
    evals, alpha = evals_by_svd(weight), ours["alpha"]
    assert theirs.alpha == pytest.approx(alpha, rel=1e-6)
    literal = math.log10(sum((x / evals[-1]) ** alpha for x in evals))
    literal += alpha * math.log10(evals[-1])
    assert literal > 308
    assert ours["log_alpha_norm"] == pytest.approx(literal)
    assert theirs.log_alpha_norm == math.inf


# Fingers


@pytest.fixture(scope="module")
def fingered():
    """Gaussian weights: two of their largest eigenvalues are fingers to `clip_xmax`."""
    weights = (gaussian(64, 40, seed) for seed in range(100))
    fits = ((w, ClipXmax(max_fingers=9)(evals_by_svd(w))) for w in weights)
    return next(w for w, fit in fits if fit.num_fingers == 3)


def test_num_fingers_is_how_many_were_removed(ww, fingered):
    ours = row(fingered, fit=ClipXmax(max_fingers=9))
    theirs = ww.analyze({"w.weight": fingered}, fix_fingers="clip_xmax", detX=True).iloc[0]
    assert (ours["num_fingers"], theirs.num_fingers) == (3, 2)
    kept = evals_by_svd(fingered)[:-3]
    _, start, alpha, _ = power_law_scan(kept)
    assert ours["alpha"] == pytest.approx(alpha)
    assert theirs.alpha == pytest.approx(alpha)
    assert ours["num_pl_spikes"] == len(kept) - start == theirs.num_pl_spikes - 3


def test_max_fingers_is_used(ww, fingered):
    assert row(fingered, fit=ClipXmax(max_fingers=2))["num_fingers"] == 0
    options = {"fix_fingers": "clip_xmax", "max_fingers": 2}
    assert ww.analyze({"w.weight": fingered}, **options).num_fingers[0] == 2  # it is 10 again


def test_the_erg_gap_counts_dropped_eigenvalues_on_both_sides(ww, dense_net):
    ours = frame(dense_net, fit=PowerLaw(drop_top=5))
    theirs = ww.analyze(dense_net, xmax=5, detX=True)
    assert ours.detX_num.tolist() == theirs.detX_num.tolist()  # of the whole spectrum
    assert ours.num_pl_spikes.tolist() == theirs.num_pl_spikes.tolist()
    assert (ours.detX_num - (ours.num_pl_spikes + 5)).tolist() == ours.ERG_gap.tolist()
    assert (theirs.detX_num - theirs.num_pl_spikes).tolist() == theirs.ERG_gap.tolist()


def test_dropping_more_than_half_is_no_fit(ww):
    weight = torch.from_numpy(heavy(48, 32))
    assert row(weight, fit=PowerLaw(drop_top=20))["alpha"] is None
    evals = evals_by_svd(weight)
    value = int(abs(evals - 20).argmin())  # the number is taken for an eigenvalue
    theirs = ww.analyze({"w.weight": weight}, xmax=20).iloc[0]
    assert theirs.xmax == pytest.approx(evals[value])
    with pytest.raises(ValueError, match="drop_top is a number of eigenvalues, got -1"):
        PowerLaw(drop_top=-1)


@pytest.mark.parametrize(
    ("options", "fit"),
    [
        ({"fit": "TPL"}, TruncatedPowerLaw()),
        ({"fit": "E_TPL"}, TruncatedPowerLaw(XminPeak())),
        ({"fix_fingers": "xmin_peak"}, XminPeak()),
        ({}, PowerLaw()),
    ],
    ids=named,
)
def test_fits_of_the_powerlaw_package(ww, options, fit):
    weight = torch.from_numpy(heavy(160, 80))
    ours = row(weight, fit=fit)
    assert ours["status"] == "success"
    assert ("Lambda" in ours) == isinstance(fit, TruncatedPowerLaw)
    theirs = ww.analyze({"w.weight": weight}, pl_package="powerlaw", **options).iloc[0]
    assert (theirs.alpha, theirs.status) == (-1, "failed")


# ERG


def test_detx_val_is_in_the_units_of_the_eigenvalues(ww):
    weight = gaussian(64, 40)
    ours, theirs = row(weight), ww.analyze({"w.weight": weight}, detX=True).iloc[0]
    evals = evals_by_svd(weight)
    value = evals[-ours["detX_num"]]
    assert ours["detX_val"] == pytest.approx(value)
    assert theirs.detX_val == pytest.approx(value)
    assert theirs.detX_val_unrescaled == pytest.approx(value / evals.mean())  # rescaled
    assert "detX_val_unrescaled" not in ours


def test_the_erg_columns_are_always_there(ww, dense_net):
    columns = {"detX_num", "num_ERG_spikes", "detX_val", "ERG_gap"}
    assert columns < set(frame(dense_net))
    assert not columns & set(ww.analyze(dense_net))
    theirs = ww.analyze(dense_net, ERG=True)
    assert columns < set(theirs)
    assert frame(dense_net).ERG_gap.tolist() == theirs.ERG_gap.tolist()


# Random bulk and traps


def too_wide():
    """A bulk that is narrower than the grid of the kernel fit, beside one large eigenvalue."""
    evals = np.append(0.6 * np.linspace(0.95, 1.05, 999), 400.6)
    weight = torch.zeros(1100, 1000)
    weight[:1000].diagonal().copy_(torch.tensor(np.sqrt(evals)))
    return weight


def test_a_bulk_that_the_kernel_cannot_see_is_fitted_by_default(ww):
    model = model_of(a=gaussian(40, 20), wide=too_wide())
    assert ww.analyze(model, mp_fit=True).num_spikes.tolist() == [0, -1]
    assert frame(model, mp_fit=True).num_spikes.tolist() == [0, 1]
    assert frame(model, mp_fit=KernelMP()).num_spikes.isna().tolist() == [False, True]


def test_traps_of_a_small_layer_are_counted_once(ww):
    weight = gaussian(48, 32)
    weight[3, 4] = 60
    ours = row(weight, randomize=True)
    theirs = ww.analyze({"w.weight": weight}, randomize=True).iloc[0]
    assert (ours["num_traps"], ours["trap_causes"]) == (1, "entry (3, 4) = 60")
    assert theirs.num_traps == 5  # one in each of five pooled shuffles
    assert len(ww.esd({"w.weight": weight}, layer="w", random=True)) == 5 * 32


def test_a_weak_trap_is_seen(ww):
    weight = gaussian(256, 128)
    weight[3, 4] = 1.4 * (256 * 128) ** 0.25  # theory: a spike from 1.0 on
    assert row(weight, randomize=True)["num_traps"] == 1
    assert ww.analyze({"w.weight": weight}, randomize=True).num_traps[0] == 0


def test_all_columns_of_a_shuffle_belong_to_one_seeded_shuffle(ww):
    weight = torch.from_numpy(heavy(160, 110))
    ours = row(weight, randomize=True)
    assert ours["ww_softrank"] * ours["lambda_max"] == pytest.approx(ours["max_rand_eval"])
    assert ours["lambda_max"] - ours["max_rand_eval"] == pytest.approx(ours["ww_maxdist"])
    assert row(weight, randomize=True) == ours
    assert row(weight, randomize=True, seed=1)["max_rand_eval"] != ours["max_rand_eval"]
    theirs = ww.analyze({"w.weight": weight}, randomize=True).iloc[0]
    assert theirs.ww_softrank * theirs.lambda_max != pytest.approx(theirs.max_rand_eval)
    averaged = row(weight, randomize=3)
    assert averaged["num_traps"] == ours["num_traps"]
    assert {"num_traps_mean", "num_traps_std"} < set(averaged)


def test_rand_distance_is_a_distance_of_distributions(ww):
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.normal(1, 0.01, 500)), np.sort(rng.normal(5, 0.05, 500))
    with contained():
        theirs = ww.rmt.jensen_shannon_distance(x, y), ww.rmt.jensen_shannon_distance(x, 3 * x)
    assert theirs[0] == pytest.approx(0.0005, abs=1e-5)
    assert not theirs[1] > 0.01  # zero, or NaN
    for z in (y, 3 * x):
        assert jensen_shannon_distance(x, z) == pytest.approx(math.sqrt(math.log(2)))


# A base model


class Layers(nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(32, 24, bias=False))


def test_base_layers_are_found_by_name(ww):
    base, model = Layers("fc1", "extra", "fc2"), Layers("fc1", "fc2")
    model.load_state_dict({k: v + 0.01 for k, v in base.state_dict().items() if "fc" in k})
    literal = [32 * 24 * 1e-4] * 2
    assert frame(model, base_model=base).norm.tolist() == pytest.approx(literal, rel=1e-4)
    theirs = ww.analyze(model, base_model=base).norm.tolist()
    assert theirs[0] == pytest.approx(literal[0], rel=1e-4)
    assert theirs[1] == pytest.approx(
        float((model.fc2.weight.detach() ** 2).sum())
    )  # nothing subtracted
    skipped = frame(base, base_model=model).attrs["skipped"]
    assert skipped == {"extra": "the base model has no layer of this name"}


def test_a_base_layer_of_another_shape_is_no_base(ww):
    model, base = model_of(a=gaussian(30, 20)), model_of(a=gaussian(31, 20))
    reason = "shape (1, 30, 20) here, (1, 31, 20) in the base model"
    assert measure(model, base_model=base).skipped[0].reason == reason
    assert ww.analyze(model, base_model=base).norm[0] == 0


def test_an_equal_base_layer_is_said(ww):
    model = model_of(a=gaussian(30, 20))
    assert measure(model, base_model=model).skipped[0].reason == "identical to the base model"
    theirs = ww.analyze(model, base_model=copy.deepcopy(model)).iloc[0]
    assert (theirs.norm, theirs.alpha, theirs.warning) == (0, -1, "over-trained")


def test_the_base_model_is_an_argument_of_every_call(ww):
    model, base = model_of(a=gaussian(30, 20)), model_of(a=gaussian(30, 20) + 0.01)
    assert row(model, base_model=base)["norm"] == pytest.approx(600 * 1e-4, rel=1e-3)
    with contained():
        theirs = ww.module.WeightWatcher(model=model).analyze(base_model=base)
    assert theirs.norm[0] == pytest.approx(float((model["a"].weight ** 2).sum()))


def test_the_update_of_an_adapter_is_measured_as_it_is_applied(ww):
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(40, 40, bias=False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(40, 10, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(10, 40, bias=False)})
            self.scaling = 3.2

    layer = Adapted()
    with torch.no_grad():
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        update = layer.scaling * product
        merged = layer.base_layer.weight + update
    norm = float((update.double() ** 2).sum())
    assert row(update)["norm"] == pytest.approx(norm)
    difference = row(model_of(a=merged), base_model=model_of(a=layer.base_layer.weight.detach()))
    assert difference["norm"] == pytest.approx(norm, rel=1e-5)
    theirs = ww.analyze(nn.Sequential(layer), peft="with_base").set_index("longname").norm
    assert theirs["0.lora_BA.default"] == pytest.approx(norm / 3.2**2, rel=1e-5)
    literal = float((merged**2).sum())
    assert row(merged)["norm"] == pytest.approx(literal)
    assert theirs["0.lora_W_plus_AB.default"] < 0.9 * literal  # ten of forty eigenvalues
    report = measure(nn.Sequential(layer))
    assert [x.name for x in report] == ["0", "0.lora"]
    assert report["0"].spectrum.norm == pytest.approx(theirs["0.base_layer"], rel=1e-5)
    assert report["0.lora"].spectrum.norm == pytest.approx(norm, rel=1e-5)


# Distances and edits


@torch.no_grad()
def test_distances_of_models_that_differ_in_their_layers(ww):
    first, second = Layers("fc1", "fc2"), Layers("fc2")
    delta = float(torch.linalg.vector_norm(first.fc2.weight - second.fc2.weight))
    with contained():
        watcher = ww.module.WeightWatcher(model=first)
        wrong = watcher.distances(model_of(a=gaussian(30, 20)), model_of(a=gaussian(31, 20)))[0]
        mean, _, theirs = watcher.distances(first, second)
    assert watcher.model is second
    assert (len(theirs), theirs.longname.tolist(), wrong) == (1, ["fc1"], -1)
    assert mean == pytest.approx(float((first.fc1.weight - second.fc2.weight).norm()), rel=1e-5)
    ours = WeightWatcher(model=first, log_level="ERROR")
    mean, _, table = ours.distances(first, second)
    assert (mean, table.longname.tolist()) == (pytest.approx(delta, rel=1e-5), ["fc2"])
    assert table.attrs["skipped"] == {"fc1": "the second model has no layer of this name"}
    assert ours.model is first
    found = distances(first, second)
    assert [x.name for x in found.layers] == ["fc2"]
    assert found.layers[0].frobenius == pytest.approx(delta, rel=1e-5)


@torch.no_grad()
def test_distances_of_convolutions_see_their_shape_and_bias(ww):
    first, second = (nn.Sequential(nn.Conv2d(24, 16, 3)) for _ in range(2))
    with contained():
        theirs = ww.module.WeightWatcher(model=first).distances(first, second)[2].iloc[0]
    ours = WeightWatcher(log_level="ERROR").distances(first, second)[2].iloc[0]
    assert ours.delta_W == pytest.approx(theirs.delta_W, rel=1e-5)
    assert (theirs.M, theirs.N, theirs.b_shape, theirs.delta_b) == (3, 24, "unknown", 0)
    literal = float((first[0].bias - second[0].bias).norm())
    assert (ours.M, ours.N, ours.b_shape) == (16, 24, 16)
    assert ours.delta_b == pytest.approx(literal, rel=1e-5)


def alignment(pairs):
    """Mean over the slices of the peer's similarity, rows outputs and columns features."""
    found = [
        np.linalg.norm(a.T @ b) / math.sqrt(np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
        for a, b in pairs
    ]
    return pytest.approx(sum(found) / len(found), rel=1e-5)


def test_cka_compares_the_inputs_of_every_convolution(ww):
    for inputs, outputs in ((16, 24), (24, 16)):
        first, second = (nn.Sequential(nn.Conv2d(inputs, outputs, 3)) for _ in range(2))
        stacks = ([s.double().numpy() for s in slices_of(model[0])] for model in (first, second))
        pairs = list(zip(*stacks, strict=True))
        with contained():
            theirs = ww.module.WeightWatcher(model=first).distances(first, second, method="cka")[0]
        ours = WeightWatcher(log_level="ERROR").distances(first, second, "cka")[0]
        assert ours == alignment(pairs)
        if inputs > outputs:
            assert theirs != alignment(pairs)
            pairs = [(a.T, b.T) for a, b in pairs]  # that of the outputs
        assert theirs == alignment(pairs)


def test_edits_keep_the_dtype_and_return_the_model(ww):
    model = model_of(a=gaussian(60, 40))
    same, options = copy.deepcopy(model), {"method": "svd", "percent": -0.2}
    with contained():
        ww.module.WeightWatcher(model=model).SVDSmoothing(**options)
        returned = ww.module.WeightWatcher(model=model_of(a=gaussian(60, 40))).SVDSharpness()
    assert model["a"].weight.dtype == torch.float64
    assert returned is None
    watcher = WeightWatcher(model=same, log_level="ERROR")
    assert watcher.SVDSmoothing(**options) is same
    assert same["a"].weight.dtype == torch.float32
    torch.testing.assert_close(same["a"].weight, model["a"].weight.float(), atol=1e-5, rtol=0)
    assert watcher.SVDSharpness() is same


# Options that are not offered, and why


def test_stacking_layers_depends_on_the_order_of_hidden_units(ww):
    model = model_of(a=gaussian(64, 48), b=gaussian(40, 64, 1))
    same = copy.deepcopy(model)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    same["a"].weight.data = model["a"].weight[order]
    same["b"].weight.data = model["b"].weight[:, order]
    x = gaussian(5, 48)
    outputs = [m["b"](torch.relu(m["a"](x))) for m in (model, same)]
    assert torch.allclose(*outputs, atol=1e-3)
    alphas = [ww.analyze(m, stacked=True).alpha[0] for m in (model, same)]
    assert abs(alphas[0] - alphas[1]) > 0.01
    np.testing.assert_allclose(frame(model).alpha, frame(same).alpha, rtol=1e-9)
    stacked = ww.analyze(model, stacked=True)
    assert (stacked.M[0], stacked.num_evals[0]) == (64, 48)  # as many as the first layer has


def test_products_of_layers_depend_on_a_random_mask_and_on_the_order(ww):
    model = model_of(a=gaussian(40, 40), b=gaussian(40, 40, 1))
    first, second = (layer.weight for layer in model.values())
    with contained():
        masked = [
            ww.module.WeightWatcher(model=model).analyze(intra=True).alpha[0] for _ in range(2)
        ]
    assert masked[0] != masked[1]
    norm = float(first.norm() * second.norm())
    theirs = ww.analyze(model, intra=True, sparsify=False).lambda_max[0] * norm
    assert theirs == pytest.approx(float(torch.linalg.matrix_norm(first @ second, 2)), rel=1e-5)
    # what the two layers do to their input
    literal = float(torch.linalg.matrix_norm(second @ first, 2))
    assert theirs != pytest.approx(literal, rel=1e-3)
    assert row(second @ first)["sv_max"] == pytest.approx(literal, rel=1e-5)


def test_options_without_an_effect(ww, dense_net):
    plain = ww.analyze(dense_net)
    for options in ({"glorot_fix": True}, {"min_size": 1000}, {"max_size": 1}):
        assert ww.analyze(dense_net, **options).equals(plain)
    accurate = ww.analyze(dense_net, svd_method="accurate")
    np.testing.assert_allclose(accurate.norm, plain.norm, rtol=1e-9)


def test_options_that_raise(ww):
    model = nn.Sequential(nn.Conv2d(10, 12, 2))
    for options in ({"fft": True}, {"channels": "last"}):
        with pytest.raises((AttributeError, TypeError)):
            ww.analyze(model, **options)


def test_conv2d_fft_leaves_out_the_imaginary_part(ww):
    conv = nn.Conv2d(10, 12, 2)
    kernel = conv.weight.detach().double() * 0.5**0.5
    transformed = torch.fft.fft2(kernel, (32, 32))
    theirs = ww.analyze(nn.Sequential(conv), conv2d_fft=True).norm[0]
    assert theirs < 0.65 * float((transformed.abs() ** 2).sum())


# Calls


def test_more_inputs_are_accepted(ww):
    weight = gaussian(30, 20)
    norm = pytest.approx(float((weight**2).sum()))
    for source in (weight, weight.numpy(), {"weight": weight}, dense(weight).state_dict()):
        assert row(source)["norm"] == norm
        with pytest.raises((RuntimeError, ValueError, KeyError)):
            ww.analyze(source)
    wrapped, base = {"state_dict": {"a.weight": weight}}, {"state_dict": {"a.weight": 2 * weight}}
    assert row(wrapped, base_model=base)["norm"] == norm
    with pytest.raises(KeyError):
        ww.analyze(wrapped, base_model=base)


def test_a_spectrum_that_is_known_is_not_computed_again():
    model, other = model_of(a=gaussian(30, 20)), model_of(a=gaussian(30, 20, 1))
    known = measure(other)["a"].spectrum
    assert measure(model, spectra={"a": known})["a"].spectrum is known
    assert measure(model, spectra={"b": known})["a"].spectrum.norm != known.norm


def test_describe_lists_what_would_be_skipped(ww):
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(20, 4), nn.Conv2d(12, 12, 1, groups=12))
    ours = describe(model)
    assert ours.longname.tolist() == ["0", "1", "2"]
    assert ours.skipped[1] == "4 eigenvalues, fewer than min_evals=8"
    assert ww.describe(model).longname.tolist() == ["0"]
    assert "name" not in ours
    arguments = inspect.signature(describe).parameters
    assert not {"base_model", "pool"} & set(arguments)


def test_esd_finds_every_layer_by_its_full_name(ww):
    blocks = [nn.Sequential(dense(gaussian(30, 20, seed))) for seed in (0, 1)]
    model = nn.Sequential(*blocks, nn.Linear(20, 4))
    second = evals_by_svd(gaussian(30, 20, 1))
    np.testing.assert_allclose(esd(model, "1.0"), second, rtol=1e-9)
    np.testing.assert_allclose(esd(model, 1), second, rtol=1e-9)
    assert len(ww.esd(model, layer="1.0")) == 0
    assert len(esd(model, "2")) == 4
    assert len(ww.esd(model, layer="2")) == 0
    with pytest.raises(ValueError, match="no layer matches '3'"):
        esd(model, "3")
    assert len(ww.esd(model, layer="3")) == 0
    assert len(ww.esd(model)) == 20  # of the first layer


def test_nothing_outside_the_call_changes(ww):
    model = model_of(a=gaussian(12, 9))
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        row(model, randomize=True)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert "longname" not in vars(model["a"])
    assert printed.getvalue() == ""
    before = np.random.get_state()  # noqa: NPY002
    try:
        with contained(), contextlib.redirect_stdout(printed):
            ww.module.WeightWatcher(model=model).analyze(randomize=True)
        assert not np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    finally:
        np.random.set_state(before)  # noqa: NPY002
    assert vars(model["a"])["longname"] == "a"
    assert "SMALL N PL FIT" in printed.getvalue()


# The table itself

ROW = re.compile(r"^\|(.*)\|$", re.MULTILINE)
CODE = re.compile(r"`([^`]+)`")
CITED = re.compile(r"`(?:(test_\w+)\.py::)?(test_\w+)`")


@functools.cache
def table():
    """The cells of every row of every table, without heads and rules."""
    rows = [[cell.strip() for cell in line.split("|")] for line in ROW.findall(TABLE.read_text())]
    return [cells for cells in rows if cells[0] != "what" and set(cells[0]) != {"-"}]


@functools.cache
def functions_in(file):
    path = TESTS / f"{file}.py"
    if not path.exists():
        return set()
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_table_is_complete_and_its_tests_exist():
    assert len(table()) > 60
    for cells in table():
        assert len(cells) == 5, cells
        assert all(cells), cells
        cited = CITED.findall(cells[-1])
        assert cited, cells
        for file, test in cited:
            assert test in functions_in(file or "test_differences"), (cells[0], file, test)


def test_every_test_of_a_difference_is_in_the_table():
    cited = {test for cells in table() for file, test in CITED.findall(cells[-1]) if not file}
    here = {name for name in functions_in("test_differences") if name.startswith("test_")}
    about_the_table = {
        "test_every_row_of_the_table_is_complete_and_its_tests_exist",
        "test_every_test_of_a_difference_is_in_the_table",
    }
    assert here - about_the_table == cited


def documented(name):
    """Whether the table names an option or a column, or a pattern for it, in code."""
    words = {
        word for code in CODE.findall(TABLE.read_text()) for word in re.findall(r"[\w*]+", code)
    }
    return any(fnmatch.fnmatchcase(name, word) for word in words - {"*"})


def test_every_option_of_the_peer_is_ours_or_in_the_table(ww):
    ours = set(inspect.signature(measure).parameters)
    watcher = ww.module.WeightWatcher
    assert not documented("no_such_option")
    for method in (watcher.analyze, watcher.describe, watcher.get_ESD, watcher.__init__):
        theirs = set(inspect.signature(method).parameters) - {"self"}
        assert [x for x in theirs - ours if not documented(x)] == []
    assert [
        x for x in ours - set(inspect.signature(watcher.analyze).parameters) if not documented(x)
    ] == []


def test_every_column_of_either_side_is_in_both_or_in_the_table(ww):
    model = model_of(a=gaussian(30, 20))
    options = {"mp_fit": True, "vectors": True}
    theirs = ww.analyze(
        model, detX=True, randomize=True, fix_fingers="clip_xmax", **options, pool=False
    )
    conv = nn.Sequential(nn.Conv2d(10, 12, 2))
    ours = frame(model, fit=ClipXmax(), randomize=2, replicates=20, **options)
    ours = set(ours) | set(frame(conv, pool=False))
    assert len(ours & set(theirs)) > 60
    different = set(theirs) ^ ours
    assert [column for column in different if not documented(column)] == []
    assert {"detX_val_unrescaled", "trace_log"} < different


def test_defaults_that_differ_are_in_the_table(ww):
    ours = inspect.signature(measure).parameters
    theirs = inspect.signature(ww.module.WeightWatcher.analyze).parameters
    different = {
        name for name in set(ours) & set(theirs) if ours[name].default != theirs[name].default
    }
    assert different == {"model", "layers", "fit", "max_N"}
    assert all(documented(name) for name in different)
