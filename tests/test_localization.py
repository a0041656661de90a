import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ww_train.localization import (
    information_entropy,
    localization_ratio,
    participation_ratio,
    vector_entropy,
    vector_metrics,
)
from ww_train.power_law import fit_power_law
from ww_train.weights.matrices import WeightMatrix, weight_matrices

from .oracles import evals_by_svd, gaussian, heavy, orthogonal
from .peer import contained, import_peer

METRICS = (vector_entropy, localization_ratio, participation_ratio, information_entropy)
NAMES = ("vec_entropy", "loc_ratio", "part_ratio", "info_entropy")


@pytest.fixture(scope="module")
def peer():
    return import_peer()


def literal(v):
    """The four metrics of one vector, from their definitions."""
    v = np.asarray(v, dtype=np.float64)
    counts = np.histogram(np.abs(v) - np.abs(v).mean(), bins=100)[0] / len(v)
    p = v**2 / (v**2).sum()
    return (
        -sum(x * math.log(x) for x in counts if x > 0),
        np.linalg.norm(v, 1) / np.linalg.norm(v, np.inf),
        np.linalg.norm(v, 2) / np.linalg.norm(v, 4),
        -sum(x * math.log(x) for x in p if x > 0) / math.log(len(v)),
    )


def layer(*slices, scale=1.0):
    return WeightMatrix("layer", "dense", torch.stack([torch.as_tensor(w) for w in slices]), scale)


# Vectors


@pytest.mark.parametrize("M", [2, 10, 101, 500])
def test_metrics_literally(M):
    vectors = torch.cat([gaussian(M, 6), torch.from_numpy(heavy(M, 6)).float()], dim=1)
    expected = np.array([literal(column) for column in vectors.T.double()])
    for metric, values in zip(METRICS, expected.T, strict=True):
        found = metric(vectors)
        assert found.shape == (12,)
        assert found.dtype == torch.float64
        assert found.numpy() == pytest.approx(values, rel=1e-12)


def test_one_coordinate_and_all_equal():
    M = 256
    one, equal = torch.zeros(M), torch.full((M,), -0.3)
    one[3] = -2.0
    rare = 1 / M
    histogram = -rare * math.log(rare) - (1 - rare) * math.log(1 - rare)
    assert [float(m(one)) for m in METRICS] == pytest.approx([histogram, 1, 1, 0])
    assert [float(m(equal)) for m in METRICS] == pytest.approx([0, M, M**0.25, 1])


def test_the_ratios_and_the_information_entropy_order_vectors_by_spread():
    M = 400
    supports = [1, 2, 10, 50, 200, 400]
    vectors = torch.stack([torch.arange(M) < k for k in supports], dim=1).double()
    for metric in METRICS[1:]:
        assert (metric(vectors).diff() > 0).all()
    assert vector_entropy(vectors).diff().min() < 0  # the histogram does not


def test_values_of_gaussian_vectors():
    M = 4096
    loc, part, info = (float(m(gaussian(M, 100)).mean()) for m in METRICS[1:])
    assert part == pytest.approx((M / 3) ** 0.25, rel=0.005)
    assert info == pytest.approx(1 - 0.7296 / math.log(M), rel=0.001)
    assert loc == pytest.approx(M * math.sqrt(2 / math.pi) / 3.77, rel=0.02)  # 3.77 = E max |x|
    for size, value in ((16, 2.6), (256, 4.0), (4096, 4.0)):
        assert float(vector_entropy(gaussian(size, 100)).mean()) == pytest.approx(value, abs=0.1)


