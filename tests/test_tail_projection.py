import math

import numpy as np
import pytest
import torch
from torch import nn

from ww_train import WWPGD
from ww_train.erg import erg_tail
from ww_train.power_law import fit_power_law
from ww_train.spectrum import Spectrum
from ww_train.steering.projection import Projected
from ww_train.steering.tail_projection import TailProjection, log_template, midpoint_tail
from ww_train.weights.matrices import Skipped, weight_matrices

from .oracles import detx_num, evals_by_svd, gaussian, heavy, pareto, power_law_scan
from .peer import contained, import_peer

SHAPES = [(256, 128), (100, 40), (96, 96), (32, 100)]
ARRIVE = {"blend": 1.0, "cayley": 0.5}


def heavy_weight(*shape, seed=0):
    return torch.from_numpy(heavy(*shape, seed))


def spectrum_of(weight):
    evals = evals_by_svd(weight)
    return Spectrum(evals, max(weight.shape), min(weight.shape))


def with_evals(evals):
    return Spectrum(np.sort(evals), len(evals), len(evals))


def oracle(evals, strength, q=1.0, blend=0.5, cayley=0.25):
    """The documented steps with plain loops; `evals` descending. None where the peer would skip."""
    n, mean = len(evals), math.fsum(evals) / len(evals)
    index = power_law_scan(evals[::-1])[1]
    k = (n - index + detx_num(evals)) // 2
    mu = [x / mean for x in evals]
    scale = math.exp(q * math.fsum(math.log(i) for i in range(1, k + 1)) / k)
    template = [scale * i**-q for i in range(1, k + 1)]
    eta, b = cayley * strength, blend * strength
    new = []
    for x, t in zip(mu, template, strict=False):
        g = math.log(x / t)
        moved = x * math.exp(-2 * eta * g)
        new.append(((1 - b) * math.sqrt(x) + b * math.sqrt(moved)) ** 2)
    wanted = (1 - 2 * eta * b) * math.fsum(math.log(x) for x in mu[:k])
    shift = math.exp((wanted - math.fsum(math.log(x) for x in new)) / k)
    edge = mu[k] if k < n else 0.0
    new = [max(shift * x, edge) * mean for x in new]
    off = math.sqrt(
        math.fsum(
            (math.sqrt(max(t, edge)) - math.sqrt(x)) ** 2
            for t, x in zip(template, mu, strict=False)
        )
        / n
    )
    return k, [*new, *evals[k:]], off


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("matrix", [gaussian, heavy_weight])
@pytest.mark.parametrize(("strength", "settings"), [(1.0, {}), (0.3, {"q": 0.5}), (1.0, ARRIVE)])
def test_the_step_is_the_documented_one(shape, matrix, strength, settings):
    spectrum = spectrum_of(matrix(*shape, seed=1))
    k, evals, off = oracle(spectrum.evals[::-1], strength, **settings)
    move = TailProjection(**settings).move(spectrum, strength)
    assert move.tail_size == k == midpoint_tail(spectrum)
    assert move.evals == pytest.approx(evals, rel=1e-10)
    assert move.distance == pytest.approx(off, rel=1e-10)


def test_the_tail_is_the_midpoint_that_the_peer_would_have_to_take():
    peer = import_peer()
    model = nn.Sequential(*[nn.Linear(m, n, bias=False) for n, m in SHAPES])
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(heavy_weight(*layer.weight.shape, seed=2))
    with contained():
        details = peer.WeightWatcher(model=model).analyze(detX=True)
    expected = [(int(row.num_pl_spikes) + int(row.detX_num)) // 2 for row in details.itertuples()]
    assert [midpoint_tail(spectrum_of(layer.weight.detach())) for layer in model] == expected


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", [2, 7, 100])
def test_the_template_is_a_power_law_of_determinant_one(k, q):
    logs = log_template(k, q)
    assert np.exp(logs[0] - logs) == pytest.approx(np.arange(1, k + 1) ** q)
    assert logs.sum() == pytest.approx(0.0, abs=1e-10)


def test_strength_zero_is_the_identity():
    weight = heavy_weight(100, 40)
    spectrum = spectrum_of(weight)
    move = TailProjection(**ARRIVE).move(spectrum, 0.0)
    assert (move.evals == spectrum.evals[::-1]).all()
    copy = weight.clone()
    assert isinstance(TailProjection().project_(copy, 0.0), Projected)
    torch.testing.assert_close(copy, weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{"blend": 0.0}, {"cayley": 0.0}])
