import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ww_train import measure
from ww_train.callbacks.timeline import alarm
from ww_train.marchenko_pastur import fit_mp, mp_density, mp_distribution, mp_edges
from ww_train.randomness import random_bound, random_distance, random_like
from ww_train.spectrum import Spectrum

from .oracles import dense, evals_by_svd, heavy, orthogonal, stack_of


def spectrum(*slices):
    """The pooled spectrum of matrices of one shape."""
    sizes = sorted(slices[0].shape)
    return Spectrum(evals_by_svd(*slices), sizes[1], sizes[0], len(slices))


ENTRIES = {
    "Gaussian": lambda rng, shape: rng.standard_normal(shape),
    "uniform": lambda rng, shape: rng.uniform(-1.0, 1.0, shape),
    "signs": lambda rng, shape: rng.choice([-1.0, 1.0], shape),
}


def shares(entries, shape, rf, repeats):
    """How often a random spectrum is farther than the bound, and is not random-like."""
    rng = np.random.default_rng([*shape, rf])
    found = []
    for _ in range(repeats):
        s = spectrum(*ENTRIES[entries](rng, (rf, *shape)))
        found.append((random_distance(s) > random_bound(s.M, rf), not random_like(s)))
    return np.mean(found, axis=0)


@pytest.mark.parametrize(("N", "M"), [(8, 8), (40, 40), (41, 40), (64, 16), (3000, 8)])
def test_the_distribution_is_the_integral_of_the_density(N, M):
    low, high = mp_edges(N, M)
    roots = np.linspace(math.sqrt(low), math.sqrt(high), 200_001)  # no pole at zero, as in x
    middles = 0.5 * (roots[1:] + roots[:-1])
    mass = np.cumsum(mp_density(middles**2, N, M, 1.0) * 2.0 * middles * np.diff(roots))
    np.testing.assert_allclose(mp_distribution(roots[1:] ** 2, N, M), mass, atol=1e-5)


@pytest.mark.parametrize(("N", "M"), [(8, 8), (100_000, 2), (64, 16)])
def test_outside_its_edges_the_distribution_is_zero_and_one(N, M):
    low, high = mp_edges(N, M)
    x = np.array([0.0, low, high, 2.0 * high])
    np.testing.assert_allclose(mp_distribution(x, N, M), [0.0, 0.0, 1.0, 1.0], atol=1e-7)


def test_the_distance_is_the_largest_gap_on_either_side_of_a_step():
    s = spectrum(stack_of(30, 12).double())
    law = [float(mp_distribution(np.array([x * 360 / s.norm]), 30, 12)[0]) for x in s.evals]
    gaps = [max(abs(F - i / 12), abs(F - (i + 1) / 12)) for i, F in enumerate(law)]
    assert random_distance(s) == pytest.approx(max(gaps), rel=1e-9)


@pytest.mark.parametrize("entries", ENTRIES)
@pytest.mark.parametrize(
    ("shape", "rf", "repeats"),
    [
        ((8, 8), 1, 300),
        ((64, 8), 1, 300),
        ((10, 96), 1, 200),
        ((32, 48), 1, 150),
        ((96, 96), 1, 40),
        ((3, 32), 9, 200),
        ((16, 16), 9, 60),
        ((40, 64), 9, 15),
    ],
)
def test_random_matrices_are_random_like(entries, shape, rf, repeats):
    far, other = shares(entries, shape, rf, repeats)
    assert far <= 0.01
    assert other <= 0.03  # at most 9 of 300, if one in a hundred has a spike


@pytest.mark.parametrize("M", [256, 512])
def test_large_random_matrices_are_random_like(M):
    for seed, rows in enumerate((M, 2 * M)):
        assert random_like(spectrum(stack_of(rows, M, seed=seed)))


INITIALISATIONS = [
    nn.init.xavier_uniform_,
    nn.init.xavier_normal_,
    nn.init.kaiming_uniform_,
    nn.init.kaiming_normal_,
    nn.init.trunc_normal_,
]