@pytest.mark.parametrize("metric", METRICS)
class TestLaws:
    def test_permutation_of_the_coordinates(self, metric):
        vectors = gaussian(50, 7)
        order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(metric(vectors), metric(vectors[order]), rtol=1e-13)

    def test_signs_do_not_matter(self, metric):
        vectors = gaussian(50, 7)
        assert torch.equal(metric(vectors), metric(vectors * gaussian(50, 7, seed=1).sign()))

    @pytest.mark.parametrize("factor", [2.0**-700, 0.25, 2.0**700])
    def test_scale(self, metric, factor):
        vectors = gaussian(50, 7, dtype=torch.float64)
        assert torch.equal(metric(vectors), metric(vectors * factor))

    def test_columns_are_independent(self, metric):
        vectors = gaussian(50, 7)
        one_by_one = torch.stack([metric(column) for column in vectors.T])
        assert torch.allclose(metric(vectors), one_by_one, rtol=1e-13)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_any_dtype_in_float64(self, metric, dtype):
        vectors = gaussian(50, 7).to(dtype)
        assert torch.equal(metric(vectors), metric(vectors.double()))

    def test_a_zero_vector_is_nan_and_spoils_only_itself(self, metric):
        vectors = gaussian(50, 3)
        vectors[:, 1] = 0
        assert metric(vectors).isnan().tolist() == [False, True, False]

    def test_length_one(self, metric):
        assert float(metric(torch.tensor([[3.0]]))) in (0.0, 1.0)


# Layers


def by_eigh(*slices):
    """Metrics of the eigenvectors of the smaller Gram matrices, sorted by eigenvalue."""
    rows = []
    for w in slices:
        w = np.asarray(w, dtype=np.float64)
        evals, vectors = np.linalg.eigh(w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w)
        rows += [(e, *literal(v)) for e, v in zip(evals, vectors.T, strict=True)]
    return np.array(sorted(rows)).T


SLICES = {
    "tall": [heavy(60, 40)],
    "wide": [heavy(40, 60)],
    "square": [heavy(40, 40)],
    "slices": [heavy(30, 20, seed) for seed in range(4)],
    "wide slices": [heavy(20, 30, seed) for seed in range(4)],
    "one column": [heavy(20, 1)],
}


@pytest.mark.parametrize("case", [c for c in SLICES if c != "one column"])
def test_vector_metrics_literally(case):
    slices = SLICES[case]
    evals, *metrics = by_eigh(*slices)
    found = vector_metrics(layer(*slices), xmin=float(np.median(evals)))
    assert found.evals == pytest.approx(evals, rel=1e-9)
    assert found.num_tail == np.count_nonzero(evals >= np.median(evals))
    row = found.to_dict()
    assert len(row) == 16
    for name, values in zip(NAMES, metrics, strict=True):
        assert getattr(found, name) == pytest.approx(values, rel=1e-8)
        bulk, tail = values[evals < np.median(evals)], values[evals >= np.median(evals)]
        assert row[f"bulk_mean_{name}"] == pytest.approx(bulk.mean())
        assert row[f"tail_mean_{name}"] == pytest.approx(tail.mean())
        assert row[f"bulk_var_{name}"] == pytest.approx(bulk.var(), rel=1e-6)
        assert row[f"tail_var_{name}"] == pytest.approx(tail.var(), rel=1e-6)


def test_scale_of_the_layer_is_that_of_the_eigenvalues_only():
    slices = SLICES["slices"]
    a, b = vector_metrics(layer(*slices), 1.0), vector_metrics(layer(*slices, scale=0.5), 0.25)
    assert b.evals == pytest.approx(0.25 * a.evals)
    assert b.num_tail == a.num_tail
    assert b.to_dict() == pytest.approx(a.to_dict())


@pytest.mark.parametrize("case", SLICES)
def test_the_eigenvalue_at_xmin_is_in_the_tail(case):
    spectrum = evals_by_svd(*SLICES[case])
    for i, xmin in enumerate(spectrum):
        for rounded in (xmin, np.nextafter(xmin, 0), np.nextafter(xmin, math.inf)):
            assert vector_metrics(layer(*SLICES[case]), rounded).num_tail == len(spectrum) - i


def test_no_bulk_or_no_tail():
    everything = vector_metrics(layer(heavy(60, 40)), 0.0).to_dict()
    nothing = vector_metrics(layer(heavy(60, 40)), math.inf).to_dict()
    for key, value in everything.items():
        assert (value is None) == key.startswith("bulk")
        assert (nothing[key] is None) == key.startswith("tail")
    assert everything["tail_mean_loc_ratio"] == pytest.approx(nothing["bulk_mean_loc_ratio"])


