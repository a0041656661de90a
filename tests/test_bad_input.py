"""Whatever the weights: a right number or a named skip with a reason; no -1, no exception."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from ww_train.analysis import analyze, measure
from ww_train.kernel_mp import KernelMP
from ww_train.marchenko_pastur import EnergyMP
from ww_train.truncated import TruncatedPowerLaw
from ww_train.weights.matrices import weight_matrices

from .oracles import dense, evals_by_svd, gaussian, quick, thorough

G = gaussian(40, 30)


def reason_of(source, **options):
    """The one reason for which a source of one matrix was skipped."""
    report = measure(source, **options)
    assert len(report) == 0
    ((_, reason),) = [(x.name, x.reason) for x in report.skipped]
    return reason


def sources(weight):
    """The same weight in every way in which it can be passed."""
    yield dense(weight)
    yield nn.ModuleDict({"a": dense(weight)})
    yield {"a.weight": weight}
    yield weight


def check(report):
    """What holds of every report."""
    for layer in report:
        row = layer.to_dict()
        for key, value in row.items():
            if isinstance(value, float):
                assert math.isfinite(value), (layer.name, key)
            if isinstance(value, float | int) and key not in ("ERG_gap", "trace_log"):
                assert value != -1 or "log" in key or "weighted" in key, (layer.name, key)
        s = layer.spectrum
        assert 1 <= s.stable_rank <= len(s.evals) + 1e-9
        assert 0 <= s.entropy <= 1 + 1e-9
        assert 0 < s.matrix_rank <= len(s.evals)
        if layer.fit:
            assert layer.fit.alpha > 1
            assert 0 <= layer.fit.D <= 1
            assert 1 < layer.fit.num_pl_spikes <= s.matrix_rank
            assert 0 < layer.fit.xmin <= layer.fit.xmax
        else:
            assert layer.warning
        if layer.traps:
            assert 0 <= layer.num_traps <= len(s.evals)
    assert all(x.name and x.reason for x in report.skipped)
    assert all(math.isfinite(v) for v in report.scalars().values())
    report.to_dataframe()
    repr(report)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.where(torch.arange(30) == 3, torch.nan, G), "NaN"),
        (torch.where(torch.arange(30) == 3, torch.inf, G), "infinite"),
        (torch.where(torch.arange(30) == 3, -torch.inf, G).to(torch.bfloat16), "infinite"),
        (torch.zeros(40, 30), "zero"),
        (torch.zeros(40, 30, dtype=torch.float16), "zero"),
        (G[:1], "1 eigenvalues"),
        (G[:, :1], "1 eigenvalues"),
        (G[:7, :7], "7 eigenvalues"),
        (torch.zeros(0, 30), "empty"),
        (torch.zeros(30, 0), "empty"),
        (torch.complex(G, G), "complex"),
        ((G * 10).int(), "integer"),
        (G > 0, "integer"),
        (G.to_sparse(), "sparse"),
        (torch.empty(40, 30, device="meta"), "meta"),
        (G.double() * 1e200, "overflow"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(tuple(value.shape)),
)
@pytest.mark.parametrize("randomize", [False, True])
def test_a_weight_without_a_spectrum_is_skipped_with_the_reason(weight, reason, randomize):
    for source in sources(weight):
        assert reason in reason_of(source, randomize=randomize)


def test_quantised_weights_are_measured_by_their_values():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its own quantised tensors
        quantised = torch.quantize_per_tensor(G, 0.1, 0, torch.qint8)
        values = quantised.dequantize()
    (matrix,) = weight_matrices({"a.weight": quantised})
    assert matrix.read_only == "quantised"
    (layer,) = measure({"a.weight": quantised})
    np.testing.assert_allclose(layer.spectrum.evals, evals_by_svd(values), rtol=1e-9)


def test_a_tensor_subclass_is_skipped_by_its_name():
    class Shard(torch.Tensor):
        pass

    assert "Shard" in reason_of({"a.weight": G.as_subclass(Shard)})


def test_lazy_layers_are_skipped_until_their_first_forward_pass():
    model = nn.Sequential(nn.LazyLinear(20), nn.LazyLinear(10))
    report = measure(model)
    assert {x.name for x in report.skipped} >= {"0", "1"}
    assert all("lazy" in x.reason for x in report.skipped)
    model(torch.ones(2, 12))
    assert [x.name for x in measure(model)] == ["0", "1"]


@pytest.mark.parametrize(
    "source", [nn.Sequential(), nn.ReLU(), {}, nn.ModuleDict(), nn.BatchNorm1d(9)]
)
def test_a_model_without_matrices_gives_an_empty_report(source):
    report = measure(source, randomize=True)
    assert (len(report), report.skipped) == (0, ())
    check(report)


@pytest.mark.parametrize(
    "source", [None, 3, b"model.safetensors", [G], (G, G), object(), G.tolist(), nn.Linear]
)
def test_an_unsupported_source_is_a_type_error(source):
    with pytest.raises(TypeError, match=r"expected an nn\.Module, a state dict"):
        measure(source)


def test_a_mapping_whose_keys_are_no_names_is_a_type_error():
    with pytest.raises(TypeError, match=r"(?i)key|name"):
        measure({0: G})


@pytest.mark.parametrize(
    "array",
    [
        np.arange(100).reshape(10, 10),
        np.array([["a"] * 10] * 10),
        np.full((10, 10), None),
        np.ones((10, 10), dtype=bool),
    ],
    ids=lambda a: str(a.dtype),
)
def test_an_array_of_no_numbers_is_a_type_error(array):
    with pytest.raises(TypeError, match=r"floating-point matrix, got an array of"):
        measure(array)


@pytest.mark.parametrize(
    "weight",
    [torch.full((40, 30), 3.0), G[:, :1] @ G[:1], torch.ones(1, 30).expand(40, 30)],
    ids=["constant", "rank one", "expanded"],
)
def test_a_rank_one_matrix_has_norms_but_no_alpha(weight):
    for source in sources(weight):
        (layer,) = measure(source, randomize=True)
        s = layer.spectrum
        assert layer.alpha is None
        assert (s.matrix_rank, s.rank_loss) == (1, 29)
        assert s.stable_rank == pytest.approx(1.0, rel=1e-6)
        assert s.norm == pytest.approx(float((weight.double() ** 2).sum()), rel=1e-9)
        assert s.entropy == 0


def test_a_constant_matrix_is_its_own_trap():
    assert measure(torch.full((40, 30), 3.0), randomize=True)["W"].num_traps == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (128, 32)])
def test_an_orthogonal_matrix_has_no_power_law(dtype, shape):
    weight = torch.linalg.qr(gaussian(*shape, dtype=torch.float64)).Q.to(dtype)
    layer = measure(weight)["W"]
    assert layer.spectrum.stable_rank == pytest.approx(shape[1], rel=1e-2)
    assert layer.alpha is None


@pytest.mark.parametrize("shape", [(15, 20), (64, 64), (256, 64)])
def test_an_orthogonal_initialisation_has_no_power_law(shape):
    alphas = []
    for seed in range(10):
        torch.manual_seed(seed)
        alphas.append(measure(nn.init.orthogonal_(torch.empty(shape)))["W"].alpha)
    assert alphas == [None] * 10


@pytest.mark.parametrize("scale", [1e-42, 1e-40, 1e-30, 1e30, 1e36])
def test_extreme_scales_of_float32_keep_the_numbers(scale):
    scaled = G * scale  # 1e-42 leaves denormal numbers of 9 bits
    expected = evals_by_svd(scaled.double() / scale)
    layer = measure(scaled, randomize=True)["W"]
    np.testing.assert_allclose(layer.spectrum.evals, expected * scale**2, rtol=1e-7)
    again = measure(scaled.double() / scale, randomize=True)["W"]
    assert layer.alpha == pytest.approx(again.alpha, rel=1e-6)
    assert (layer.ERG_gap, layer.num_traps) == (again.ERG_gap, again.num_traps)


@pytest.mark.parametrize("scale", [1e-140, 1e-70, 1e70, 1e80, 1e150, 1e152, 1e154])
def test_extreme_scales_of_float64_keep_the_numbers_or_are_skipped(scale):
    weight = G.double()
    weight[3, 4] = 60  # a trap
    plain = measure(weight, randomize=True)["W"]
    report = measure(weight * scale, randomize=True)
    check(report)
    assert len(report) + len(report.skipped) == 1
    for layer in report:
        assert layer.alpha == pytest.approx(plain.alpha, rel=1e-9)
        assert layer.ERG_gap == plain.ERG_gap
        assert layer.traps.mp.sigma_mp == pytest.approx(plain.traps.mp.sigma_mp, rel=1e-9)
        assert layer.num_traps == plain.num_traps == 1
    for skipped in report.skipped:
        assert "overflow" in skipped.reason


def test_finite_eigenvalues_with_an_infinite_sum_are_an_overflow():
    weight = torch.eye(30, dtype=torch.float64) * 1.2e154
    assert "overflow" in reason_of(weight)


def test_weights_whose_squares_underflow_are_not_called_zero():
    assert "so small that their squares are" in reason_of(G.double() * 1e-170)


ARRAYS = {
    "strided": G.double().numpy()[::2],
    "Fortran": np.asfortranarray(G.double().numpy()),
    "half": G.numpy().astype(np.float16),
    "reversed rows": G.double().numpy()[::-1],
    "reversed columns": G.double().numpy()[:, ::-1],
    "big-endian": G.double().numpy().astype(">f8"),
    "read-only": np.frombuffer(G.double().numpy().tobytes()).reshape(40, 30),
    "longdouble": G.numpy().astype(np.longdouble),
}


@pytest.fixture
def _every_warning():
    """Torch shows some warnings once in a process; show them every time."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.usefixtures("_every_warning")
