import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from ww_train.analysis import measure
from ww_train.editing.rules import AboveBulk, Bottom, DetXTail, PowerLawTail, Top
from ww_train.editing.smoothing import smoothed, svd_smoothing_
from ww_train.weights.matrices import weight_matrices

from .oracles import dense, evals_by_svd, gaussian, heavy, zoo
from .peer import contained, import_peer

SHAPES = [(60, 40), (40, 60), (50, 50)]


def top_k(w, k):
    """The largest k singular values, or all but the largest -k, by a float64 SVD."""
    u, s, v = np.linalg.svd(np.asarray(w, dtype=np.float64), full_matrices=False)
    s = np.where((np.arange(len(s)) < k) if k > 0 else (np.arange(len(s)) >= -k), s, 0.0)
    return (u * s) @ v


def keep(k):
    """A rule that keeps exactly the k largest."""
    return lambda spectrum: np.arange(len(spectrum.evals)) >= len(spectrum.evals) - k


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rule", "k"), [(Top(0.2), 0.2), (Bottom(0.9), -0.1), (keep(7), None)])
def test_against_an_svd(shape, rule, k):
    w = torch.tensor(heavy(*shape))
    k = 7 if k is None else round(k * min(shape))
    expected = top_k(w, k)
    (done,) = svd_smoothing_(w, rule=rule).layers
    np.testing.assert_allclose(w.numpy(), expected, atol=1e-11 * np.abs(expected).max())
    assert np.linalg.matrix_rank(w.numpy(), tol=1e-9) == done.rank_after
    assert done.rank_before == done.num_evals == min(shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounded_once_to_the_nearest_and_reported(dtype):
    w = torch.tensor(heavy(60, 40)).to(dtype)
    exact, before = top_k(w.double(), 10), w.double().clone()
    address = w.data_ptr()
    (done,) = svd_smoothing_(w, rule=keep(10)).layers
    assert (w.dtype, w.data_ptr()) == (dtype, address)
    wrong = w.double() != torch.tensor(exact).to(dtype).double()
    assert wrong.double().mean() < (1.0 if dtype == torch.float64 else 1e-3)  # ties of rounding
    s = evals_by_svd(before)
    assert done.energy_kept == pytest.approx(s[-10:].sum() / s.sum())
    change = float((w.double() - before).norm() / before.norm())
    assert done.distance == pytest.approx(change, rel=1e-12)
    assert done.distance == pytest.approx(math.sqrt(1.0 - done.energy_kept), rel=1e-3)


@pytest.mark.parametrize("rule", [DetXTail(), PowerLawTail(), AboveBulk()])
def test_the_layer_keeps_the_tail_that_measure_reports(rule):
    model = nn.Sequential(dense(torch.tensor(heavy(80, 60)).float()))
    (layer,) = measure(model, mp_fit=True)
    number = {
        DetXTail: layer.erg.detX_num,
        PowerLawTail: layer.fit.num_pl_spikes,
        AboveBulk: layer.mp.num_spikes,
    }[type(rule)]
    (done,) = svd_smoothing_(model, rule=rule).layers
    assert done.rank_after == number
    (after,) = measure(model)
    np.testing.assert_allclose(
        after.spectrum.evals[-number:], layer.spectrum.evals[-number:], rtol=1e-5
    )
    assert after.spectrum.evals[: 60 - number].max() < 1e-10 * after.spectrum.lambda_max


@pytest.mark.parametrize("conv", [nn.Conv2d(12, 16, 3), nn.Conv1d(12, 16, 3)])
def test_the_pooled_spectrum_of_a_convolution_decides(conv):
    with torch.no_grad():
        conv.weight[..., 1] *= 3.0  # this column of the kernel holds the largest
    (before,) = weight_matrices(copy.deepcopy(conv))
    (done,) = svd_smoothing_(conv, rule=Top(0.25)).layers
    (after,) = weight_matrices(conv)
    evals = evals_by_svd(*before.stack, scale=before.scale)
    number = len(evals) // 4
    ranks = []
    for old, new in zip(before.stack, after.stack, strict=True):
        own = evals_by_svd(old, scale=before.scale)
        k = int((own >= evals[-number] * (1 - 1e-9)).sum())
        expected = top_k(old, k) if k else np.zeros_like(old)
        np.testing.assert_allclose(new, expected, atol=1e-6)
        ranks.append(k)
    assert len(set(ranks)) > 1
    assert sum(ranks) == number == done.rank_after
    assert done.energy_kept == pytest.approx(evals[-number:].sum() / evals.sum())


def test_smoothing_twice_is_smoothing_once():
    w = torch.tensor(heavy(60, 40))
    svd_smoothing_(w, rule=keep(9))
    once = w.clone()
    (again,) = svd_smoothing_(w, rule=keep(9)).layers
    torch.testing.assert_close(w, once, atol=1e-11, rtol=0.0)
    assert again.rank_before == again.rank_after == 9
    assert again.energy_kept == pytest.approx(1.0)


def test_a_rule_that_keeps_everything_changes_no_bit():
    w = gaussian(60, 40).bfloat16()
    before = w.clone()
    (done,) = svd_smoothing_(w, rule=keep(40)).layers
    assert torch.equal(w, before)
    assert (done.distance, done.energy_kept) == (0.0, 1.0)


def test_different_layers_by_different_rules():
    model = zoo()
    before = copy.deepcopy(model)
    first = svd_smoothing_(model, rule=Top(0.5), layers="fc")
    second = svd_smoothing_(model, rule=Bottom(0.9), layers=["conv*"], types="conv2d")
    assert [x.name for x in (*first.layers, *second.layers)] == ["fc", "conv2"]
    changed = {
        key
        for key, value in model.state_dict().items()
        if not torch.equal(value, before.state_dict()[key])
    }
    assert changed == {"fc.weight", "conv2.weight"}


def test_layers_that_cannot_be_smoothed_are_left_alone_and_say_why():
    model = nn.ModuleDict(
        {
            "nan": dense(torch.full((20, 20), math.nan)),
            "zero": dense(torch.zeros(20, 20)),
            "flat": dense(torch.eye(20)),
            "small": nn.Linear(20, 4),
            "computed": nn.utils.parametrizations.weight_norm(nn.Linear(20, 20)),
            "huge": dense(torch.full((20, 20), 6e4, dtype=torch.float16).triu()),
        }
    )
    before = copy.deepcopy(model.state_dict())
    done = svd_smoothing_(model, rule=DetXTail())
    reasons = {x.name: x.reason for x in done.skipped}
    assert "NaN" in reasons["nan"]
    assert "zero" in reasons["zero"]
    assert "all eigenvalues are equal" in reasons["flat"]
    assert "min_evals=8" in reasons["small"]
    assert "parametrization" in reasons["computed"]
    assert "overflow torch.float16" in svd_smoothing_(model["huge"], rule=keep(1)).skipped[0].reason
    for key, value in model.state_dict().items():
        if not key.startswith("huge"):
            torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_a_smoothed_copy_leaves_the_source_and_keeps_ties():
    model = zoo()
    state = model.state_dict()
    state["tied.weight"] = state["fc.weight"]
    before = copy.deepcopy(state)
    new, done = smoothed(state, rule=Top(0.5))
    assert all(torch.equal(state[key], before[key]) for key in state)
    assert list(new) == list(state)
    assert new["tied.weight"].data_ptr() == new["fc.weight"].data_ptr()
    svd_smoothing_(model, rule=Top(0.5))
    assert all(torch.equal(new[key], value) for key, value in model.state_dict().items())
    assert "fc" in [x.name for x in done.layers]
    from_module, _ = smoothed(zoo(), rule=Top(0.5))
    assert all(torch.equal(from_module[key], new[key]) for key in from_module)


@pytest.fixture(scope="module")
def peer():
    weightwatcher = import_peer()

    def call(model, **options):
        with contained():
            return weightwatcher.WeightWatcher(model=model).SVDSmoothing(**options)

    return call


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (DetXTail(), {"method": "detX"}),
        (PowerLawTail(), {"method": "alpha_min"}),
        (Top(0.5), {"method": "svd", "percent": 0.5}),
        (Bottom(0.8), {"method": "svd", "percent": -0.2}),
    ],
)
def test_the_peers_smoothing_of_dense_layers(peer, rule, options):
    model = nn.Sequential(*(dense(torch.tensor(heavy(*s)).float()) for s in SHAPES))
    theirs = peer(copy.deepcopy(model), **options)
    svd_smoothing_(model, rule=rule)
    for mine, other in zip(model, theirs, strict=True):
        scale = float(mine.weight.abs().max())
        # theirs is a randomised SVD
        torch.testing.assert_close(mine.weight, other.weight.float(), atol=2e-3 * scale, rtol=0.0)


def test_the_peer_gives_each_slice_of_a_convolution_the_same_number(peer):
    conv = nn.Conv2d(12, 16, 3, bias=False)
    theirs = peer(nn.Sequential(copy.deepcopy(conv)), method="svd", percent=0.5)[0].weight
    (matrix,) = weight_matrices(conv)
    for part in matrix.stack:
        svd_smoothing_(part, rule=keep(math.ceil(int(0.5 * 12 * 9) / 9)))
    torch.testing.assert_close(conv.weight, theirs, atol=1e-5, rtol=0.0)


def test_the_peer_changes_the_dtype_of_a_half_precision_model(peer):
    model = nn.Sequential(nn.Linear(64, 32)).bfloat16()
    theirs = peer(copy.deepcopy(model))
    svd_smoothing_(model)
    assert theirs[0].weight.dtype == torch.float32
    assert model[0].weight.dtype == torch.bfloat16
    assert model(torch.ones(2, 64, dtype=torch.bfloat16)).isfinite().all()
