import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ww_train.comparing.distances import distances, layer_distance
from ww_train.power_law import PowerLaw, fit_power_law
from ww_train.weights.matrices import Skipped, WeightMatrix

from .oracles import dense, evals_by_svd, gaussian, heavy, zoo
from .peer import contained, import_peer


def pair(rows, cols, step=0.3):
    """Two related matrices with tails."""
    a = torch.tensor(heavy(rows, cols))
    return a, a + step * torch.tensor(heavy(rows, cols, 1))


def only(found):
    (layer,) = found.layers
    return layer


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_numpy(shape, dtype):
    a, b = (w.to(dtype) for w in pair(*shape))
    found = only(distances(a, b))
    x, y = a.double().numpy(), b.double().numpy()
    size = np.linalg.norm
    assert found.frobenius == pytest.approx(size(y - x), rel=1e-12)
    assert found.relative_frobenius == pytest.approx(size(y - x) / size(x), rel=1e-12)
    assert found.spectral == pytest.approx(size(y - x, 2), rel=1e-10)
    assert found.cosine == pytest.approx((x * y).sum() / size(x) / size(y), rel=1e-12)
    cka = size(x.T @ y) ** 2 / size(x.T @ x) / size(y.T @ y)
    assert found.cka == pytest.approx(cka, rel=1e-10)
    cx, cy = x - x.mean(0), y - y.mean(0)
    centred = size(cx.T @ cy) ** 2 / size(cx.T @ cx) / size(cy.T @ cy)
    assert found.cka_centred == pytest.approx(centred, rel=1e-10)
    tail = fit_power_law(evals_by_svd(a))
    assert found.num_tail == tail.num_pl_spikes
    (u, _, v), (p, _, q) = (np.linalg.svd(w, full_matrices=False) for w in (x, y))
    k = found.num_tail
    assert found.left_overlap == pytest.approx(size(u[:, :k].T @ p[:, :k]) ** 2 / k, rel=1e-8)
    assert found.right_overlap == pytest.approx(size(v[:k] @ q[:k].T) ** 2 / k, rel=1e-8)
    assert 0.0 <= found.esd_distance <= math.sqrt(math.log(2))


def test_a_model_is_no_distance_from_itself():
    model = zoo()
    found = distances(model, model.state_dict())
    assert len(found.layers) == len(found.matching.matched)
    for layer in found.layers:
        assert (layer.frobenius, layer.spectral, layer.esd_distance) == (0.0, 0.0, 0.0)
        for similarity in (layer.cosine, layer.cka, layer.cka_centred):
            assert similarity == pytest.approx(1.0, abs=1e-13)
        if layer.num_tail:
            assert (layer.left_overlap, layer.right_overlap) == pytest.approx((1.0, 1.0))


def test_scale_transpose_and_order():
    a, b = pair(60, 40)
    found, swapped = only(distances(a, b)), only(distances(b, a))
    assert swapped.frobenius == found.frobenius
    assert swapped.cka == pytest.approx(found.cka)
    assert swapped.cosine == pytest.approx(found.cosine)
    turned = only(distances(a.T, b.T))
    assert (turned.left_overlap, turned.right_overlap) == pytest.approx(
        (found.right_overlap, found.left_overlap)
    )
    assert turned.spectral == pytest.approx(found.spectral)
    scaled = only(distances(1e120 * a, 1e120 * b))
    assert scaled.frobenius == pytest.approx(1e120 * found.frobenius)
    assert scaled.spectral == pytest.approx(1e120 * found.spectral)
    for name in ("cosine", "cka", "cka_centred", "left_overlap", "num_tail", "esd_distance"):
        assert getattr(scaled, name) == pytest.approx(getattr(found, name))


def test_unrelated_matrices_overlap_by_chance():
    a, b = (torch.tensor(heavy(300, 200, seed)) for seed in (0, 1))
    found = only(distances(a, b))
    assert found.left_overlap == pytest.approx(found.num_tail / 300, rel=0.3)
    assert found.right_overlap == pytest.approx(found.num_tail / 200, rel=0.3)
    assert abs(found.cosine) < 0.05