@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("in_state_dict", [False, True])
def test_numpy_arrays_of_any_layout(name, in_state_dict):
    array = ARRAYS[name]
    (layer,) = measure({"a.weight": array} if in_state_dict else array)
    expected = evals_by_svd(array.astype(np.float64))
    np.testing.assert_allclose(layer.spectrum.evals, expected, rtol=1e-9)


@pytest.mark.parametrize(
    "value",
    [
        "1.2",
        7,
        [G],
        {"weight": G},
        np.array([["x"]]),
        np.full((9, 9), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_state_dict_with_something_strange_beside_its_weights(value):
    report = measure({"a.weight": G, "b.weight": value})
    assert [x.name for x in report] == ["a"]


def test_one_bad_layer_does_not_touch_the_others():
    good = nn.Linear(20, 12)
    model = nn.ModuleDict({"good": good, "nan": nn.Linear(20, 12), "also": nn.Linear(20, 12)})
    alone = measure(good)["weight"].alpha
    model["nan"].weight.data[3, 4] = torch.nan
    report = measure(model, randomize=True)
    assert [x.name for x in report] == ["good", "also"]
    assert report["good"].alpha == pytest.approx(alone, rel=1e-12)


def test_a_nan_in_one_slice_of_a_convolution_spoils_the_layer():
    conv = nn.Conv2d(10, 12, 3)
    conv.weight.data[0, 0, 1, 1] = torch.nan
    assert "NaN" in reason_of(nn.Sequential(conv))


@pytest.mark.parametrize("shape", [(30,), (), (2, 3, 4, 5, 6, 7)])
def test_a_tensor_that_is_no_matrix_is_not_lost_without_a_word(shape):
    try:
        report = measure(torch.ones(shape))
    except (TypeError, ValueError) as error:
        assert "matri" in str(error)  # noqa: PT017
    else:
        assert len(report) + len(report.skipped) > 0


KINDS = (
    "gaussian",
    "constant",
    "zero",
    "rank one",
    "one entry",
    "nan",
    "inf",
    "identity",
    "cauchy",
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def weight_of(kind, rows, cols, dtype, scale):
    weight = gaussian(rows, cols, dtype=torch.float64)
    if kind == "constant":
        weight = torch.ones_like(weight)
    elif kind == "zero":
        weight = torch.zeros_like(weight)
    elif kind == "rank one":
        weight = weight[:, :1] @ weight[:1]
    elif kind == "one entry":
        weight = torch.zeros_like(weight)
        weight[0, -1] = 1
    elif kind == "identity":
        weight = torch.eye(rows, cols, dtype=torch.float64)
    elif kind == "cauchy":
        weight = weight / gaussian(rows, cols, 1, torch.float64)
    elif kind in ("nan", "inf"):
        weight[-1, 0] = float(kind)
    return (weight * scale).to(dtype)


weights = st.builds(
    weight_of,
    st.sampled_from(KINDS),
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from(DTYPES),
    st.sampled_from([1e-45, 1e-30, 1e-7, 1.0, 1e4, 1e30, 1e38]),
)


@thorough
@given(st.lists(weights, min_size=1, max_size=4), st.integers(0, 12), st.booleans())
@example([weight_of("identity", 20, 20, torch.float32, 1.0)], 1, True)
@example([weight_of("gaussian", 1, 1, torch.float32, 1.0)], 0, True)
def test_every_matrix_is_measured_or_skipped_with_a_reason(found, min_evals, randomize):
    model = nn.ModuleDict({f"l{i}": dense(w) for i, w in enumerate(found)})
    report = measure(model, min_evals=min_evals, randomize=randomize)
    check(report)
    accounted = [x.name for x in report] + [x.name for x in report.skipped]
    assert sorted(accounted) == sorted(f"l{i}" for i in range(len(found)))
    for weight, name in zip(found, model, strict=True):
        usable = weight.isfinite().all() and weight.any() and min(weight.shape) >= min_evals
        assert (name in [x.name for x in report]) == bool(usable)
    from_state = measure(model.state_dict(), min_evals=min_evals, randomize=randomize)
    assert from_state.scalars() == report.scalars()
    assert from_state.skipped == report.skipped


@thorough
@given(weights)
def test_the_eigenvalues_are_right_wherever_there_are_any(weight):
    for layer in measure(weight, min_evals=1):
        expected = evals_by_svd(weight)
        error = np.abs(layer.spectrum.evals - expected).max()
        assert error <= 1e-12 * expected[-1]


dims = st.lists(st.integers(1, 9), min_size=0, max_size=6)


@quick
@given(st.dictionaries(st.sampled_from(["a.weight", "b", "in_proj_weight", "weight_ih_l0"]), dims))
def test_tensors_of_any_shape_and_name(shapes):
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    report = measure(state, min_evals=1)
    check(report)
    named = {x.name for x in report} | {x.name for x in report.skipped}
    matrices = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1}
    assert all(any(n == m or n.startswith(f"{m}.") for n in named) for m in matrices)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_a_checkpoint_is_read_under_its_usual_keys(wrapper):
    assert [x.name for x in measure({wrapper: {"fc.weight": G}, "epoch": 3})] == ["fc"]


@pytest.mark.parametrize(
    "key", ["0.weight_orig", "0.weight_mask", "parametrizations.weight.0.base"]
)
def test_what_a_weight_is_computed_from_is_no_layer(key):
    (skipped,) = measure({key: G}).skipped
    assert "computed" in skipped.reason


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fit": "TPL"}, r"fit= is a function .* such as fit_power_law, .*got 'TPL'"),
        ({"fit": None}, r"fit= is a function .* got None"),
        ({"fit": TruncatedPowerLaw}, r"TruncatedPowerLaw\(\) of ww_train, got <class"),
        ({"mp_fit": "yes"}, r"mp_fit= is True or False, .* EnergyMP\(\) .* got 'yes'"),
        ({"mp_fit": 2}, "mp_fit= is True or False, .* got 2"),
        ({"mp_fit": KernelMP}, r"KernelMP\(\) of ww_train, got <class"),
    ],
)
def test_a_fit_that_is_no_function_is_refused(options, says):
    with pytest.raises(TypeError, match=says):
        measure(G, **options)
    with pytest.raises(TypeError, match=says):
        analyze(G, **options)


@pytest.mark.parametrize("mp_fit", [True, False, None, EnergyMP()])
def test_the_bulk_is_fitted_if_asked_for(mp_fit):
    (layer,) = measure(G, mp_fit=mp_fit)
    assert (layer.mp is not None) == bool(mp_fit)