def test_a_step_of_size_zero_is_the_identity_too(settings):
    spectrum = spectrum_of(heavy_weight(100, 40))
    move = TailProjection(**settings).move(spectrum, 1.0)
    assert move.evals == pytest.approx(spectrum.evals[::-1], rel=1e-12)


@pytest.mark.parametrize("far", [1e-6, 1e6])
@pytest.mark.parametrize("cayley", [0.1, 0.25, 0.5])
def test_every_eigenvalue_moves_towards_the_template_however_far_it_is(far, cayley):
    # P5: beyond |g| = 1/cayley WW_PGD pushes the other way
    evals = np.concatenate([[20.0 * far], pareto(60, 2.5, 3)[::-1]])
    spectrum = with_evals(evals)
    k = midpoint_tail(spectrum)
    tail = spectrum.evals[::-1][:k] / spectrum.evals.mean()
    before = np.log(tail) - log_template(k, 1.0)
    stepped = TailProjection(blend=1.0, cayley=cayley)._step(tail, 1.0)
    after = np.log(stepped) - log_template(k, 1.0)
    assert after == pytest.approx((1.0 - 2.0 * cayley) * before, abs=1e-9)


def test_the_whole_way_lands_on_the_template_with_trace_log_zero():
    # a tail over a low bulk, so that no eigenvalue has to stop at its edge
    low = 1e-3 * np.linspace(1.0, 0.5, 300)
    evals = np.concatenate([50.0 * np.arange(1.0, 41.0) ** -0.6, low])
    move = TailProjection(**ARRIVE).move(with_evals(evals), 1.0)
    k = move.tail_size
    tail = move.evals[:k] / evals.mean()
    assert np.log(tail).sum() == pytest.approx(0.0, abs=1e-9)
    assert tail[0] / tail == pytest.approx(np.arange(1.0, k + 1.0))


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_the_trace_log_goes_as_far_as_the_step(strength):
    low = 1e-3 * np.linspace(1.0, 0.5, 300)
    evals = np.concatenate([50.0 * np.arange(1.0, 41.0) ** -0.6, low])
    move = TailProjection().move(with_evals(evals), strength)
    before, after = (
        np.log(values[: move.tail_size] / evals.mean()).sum() for values in (evals, move.evals)
    )
    assert after == pytest.approx((1.0 - 0.25 * strength**2) * before, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("matrix", [gaussian, heavy_weight])
def test_order_and_bulk_are_kept_and_the_tail_stays_above(shape, matrix):
    spectrum = spectrum_of(matrix(*shape, seed=3))
    for settings in ({}, ARRIVE, {"q": 3.0, **ARRIVE}):
        for strength in (0.1, 1.0):
            move = TailProjection(**settings).move(spectrum, strength)
            k, old = move.tail_size, spectrum.evals[::-1]
            assert (np.diff(move.evals) <= 0.0).all()
            assert (move.evals[k:] == old[k:]).all()
            assert np.isfinite(move.evals).all()


def test_zero_stays_zero_and_nothing_is_lifted():
    weight = heavy_weight(100, 60)
    weight[:, 40:] = 0.0
    projected = weight.clone()
    done = TailProjection(**ARRIVE).project_(projected)
    assert done.tail_size <= 40
    assert evals_by_svd(projected)[:20] == pytest.approx(np.zeros(20), abs=1e-25)
    assert not torch.equal(projected, weight)
    tiny = with_evals(np.concatenate([np.zeros(5), pareto(50, 2.0) * 1e-24]))
    assert (TailProjection().move(tiny, 1.0).evals[-5:] == 0.0).all()


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
def test_a_scaled_layer_moves_alike(scale):
    weight = heavy_weight(100, 40)
    plain, scaled = weight.clone(), weight * scale
    a, b = TailProjection().project_(plain), TailProjection().project_(scaled)
    torch.testing.assert_close(scaled / scale, plain, rtol=1e-9, atol=1e-9)
    assert (a.tail_size, a.distance) == (b.tail_size, pytest.approx(b.distance, rel=1e-9))


def test_transposed_and_permuted_layers_move_alike():
    weight = heavy_weight(100, 40)
    order = torch.randperm(100)
    plain, transposed, permuted = weight.clone(), weight.T.clone(), weight[order].clone()
    for copy in (plain, transposed, permuted):
        assert isinstance(TailProjection().project_(copy), Projected)
    torch.testing.assert_close(transposed.T, plain)
    torch.testing.assert_close(permuted, plain[order])


def test_singular_vectors_are_kept_and_the_report_is_what_the_weights_have():
    weight = heavy_weight(100, 40)
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    done = TailProjection().project_(weight)
    core = U.T @ weight @ Vh.T
    torch.testing.assert_close(core, torch.diag(core.diagonal()), atol=1e-9, rtol=0.0)
    assert done.after.evals == pytest.approx(evals_by_svd(weight), rel=1e-9)


def test_a_convolution_has_one_pooled_tail():
    conv = nn.Conv2d(24, 32, 3)
    with torch.no_grad():
        conv.weight.copy_(heavy_weight(32, 216).view(32, 24, 3, 3))
    (matrix,) = weight_matrices(conv)
    stack = matrix.stack.clone()
    pooled = evals_by_svd(*stack, scale=matrix.scale)
    k, expected, _ = oracle(pooled[::-1], 1.0)
    done = TailProjection().project_(matrix)
    assert done.tail_size == k
    now = evals_by_svd(*matrix.stack.detach(), scale=matrix.scale)
    assert now == pytest.approx(np.sort(expected), rel=1e-4)
    assert not torch.equal(matrix.stack, stack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_projected_in_place(dtype):
    # P8: WW_PGD has no way to decompose 16 bits
    weight = heavy_weight(96, 64).to(dtype)
    copy = weight.clone()
    address = copy.data_ptr()
    assert isinstance(TailProjection().project_(copy), Projected)
    assert copy.dtype == dtype
    assert copy.data_ptr() == address
    assert copy.isfinite().all()
    assert not torch.equal(copy, weight)


@pytest.fixture(scope="module")
def trained():
    """The hidden layer of a small network after some epochs on random labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    y = torch.randint(10, (512,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model[0].weight.detach()


def alphas(weight, steps, **settings):
    """Fitted alpha after each of so many steps of strength 1."""
    copy = weight.double()
    return [TailProjection(**settings).project_(copy).alpha for _ in range(steps)]


def test_repeated_steps_bring_a_trained_layer_near_alpha_two(trained):
    before = fit_power_law(evals_by_svd(trained)).alpha
    assert before > 2.5
    path = alphas(trained, 25)
    assert abs(path[0] - 2.0) < abs(before - 2.0)
    assert path[-1] == pytest.approx(2.0, abs=0.25)
    assert path[-1] == pytest.approx(path[-2], abs=0.05)


@pytest.mark.parametrize(("q", "alpha"), [(0.5, 3.0), (1.0, 2.0)])
def test_q_says_which_alpha(q, alpha):
    path = alphas(gaussian(256, 128, dtype=torch.float64), 25, q=q)
    assert path[-1] == pytest.approx(alpha, abs=0.3)


def test_a_gap_remains_as_the_docstring_says():
    copy = gaussian(256, 128, dtype=torch.float64)
    for _ in range(25):
        done = TailProjection().project_(copy)
    assert done.ERG_gap > 20
    assert erg_tail(done.after, done.fit).trace_log > 0.0


def test_layers_without_a_tail_are_left_alone():
    flat = torch.eye(30)
    tiny = heavy_weight(50, 12)
    short = heavy_weight(64, 24)
    cases = [
        (flat, TailProjection(), "no power law"),
        (tiny, TailProjection(), "fewer than min_evals=20"),
        (short, TailProjection(min_tail=25), "fewer than min_tail=25"),
        (torch.zeros(30, 30), TailProjection(), "zero"),
        (torch.full((30, 30), math.nan), TailProjection(), "NaN"),
    ]
    for weight, projection, reason in cases:
        copy = weight.clone()
        result = projection.project_(copy)
        assert isinstance(result, Skipped)
        assert reason in result.reason
        assert torch.equal(copy.nan_to_num(), weight.nan_to_num())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"q": 0.0}, "q must"),
        ({"q": math.nan}, "q must"),
        ({"q": math.inf}, "q must"),
        ({"blend": 1.1}, "blend must"),
        ({"blend": math.nan}, "blend must"),
        ({"cayley": 0.6}, "cayley must"),
        ({"cayley": -0.1}, "cayley must"),
        ({"min_tail": 1}, "at least 2"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        TailProjection(**settings)


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_bad_strength_raises(strength):
    with pytest.raises(ValueError, match="strength"):
        TailProjection().project_(gaussian(40, 30), strength)


def test_settings_are_keyword_only():
    with pytest.raises(TypeError):
        TailProjection(1.0)


def test_wwpgd_takes_it():
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = WWPGD(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model=model,
        projection=TailProjection(),
        strength=1.0,
        strict=True,
    )
    first, second = optimizer.end_epoch()
    assert isinstance(first, Projected)
    assert isinstance(second, Skipped)