@pytest.mark.parametrize("init", INITIALISATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_layer_learned_nothing_and_alarms_nobody(init, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = init(torch.empty(144, 96), generator=generator)
    kernel = init(torch.empty(32, 16, 3, 3), generator=generator)
    report = measure({"fc.weight": weight.to(dtype), "conv.weight": kernel.to(dtype)})
    assert [layer.verdict for layer in report] == ["random-like"] * 2
    assert report.verdict == "random-like (2 layers)"
    assert [alarm(layer) for layer in report] == ["", ""]
    assert "layer fc: random-like: " in report["fc"].advice


@pytest.mark.parametrize(("N", "M"), [(96, 96), (300, 64), (256, 256)])
@pytest.mark.parametrize("strength", [1.0, 1.5, 3.0, 30.0])
def test_a_spike_that_is_found_is_not_random(N, M, strength):
    rng = np.random.default_rng([N, M])
    found = 0
    for _ in range(5):
        u, v = rng.standard_normal(N), rng.standard_normal(M)
        signal = np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))
        s = spectrum(rng.standard_normal((N, M)) + strength * (N * M) ** 0.25 * signal)
        spikes = fit_mp(s).num_spikes
        assert not (spikes and random_like(s))
        found += spikes > 0
    assert found == 5 or strength < 3.0


def row_variances(shape):
    return (
        stack_of(*shape).numpy() * np.where(np.arange(shape[0]) < shape[0] // 3, 0.5, 1.0)[:, None]
    )


OTHERS = {
    "a power law": lambda: heavy(96, 96),
    "a mean": lambda: stack_of(96, 96).numpy() + 0.5,
    "rows of two variances": lambda: row_variances((192, 96)),
    "half the rank": lambda: stack_of(96, 48).numpy() @ stack_of(48, 96, seed=1).numpy(),
    "orthogonal": lambda: orthogonal(96).numpy(),
    "a product": lambda: stack_of(96, 96).numpy() @ stack_of(96, 96, seed=1).numpy(),
    "an identity": lambda: np.eye(96),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_matrices_are_not_random_like(name):
    s = spectrum(OTHERS[name]())
    assert random_distance(s) > random_bound(s.M)
    assert not random_like(s)


def test_an_orthogonal_initialisation_stays_malformed():
    assert measure(orthogonal(64).float())["W"].verdict == "malformed"


@pytest.mark.parametrize("scale", [1e-150, 1e-12, 1e12, 1e150])
def test_neither_scale_nor_orientation_matters(scale):
    weight = stack_of(60, 40).double().numpy()
    there, back = spectrum(weight), spectrum(scale * weight.T)
    assert random_distance(back) == pytest.approx(random_distance(there), rel=1e-9)
    assert random_like(there)
    assert random_like(back)


def test_too_few_eigenvalues_tell_nothing():
    assert not random_like(spectrum(stack_of(20, 7)))
    assert random_like(spectrum(stack_of(20, 8)))
    vectors = spectrum(*stack_of(9, 32, 1))
    assert vectors.M == 1
    assert not random_like(vectors)


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_a_spectrum_without_a_norm_is_not_random_like(bad):
    s = spectrum(stack_of(20, 10))
    assert not random_like(replace(s, evals=np.full(10, bad)))


def test_the_inverse_of_a_random_matrix_is_not_random_like():
    assert measure(stack_of(64, 64), inverse=True)["W"].verdict != "random-like"


def test_a_layer_leaves_the_phase_when_it_learns():
    x, start = stack_of(400, 40), stack_of(40, 40, seed=3) / 40**0.5
    target = x @ stack_of(40, 3, seed=1) @ stack_of(3, 40, seed=2)
    layer = dense(start.clone()).requires_grad_(True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), target).backward()
        optimizer.step()
    assert measure(start)["W"].verdict == "random-like"
    assert measure(layer.weight.detach())["W"].verdict != "random-like"