def test_a_localised_and_a_spread_signal():
    weight = gaussian(200, 100)
    weight[:, 7] += 20 * gaussian(200, 1, seed=1)[:, 0]
    spread = torch.ones(100) / 10
    weight += 100 * torch.outer(gaussian(200, 1, seed=2)[:, 0] / 200**0.5, spread)
    found = vector_metrics(layer(weight), 1000.0)
    assert found.num_tail == 2
    localised, uniform = found.part_ratio[-2:]  # energies 20² x 200 and 100²: reversed order
    localised, uniform = sorted((localised, uniform))
    assert localised == pytest.approx(1.0, abs=0.05)
    assert uniform == pytest.approx(100**0.25, abs=0.1)
    assert found.info_entropy[:-2].mean() == pytest.approx(1 - 0.7296 / math.log(100), abs=0.01)


def test_rotating_the_longer_side_changes_nothing():
    weight = torch.from_numpy(heavy(60, 40))
    a = vector_metrics(layer(weight), 100.0).to_dict()
    b = vector_metrics(layer(orthogonal(60) @ weight), 100.0).to_dict()
    assert b == pytest.approx(a, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_weights_that_are_not_finite(value):
    weight = gaussian(60, 40, dtype=torch.float64)
    weight[3, 4] = value
    with pytest.raises(ValueError, match=r"expected finite weights, got .* in layer"):
        vector_metrics(layer(weight), 1.0)


def test_xmin_that_is_no_number():
    with pytest.raises(ValueError, match="xmin = nan for layer"):
        vector_metrics(layer(gaussian(60, 40)), math.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_is_read_and_not_touched(dtype):
    model = nn.Linear(60, 40, dtype=dtype)
    before = model.weight.detach().clone()
    state = torch.get_rng_state()
    (matrix,) = weight_matrices(model)
    found = vector_metrics(matrix, 1.0)
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert found.loc_ratio.shape == (40,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_device_of_the_weights():
    weight = torch.from_numpy(heavy(60, 40))
    here, there = (vector_metrics(layer(w), 100.0) for w in (weight, weight.cuda()))
    assert there.to_dict() == pytest.approx(here.to_dict(), rel=1e-6)


# The peer


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {
                "tall": nn.Linear(60, 100),
                "wide": nn.Linear(100, 40),
                "square": nn.Linear(80, 80),
                "conv": nn.Conv2d(16, 24, 2),
                "square_conv": nn.Conv2d(20, 20, 2),
            }
        )
    with torch.no_grad():
        model["tall"].weight.copy_(torch.from_numpy(heavy(100, 60)))
        model["square"].weight.copy_(torch.from_numpy(heavy(80, 80)))
    return model


def test_columns_are_the_peers(peer, model):
    with contained():
        theirs = peer.WeightWatcher(model=model).analyze(vectors=True).set_index("longname")
    matrices = list(weight_matrices(model))
    assert len(matrices) == 5
    for matrix in matrices:
        fit = fit_power_law(evals_by_svd(*matrix.stack, scale=matrix.scale))
        ours = vector_metrics(matrix, fit.xmin)
        assert ours.num_tail == fit.num_pl_spikes
        # rounding decides on which side of xmin the peer finds xmin
        sides = [ours.to_dict(), replace(ours, num_tail=ours.num_tail - 1).to_dict()]
        columns = [c for c in sides[0] if c.partition("_")[2].partition("_")[2] in NAMES[:3]]
        assert len(columns) == 12
        row = theirs.loc[matrix.name, columns].to_dict()
        assert any(row == pytest.approx({c: side[c] for c in columns}, rel=1e-6) for side in sides)


def test_a34_an_entropy_that_tells_vectors_apart(peer):
    one, spread = np.eye(64)[0], np.full(64, 0.125)
    with contained():
        theirs = peer.WeightWatcher().vector_metrics([one, spread])["entropy"]
    assert theirs[0] == pytest.approx(theirs[1])
    ours = information_entropy(torch.from_numpy(np.stack([one, spread], axis=1)))
    assert ours.tolist() == pytest.approx([0.0, 1.0])