def test_a_convolution_is_the_block_diagonal_matrix_of_its_slices():
    base, other = nn.Conv2d(12, 20, 2), nn.Conv2d(12, 20, 2)
    found = only(distances(base, other))
    blocks = [
        torch.block_diag(*conv.weight.detach().double().flatten(2).permute(2, 0, 1))
        for conv in (base, other)
    ]
    whole = only(distances(*blocks))
    assert (found.N, found.M, found.rf) == (20, 12, 4)
    for name in ("frobenius", "relative_frobenius", "spectral", "cosine", "cka"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-10)
    parts = distances(base, other, pool=False)
    assert [x.name for x in parts.layers] == [f"weight[{i}]" for i in range(4)]
    assert math.hypot(*(x.frobenius for x in parts.layers)) == pytest.approx(found.frobenius)
    assert max(x.spectral for x in parts.layers) == pytest.approx(found.spectral)


def test_the_tail_is_that_of_the_given_fit():
    a, b = pair(60, 40)
    fit = PowerLaw(drop_top=3)
    found = only(distances(a, b, fit=fit))
    tail = fit(evals_by_svd(a))
    assert found.num_tail == tail.num_pl_spikes + 3


def test_what_is_not_defined_is_none_and_nan():
    zero = torch.zeros(30, 20)
    found = distances(zero, gaussian(30, 20))
    layer = only(found)
    assert layer.relative_frobenius is layer.cosine is layer.cka is layer.num_tail is None
    assert layer.cka_centred is layer.left_overlap is layer.right_overlap is None
    assert layer.frobenius > 0.0
    assert only(distances(gaussian(30, 20), zero)).relative_frobenius == 1.0
    frame = found.to_dataframe()
    assert np.isnan(frame.cka[0])
    assert np.isnan(frame.num_tail[0])


def test_broken_weights_are_skipped_and_left_out_layers_are_named():
    base = nn.ModuleDict({"a": nn.Linear(9, 9), "gone": nn.Linear(9, 8), "c": nn.Linear(9, 9)})
    other = nn.ModuleDict({"c": nn.Linear(9, 7), "a": nn.Linear(9, 9), "new": nn.Linear(2, 2)})
    with torch.no_grad():
        other["a"].weight[0, 0] = math.inf
    found = distances(base, other)
    assert found.layers == ()
    assert found.skipped == (Skipped("a", "NaN or infinite weights"),)
    frame = found.to_dataframe()
    assert frame.attrs["skipped"] == {"a": "NaN or infinite weights"}
    assert (frame.attrs["missing"], frame.attrs["extra"]) == (["gone"], ["new"])
    assert list(frame.attrs["reshaped"]) == ["c"]


def test_the_choice_of_layers_and_strangers():
    base, other = zoo(0), zoo(1)
    assert [x.name for x in distances(base, other, types="conv3d").layers] == ["conv3"]
    with pytest.raises(ValueError, match="no layer in common"):
        distances(base, nn.Linear(3, 3))


def test_the_weights_stay_and_no_copy_is_shared():
    a, b = pair(30, 20)
    before = a.clone(), b.clone()
    layer_distance(WeightMatrix("w", "dense", a[None]), WeightMatrix("w", "dense", b[None]))
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@pytest.fixture(scope="module")
def peer():
    weightwatcher = import_peer()

    def call(base, other, **options):
        with contained():
            watcher = weightwatcher.WeightWatcher(model=base)
            return watcher.distances(base, other, **options)[2].delta_W.tolist()

    return call


def test_the_peers_distances(peer):
    base = nn.Sequential(dense(gaussian(60, 40)), nn.Conv2d(12, 16, 3), dense(gaussian(30, 50)))
    other = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    found = distances(base, other)
    slices = distances(base, other, layers=1, pool=False).layers
    raw = peer(base, other, method="raw")
    assert raw == pytest.approx([x.frobenius for x in found.layers], rel=1e-6)
    euclidean = [x.frobenius for x in found.layers]
    cka = [math.sqrt(x.cka) for x in found.layers]
    euclidean[1] = np.mean([x.frobenius for x in slices])  # the peer takes the mean over slices
    cka[1] = np.mean([math.sqrt(x.cka) for x in slices])
    assert peer(base, other, method="euclidean") == pytest.approx(euclidean, rel=1e-6)
    assert peer(base, other, method="cka") == pytest.approx(cka, rel=1e-6)


def test_checkpoints_are_as_far_apart_as_the_models_in_them(tmp_path):
    base, other = zoo(0), zoo(1)
    for name, model in (("base", base), ("other", other)):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    found = distances(tmp_path / "base.safetensors", tmp_path / "other.safetensors", types="conv2d")
    expected = distances(base, other, layers=["conv2", "transposed"])
    assert found.layers == expected.layers
