import builtins
import inspect
import itertools
import math
import pathlib
import re
import subprocess
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import nn

from ww_train import Report, TruncatedPowerLaw, measure, plots
from ww_train.marchenko_pastur import fit_mp
from ww_train.plots.noise import unfolded_spacings
from ww_train.plots.style import PURPLE, RED, alpha_range, every_nth, label, short_labels
from ww_train.power_law import PowerLaw, PowerLawFit

from .oracles import gaussian, heavy, orthogonal, power_law_scan

ROOT = pathlib.Path(__file__).parents[1]

LAYER_FIGURES = (
    plots.esd,
    plots.esd_linear,
    plots.esd_semilog,
    plots.xmin_scan,
    plots.mp_fit,
    plots.randomized_esd,
    plots.detX,
    plots.level_spacings,
    plots.vector_metrics,
)
REPORT_FIGURES = (plots.alpha_histogram, plots.correlation_flow, plots.alpha_vs_rand_distance)
HISTORY_FIGURES = (plots.heat_map, plots.training_curves)


def one(weights, **options):
    """The only layer of a model that is this matrix."""
    (layer,) = measure(torch.as_tensor(weights), min_evals=1, **options)
    return layer


def full(weights):
    return one(weights, randomize=True, vectors=True, mp_fit=True)


@pytest.fixture(scope="module")
def layer():
    weights = torch.as_tensor(heavy(90, 60))
    weights[3, 5] = 80.0
    return full(weights)


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(12, 16, 3), nn.Embedding(30, 20), nn.Linear(40, 30))
    return measure(model, randomize=True)


def with_alphas(report, *alphas):
    """A report whose layers have these alphas; None is a layer without a power law."""
    first = report.layers[-1]
    fits = [None if a is None else replace(first.fit, alpha=a) for a in alphas]
    layers = [replace(first, name=f"blocks.{i}.fc", fit=fit) for i, fit in enumerate(fits)]
    return Report(tuple(layers), ())


def history_of(*curves):
    """Records of `SpectralMonitor` with one alpha for each layer and epoch; None is left out."""
    return [
        {"epoch": float(epoch), "step": 10.0 * epoch}
        | {f"ww_alpha/blocks.{i}.fc": a for i, a in enumerate(alphas) if a is not None}
        for epoch, alphas in enumerate(zip(*curves, strict=True))
    ]


def draw(figure):
    figure.canvas.draw()
    return figure


def sketch(figure):
    """Draw without the layout, which takes most of the time."""
    figure.set_layout_engine("none")
    return draw(figure)


def axes(figure):
    return sketch(figure).axes[0]


def heights(ax):
    return np.array([bar.get_height() for bar in ax.patches if hasattr(bar, "get_height")])


def vertical_lines(ax):
    """Position of the vertical lines by colour."""
    lines = [line for line in ax.lines if list(line.get_ydata()) == [0, 1]]
    return {to_hex(line.get_color()): float(line.get_xdata()[0]) for line in lines}


def curve(ax, name):
    (line,) = [line for line in ax.lines if line.get_label() == name]
    return line.get_xdata(), line.get_ydata()


def points(ax):
    """All scattered points of the axes, and the number of them that are triangles."""
    offsets = [(c, np.asarray(c.get_offsets())) for c in ax.collections if len(c.get_offsets())]
    triangles = sum(len(o) for c, o in offsets if not c.get_clip_on())
    return np.concatenate([o for _, o in offsets]), triangles


def texts(figure):
    found = (t.get_text() for ax in figure.axes for t in ax.findobj(matplotlib.text.Text))
    return "\n".join(found).replace("\N{NO-BREAK SPACE}", " ")


def lines_are(ax, **expected):
    found = vertical_lines(ax)
    colours = {"red": RED.lower(), "purple": PURPLE.lower()}
    assert {name: found[colours[name]] for name in expected} == expected


# The spectrum of a layer


@pytest.mark.parametrize("figure", [plots.esd, plots.esd_linear, plots.esd_semilog])
def test_spectrum(layer, figure):
    ax = axes(figure(layer))
    lines_are(ax, red=layer.fit.xmin, purple=layer.erg.detX_val)
    assert heights(ax).sum() == len(layer.spectrum.positive)
    assert f"alpha = {layer.alpha:.2f}" in ax.get_title(loc="left")
    assert layer.verdict in ax.get_title(loc="left")
    assert ax.get_xscale() == ("linear" if figure is plots.esd_linear else "log")
    assert ax.get_yscale() == ("log" if figure is plots.esd else "linear")


@pytest.mark.parametrize("figure", [plots.esd, plots.esd_linear, plots.esd_semilog])
@pytest.mark.parametrize("fit", [PowerLaw(), TruncatedPowerLaw()])
def test_the_law_has_as_many_eigenvalues_as_the_tail(figure, fit):
    layer = one(gaussian(300, 200, seed=1), fit=fit)
    assert (layer.fit.Lambda or 0.0) > 0.0 or fit == PowerLaw()
    x, y = curve(ax := axes(figure(layer)), "power law")
    edges = np.array([bar.get_x() for bar in ax.patches] + [layer.spectrum.lambda_max])
    middle = np.sqrt(x[1:] * x[:-1])
    bins = np.searchsorted(edges, middle) - 1
    density = np.sqrt(y[1:] * y[:-1]) / np.diff(edges)[np.clip(bins, 0, None)]
    law = layer.fit
    beyond = (law.xmax / law.xmin) ** (1 - law.alpha) if not law.Lambda else 0.0
    assert (density * np.diff(x)).sum() == pytest.approx(law.num_pl_spikes * (1 - beyond), rel=0.06)
    assert x[0] == pytest.approx(law.xmin)
    assert x[-1] == pytest.approx(law.xmax)


def test_the_law_is_straight_with_slope_one_minus_alpha(layer):
    x, y = curve(axes(plots.esd(layer)), "power law")
    slope = np.diff(np.log(y)) / np.diff(np.log(x))
    assert slope == pytest.approx(np.full(len(slope), 1 - layer.alpha), rel=1e-6)


def test_eigenvalues_that_are_rounding_are_counted_not_drawn():
    layer = one(gaussian(60, 4) @ gaussian(4, 40))
    figure = plots.esd(layer)
    assert heights(axes(figure)).sum() == 4
    assert "36 that are rounding not shown" in texts(figure)


@pytest.mark.parametrize("alpha", [1.5, 3.0])
def test_a_narrow_tail_has_its_bins_in_view(alpha):
    evals = np.geomspace(1e-9, 1.0, 400)
    evals[-40:] = np.random.default_rng(0).uniform(0.9, 1.0, 40)
    fit = PowerLawFit(alpha=alpha, xmin=0.9, xmax=1.0, D=0.1, sigma=0.1, num_pl_spikes=40)
    layer = one(np.diag(np.sqrt(evals)), fit=lambda _: fit)
    ax = axes(plots.esd(layer))
    left = ax.get_xlim()[0]
    assert 1e-6 < left == min(0.9, layer.erg.detX_val) / 30
    assert heights(ax).sum() == (layer.spectrum.positive >= left).sum() < len(evals)
    assert 10 <= len(heights(ax)) <= 100
    assert heights(axes(plots.esd_semilog(layer))).sum() == len(evals)


@pytest.mark.parametrize("span", [1.0, 1.9, 8.0, 600.0, 1e12])
@pytest.mark.parametrize("low", [3.7e-7, 8.1e5])
def test_labels_of_a_log_axis_do_not_overlap(low, span):
    layer = one(np.diag(np.sqrt(np.geomspace(low, low * span, 200))))
    for figure in (plots.esd, plots.xmin_scan):
        drawn = draw(figure(layer))
        for ax in drawn.axes[:1]:
            shown = [t for t in ax.get_xticklabels(which="both") if t.get_text()]
            limits = ax.get_window_extent()
            boxes = sorted((t.get_window_extent() for t in shown), key=lambda box: box.x0)
            boxes = [box for box in boxes if limits.x0 <= (box.x0 + box.x1) / 2 <= limits.x1]
            assert len(boxes) >= 2
            assert all(a.x1 + 2 < b.x0 for a, b in itertools.pairwise(boxes))


def test_xmin_scan(layer):
    figure = sketch(plots.xmin_scan(layer))
    left, right = figure.axes
    xmin, D = left.lines[0].get_data()
    _, alpha = right.lines[0].get_data()
    lines_are(left, red=layer.fit.xmin)
    evals = layer.spectrum.positive
    assert xmin.tolist() == evals[:-1].tolist()
    for i in (0, 20, 57):
        fit = PowerLaw(xmin=float(evals[i]))(evals)
        assert (D[i], alpha[i]) == (fit.D, fit.alpha)
    _, best, best_alpha, distance = power_law_scan(evals)
    assert D.argmin() == best
    assert (D.min(), alpha[best]) == pytest.approx((distance, best_alpha))


def test_a_thinned_scan_keeps_the_chosen_xmin():
    layer = one(heavy(900, 700))
    xmin, D = axes(plots.xmin_scan(layer)).lines[0].get_data()
    assert len(xmin) in (300, 301)
    assert layer.fit.xmin in xmin
    assert D.min() == pytest.approx(layer.fit.D)


def test_a_scan_leaves_out_what_the_fit_left_out():
    layer = one(heavy(200, 100), fit=PowerLaw(drop_top=5))
    xmin, D = axes(plots.xmin_scan(layer)).lines[0].get_data()
    assert xmin.max() == layer.spectrum.positive[-7]
    assert D.min() == pytest.approx(layer.fit.D)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
@pytest.mark.parametrize("spread", [None, 1e-15, 1e-9])
def test_a_scan_of_one_xmin_is_a_point(scale, spread):
    evals = np.arange(1.0, 9.0)
    if spread is not None:
        evals = np.append(evals, 1.0 + spread)
    layer = one(scale * np.diag(np.sqrt(evals)))
    assert layer.fit.num_pl_spikes >= 8
    left, right = sketch(plots.xmin_scan(layer)).axes
    low, high = left.get_xlim()
    for ax, value in ((left, layer.fit.D), (right, layer.fit.alpha)):
        xmin, found = ax.lines[0].get_data()
        assert np.isclose(found, value, rtol=1e-9).any()
        assert ((low < 0.9 * xmin) & (1.1 * xmin < high)).all()
        assert ax.lines[0].get_marker() == ("o" if len(xmin) == 1 else "None")
    assert len(xmin) == 1 or spread is not None


# Noise


@pytest.mark.parametrize("shape", [(300, 300), (600, 200)])
@pytest.mark.parametrize("measured", [True, False])
def test_mp_fit(shape, measured):
    signal = 400.0 * gaussian(shape[0], 1) @ gaussian(1, shape[1], seed=2)
    layer = one(gaussian(*shape) + signal / math.prod(shape) ** 0.5, mp_fit=measured)
    mp = fit_mp(layer.spectrum)
    figure = plots.mp_fit(layer)
    ax = axes(figure)
    lines_are(ax, red=math.sqrt(mp.threshold))
    assert mp.num_spikes == 1
    assert heights(ax).sum() == len(layer.spectrum.evals) - 1
    assert f"1 more, up to {layer.spectrum.sv_max:.3g}" in texts(figure)
    x, law = curve(ax, "Marchenko-Pastur")
    width = ax.patches[0].get_width()
    area = float(((law[1:] + law[:-1]) / 2 * np.diff(x)).sum()) / width
    assert area == pytest.approx(len(layer.spectrum.evals) - 1, rel=0.01)
    inner = [(b.get_x() + width / 2, b.get_height()) for b in ax.patches]
    gaps = [h - np.interp(c, x, law, left=0, right=0) for c, h in inner]
    assert np.abs(gaps).sum() < 0.3 * area


def test_spikes_near_the_bulk_are_marked(layer):
    ax = axes(plots.mp_fit(layer))
    x, _ = curve(ax, "spikes")
    values = np.sqrt(layer.spectrum.evals)
    assert (
        x.tolist()
        == values[(values > math.sqrt(layer.mp.threshold)) & (values <= ax.get_xlim()[1])].tolist()
    )


def test_randomized_esd(layer):
    figure = plots.randomized_esd(layer)
    ax = axes(figure)
    lines_are(ax, red=layer.traps.mp.threshold)
    own = [bar.get_height() for bar in ax.patches if hasattr(bar, "get_height")]
    assert sum(own) == len(layer.spectrum.positive)
    x, _ = curve(ax, "traps")
    assert len(x) == layer.traps.num_traps > 0
    assert min(x) > layer.traps.mp.threshold
    assert "entry (3, 5) = 80" in texts(figure)
    assert f"traps: {layer.traps.num_traps} " in texts(figure)


def test_many_causes_are_counted(layer):
    figure = plots.randomized_esd(replace(layer, trap_causes=layer.trap_causes[:1] * 40))
    assert "and 37 more" in " ".join(texts(figure).split())
    assert "causes" not in texts(plots.randomized_esd(replace(layer, trap_causes=())))


def test_what_was_not_measured_says_how_to():
    layer = one(gaussian(40, 30))
    with pytest.raises(ValueError, match=r"measure\(..., randomize=True\)"):
        plots.randomized_esd(layer)
    with pytest.raises(ValueError, match=r"measure\(..., vectors=True\)"):
        plots.vector_metrics(layer)
    with pytest.raises(ValueError, match=r"measure\(..., randomize=True\)"):
        plots.alpha_vs_rand_distance(measure(gaussian(40, 30)))


# ERG, spacings, vectors


def test_detX(layer):
    ax = axes(plots.detX(layer))
    lines_are(ax, red=layer.fit.num_pl_spikes, purple=layer.erg.detX_num)
    (line,) = [line for line in ax.lines if line.get_marker() == "."]
    k, log_det = line.get_data()
    logs = np.log(layer.spectrum.evals / layer.spectrum.evals.mean())[::-1]
    assert log_det == pytest.approx([math.fsum(logs[:n]) for n in k])
    assert log_det[layer.erg.detX_num - 1] < 0 <= log_det[layer.erg.detX_num - 2]
    assert log_det[layer.fit.num_pl_spikes - 1] == pytest.approx(layer.erg.trace_log)


def test_detX_counts_eigenvalues_that_a_fit_left_out():
    layer = one(heavy(200, 100), fit=PowerLaw(drop_top=5))
    red = vertical_lines(axes(plots.detX(layer)))[RED.lower()]
    assert red == layer.fit.num_pl_spikes + 5
    assert layer.erg.detX_num - red == layer.erg.ERG_gap


def cumulative(values, s):
    return np.searchsorted(np.sort(values), s) / len(values)


@pytest.mark.parametrize("shape", [(500, 400), (400, 400)])
def test_spacings_of_noise_follow_the_wigner_surmise(shape):
    spacings = unfolded_spacings(one(gaussian(*shape)).spectrum.positive)
    s = np.linspace(0, 4, 100)
    assert spacings.mean() == pytest.approx(1, abs=0.02)
    found = cumulative(spacings, s)
    assert np.abs(found - (1 - np.exp(-np.pi * s**2 / 4))).max() < 0.06
    assert np.abs(found - (1 - np.exp(-s))).max() > 0.15


def test_spacings_of_independent_levels_are_poisson():
    levels = np.sort(np.random.default_rng(0).uniform(1, 5, 2000))
    spacings = unfolded_spacings(levels)
    s = np.linspace(0, 4, 100)
    assert np.abs(cumulative(spacings, s) - (1 - np.exp(-s))).max() < 0.04
    assert unfolded_spacings(7.0 * levels) == pytest.approx(spacings)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_few_spacings(n):
    assert len(unfolded_spacings(np.arange(1.0, n + 1))) == n - 1


def test_level_spacings():
    figure = plots.level_spacings(one(gaussian(500, 400)))
    ax = axes(figure)
    assert heights(ax).sum() * ax.patches[0].get_width() == pytest.approx(1)
    s, wigner = curve(ax, "random matrix (Wigner)")
    assert float(wigner.sum()) * s[1] == pytest.approx(1, abs=1e-3)
    ratio = re.search(r"spacings (.*) \(random matrix 0.53", texts(figure))
    assert float(ratio[1]) == pytest.approx(0.53, abs=0.03)


def test_vector_metrics_of_noise_are_one_and_a_localised_vector_stands_out():
    weights = gaussian(400, 300)
    weights[:, 7] *= 20
    layer = full(weights)
    ax = axes(plots.vector_metrics(layer))
    clouds = [line for line in ax.lines if line.get_marker() == "."]
    assert len(clouds) == 4
    for cloud in clouds:
        x, y = cloud.get_data()
        assert x.tolist() == layer.localization.evals.tolist()
        assert np.median(y) == pytest.approx(1, abs=0.05)
    assert [float(cloud.get_ydata()[-1]) < 0.5 for cloud in clouds] == [True] * 4


# Whole models


def test_alpha_histogram(report):
    few = with_alphas(report, 2.5, 3.0, 3.2, None, 40.0)
    figure = plots.alpha_histogram(few)
    ax = axes(figure)
    assert heights(ax)[1:].sum() == 4  # the first patch is the safe zone
    zone = ax.patches[0].get_window_extent().transformed(ax.transData.inverted())
    assert (zone.x0, zone.x1) == pytest.approx((2, 6))
    assert ax.get_xlim() == (1, 7)
    assert "1 beyond" in texts(figure)
    assert "mean 12.18" in texts(figure)
    assert "1 without a power law" in texts(figure)
    plain = axes(plots.alpha_histogram(with_alphas(report, 2.5, 3.5)))
    assert vertical_lines(plain)["#222222"] == 3.0


def test_correlation_flow(report):
    figure = plots.correlation_flow(with_alphas(report, 2.5, 3.0, 3.2, None, 40.0))
    ax = axes(figure)
    found, triangles = points(ax)
    assert triangles == 1
    assert sorted(map(tuple, found.tolist())) == [(0, 2.5), (1, 3.0), (2, 3.2), (4, 7.0)]
    assert "40" in texts(figure)
    x, _ = curve(ax, "no power law")
    assert x.tolist() == [3]
    assert [t.get_text() for t in ax.get_xticklabels()] == [f"{i}.fc" for i in range(5)]


def test_types_of_layers_differ_in_colour_and_marker(report):
    ax = axes(plots.correlation_flow(report))
    handles, labels = ax.get_legend_handles_labels()
    assert labels[:3] == ["conv2d", "embedding", "dense"]
    assert len({(h.get_color(), h.get_marker()) for h in handles[:3]}) == 3


def test_layers_are_coloured_by_any_group(report):
    names = [f"h.{i}.{kind}" for i in range(3) for kind in ("q_proj", "k_proj", "dense")]
    layers = [replace(report.layers[-1], name=name) for name in names]
    figure = plots.correlation_flow(
        Report(tuple(layers), ()), group=lambda layer: layer.name.rpartition(".")[-1]
    )
    handles, labels = axes(figure).get_legend_handles_labels()
    assert labels == ["q_proj", "k_proj", "dense"]
    assert len({(h.get_color(), h.get_marker()) for h in handles}) == 3
    assert handles[2].get_color() == "#0072B2"
    assert len(points(axes(figure))[0]) == 9
    many = Report(tuple(replace(layers[0], name=str(i)) for i in range(12)), ())
    _, labels = axes(
        plots.correlation_flow(many, group=lambda x: x.name)
    ).get_legend_handles_labels()
    assert labels == list(map(str, range(12)))


@pytest.mark.parametrize("count", [1, 3, 40, 300])
@pytest.mark.parametrize("figure", REPORT_FIGURES)
def test_models_of_any_size(report, figure, count):
    rng = np.random.default_rng(0)
    ax = axes(figure(with_alphas(report, *(1.5 + rng.gamma(2.0, 1.5, count)))))
    if figure is plots.alpha_histogram:
        assert heights(ax)[1:].sum() == count
    else:
        assert len(points(ax)[0]) == count


def test_alpha_vs_alpha(report):
    base = with_alphas(report, 2.5, 3.0, 3.5, None, 40.0)
    tuned = Report((*with_alphas(report, 2.0, 3.5, 3.4, 2.0, 4.0).layers, *report.layers), ())
    figure = plots.alpha_vs_alpha(base, tuned)
    ax = axes(figure)
    found, triangles = points(ax)
    assert sorted(map(tuple, found.tolist()))[:3] == [(2.5, 2.0), (3.0, 3.5), (3.5, 3.4)]
    assert triangles == 1
    assert "4 layers, alpha fell in 3 and rose in 1" in texts(figure)
    assert "blocks.4.fc, 40.00 to 4.00" in texts(figure)
    (diagonal,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert ax.get_xlim() == ax.get_ylim()


def test_alpha_vs_rand_distance(report):
    found, _ = points(axes(plots.alpha_vs_rand_distance(report)))
    expected = sorted((x.rand_distance, x.alpha) for x in report)
    assert np.array(sorted(found.tolist())) == pytest.approx(np.array(expected))


def test_compare_models(report):
    models = {"first": with_alphas(report, 2.0, 3.0, 5.0), "second": with_alphas(report, None)}
    figure = plots.compare_models(models)
    ax = axes(figure)
    rows = [t.get_text() for t in ax.get_yticklabels()]
    assert rows == ["first\nmedian 3.00", "second\nno layer with a power law"]
    box = ax.patches[-1]
    assert (box.get_x(), box.get_x() + box.get_width()) == (2.5, 4.0)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top


def test_compare_models_needs_models():
    with pytest.raises(ValueError, match="expected models"):
        plots.compare_models({})


# Training


def test_heat_map():
    figure = plots.heat_map(history_of([2.0, 3.0, 4.0], [None, 5.0, 1.5]))
    ax = axes(figure)
    (image,) = ax.images
    expected = np.array([[2.0, 3.0, 4.0], [math.nan, 5.0, 1.5]])
    assert np.array_equal(image.get_array().filled(np.nan), expected, equal_nan=True)
    assert image.norm(2.0) == 0.5
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.fc", "1.fc"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1", "2"]
    missing = image.cmap(np.ma.masked_invalid([math.nan]))
    assert to_hex(missing[0]) == "#bbbbbb"


@pytest.mark.parametrize("count", [3, 40, 300])
def test_labels_of_a_heat_map_do_not_overlap(count):
    curves = [[3.0 + 0.01 * i, 2.0] for i in range(count)]
    ax = draw(plots.heat_map(history_of(*curves))).axes[0]
    boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
    tops = sorted((box.y0, box.y1) for box in boxes)
    assert all(low[1] <= high[0] + 1 for low, high in itertools.pairwise(tops))
    assert len(boxes) == count if count <= 40 else 30 <= len(boxes) < 100
    assert all(box.x0 >= 0 for box in boxes)


@pytest.mark.parametrize("figure", HISTORY_FIGURES)
def test_layers_keep_their_order_if_some_are_measured_late(figure):
    history = [{"epoch": 0.0, "ww_alpha/c": 3.0}, {"epoch": 1.0, "ww_alpha/b": 2.0}]
    history.append({"epoch": 2.0} | {f"ww_alpha/{name}": 3.0 for name in "abc"})
    ax = axes(figure(history))
    labels = ax.get_yticklabels() if figure is plots.heat_map else ax.get_legend().get_texts()
    assert [text.get_text() for text in labels] == ["a", "b", "c"]


def test_heat_map_of_another_metric():
    history = [{"epoch": 1.0, "ww_erg_gap/fc": -7.0}, {"epoch": 2.0, "ww_erg_gap/fc": 3.0}]
    (image,) = axes(plots.heat_map(history, "erg_gap")).images
    assert image.get_array().tolist() == [[-7.0, 3.0]]
    assert image.norm(0.0) == 0.5
    with pytest.raises(ValueError, match=r"no ww_alfa/<layer> .*alpha, erg_gap"):
        plots.heat_map(history, "alfa")


def test_training_curves():
    history = history_of([2.0, 3.0, 4.0], [None, 5.0, 2.5])
    history.insert(1, {"epoch": 0.5, "ww/distance_mean": 1.0})  # an epoch that was not measured
    ax = axes(plots.training_curves(history))
    x, y = curve(ax, "1.fc")
    assert list(zip(x, y, strict=True)) == [(1, 5.0), (2, 2.5)]


def test_many_training_curves_are_bands():
    alphas = 2 + 4 * np.random.default_rng(0).random((41, 5))
    ax = axes(plots.training_curves(history_of(*alphas.tolist())))
    _, median = curve(ax, "median")
    assert median == pytest.approx(np.median(alphas, axis=0))
    assert len(ax.lines) == 2  # and the line at 2
    assert len(ax.collections) == 2


@pytest.mark.parametrize("figure", HISTORY_FIGURES)
def test_records_need_an_epoch(figure):
    with pytest.raises(ValueError, match='records with "epoch"'):
        figure([{"ww_alpha/fc": 3.0}])


def test_bands_take_the_latest_alpha_of_layers_that_were_not_measured():
    curves = [[2.0 + i, None, None] for i in range(20)] + [[None, None, 3.0]]
    (x, median) = curve(axes(plots.training_curves(history_of(*curves))), "median")
    assert x.tolist() == [0, 2]
    assert median.tolist() == [11.5, 11.0]


# What there is nothing to draw of, and what is strange


@pytest.mark.parametrize("figure", REPORT_FIGURES)
@pytest.mark.parametrize("alphas", [(), (None,), (math.nan, None)])
def test_nothing_to_draw_is_said(report, figure, alphas):
    drawn = sketch(figure(with_alphas(report, *alphas)))
    assert "no layer with a power law" in texts(drawn)


def test_nothing_to_compare_is_said(report):
    empty, some = Report((), ()), with_alphas(report, 3.0)
    for drawn in (
        plots.alpha_vs_alpha(empty, empty),
        plots.alpha_vs_alpha(some, report),
        plots.compare_models({"a": empty}),
        plots.heat_map([]),
        plots.heat_map([{"epoch": 0.0, "ww_traps/fc": 1.0}]),
        plots.training_curves([]),
        plots.training_curves(history_of([math.nan, math.nan])),
    ):
        assert "no layer with a power law" in texts(sketch(drawn))


@pytest.mark.parametrize("alphas", [(math.inf, 3.0), (1e300, 3.0), (1e300,), (-1e9, 0.3, 2.5)])
@pytest.mark.parametrize("figure", REPORT_FIGURES)
def test_absurd_alphas(report, figure, alphas):
    ax = axes(figure(with_alphas(report, *alphas)))
    shown = ax.get_xlim() if figure is plots.alpha_histogram else ax.get_ylim()
    assert -110 < shown[0] < shown[1] < 110
    if figure is not plots.alpha_histogram:
        assert points(ax)[1] == sum(not 0 <= a <= 100 for a in alphas)


@pytest.mark.parametrize("value", [math.inf, 1e300, -1e300])
@pytest.mark.parametrize("figure", HISTORY_FIGURES)
def test_absurd_histories(figure, value):
    draw(figure(history_of([3.0, value, 2.0], [2.0, 2.5, math.nan])))
    assert sketch(figure(history_of([value]))).axes


STRANGE = {
    "orthogonal": orthogonal(30),
    "rank one": gaussian(40, 1) @ gaussian(1, 30),
    "one eigenvalue": gaussian(40, 1),
    "two eigenvalues": gaussian(40, 2),
    "nine eigenvalues": gaussian(40, 9),
    "tiny": 1e-12 * gaussian(40, 30, dtype=torch.float64),
    "tiniest": 1e-150 * gaussian(40, 30, dtype=torch.float64),
    "huge": 1e150 * gaussian(40, 30, dtype=torch.float64),
    "one large entry": gaussian(60, 40) + 1e6 * torch.eye(60, 40) * (torch.arange(40) == 3),
    "constant": torch.ones(30, 20),
    "bfloat16": gaussian(64, 48).bfloat16(),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_layers(kind):
    layer = full(STRANGE[kind])
    for figure in LAYER_FIGURES:
        assert texts(sketch(figure(layer)))


def test_a_layer_without_a_power_law_says_so():
    layer = full(orthogonal(30))
    assert layer.fit is None
    assert "no power law" in texts(plots.esd(layer))
    assert "no power law" in texts(plots.xmin_scan(layer))
    assert "no ERG tail" in texts(plots.detX(layer))
    assert "too few different eigenvalues" in texts(plots.level_spacings(layer))


def test_inverse_and_pooled_spectra():
    convolution = {"conv.weight": gaussian(16 * 12, 9).reshape(16, 12, 3, 3)}
    (pooled,) = measure(convolution, randomize=True, vectors=True)
    (inverse,) = measure(gaussian(50, 40), inverse=True)
    for figure in LAYER_FIGURES:
        assert texts(sketch(figure(pooled)))
        if figure not in (plots.randomized_esd, plots.vector_metrics):
            assert texts(sketch(figure(inverse)))


NAMES = ["_orig", "a$b$c_{", "层.重", "line\nbreak", "x" * 400, "", "$", "\\frac", "%s {x}"]
NAMES += ["nul\0", "\x1b[31mred", "\x7f\x9b", "\ud800"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_kind(layer, report, name):
    sketch(plots.esd(replace(layer, name=name)))
    named = Report(tuple(replace(x, name=f"{name}{i}") for i, x in enumerate(report)), ())
    sketch(plots.correlation_flow(named))
    sketch(plots.compare_models({name: report}))
    sketch(plots.alpha_vs_alpha(named, named))
    history = [{"epoch": 0.0, f"ww_alpha/{name}": 3.0}]
    sketch(plots.heat_map(history))
    ax = axes(plots.training_curves(history))
    assert len(ax.get_legend().get_texts()) == 1


def test_labels():
    assert label("short") == "short"
    assert label("abcdefghij", 7) == "abc…hij"
    assert len(label("x" * 100, 28)) == 28
    assert label("a\0b\x1b[1m\x7f") == r"a\x00b\x1b[1m\x7f"
    assert label("a\tb\né层") == r"a b \xe9\u5c42"
    assert short_labels(["model.a.x", "model.b.x"], 20) == ["a.x", "b.x"]
    assert short_labels(["model.layer", "model.layer2"], 20) == ["layer", "layer2"]
    assert short_labels(["a.b", "a.b"], 20) == ["b", "b"]
    assert short_labels(["a", "a.b"], 20) == ["a", "a.b"]
    assert short_labels(["a.b.c"], 20) == ["c"]
    assert short_labels([], 20) == []


def test_every_nth():
    assert every_nth(5, 10.0) == [0, 1, 2, 3, 4]
    assert every_nth(300, 1.0, size=7.2) == list(range(0, 300, 38))
    assert every_nth(0, 1.0) == []
    assert every_nth(3, 0.0) == [0]


def test_alpha_range():
    assert alpha_range([]) == (1, 7)
    assert alpha_range([2.5, 3.0, 3.2, 40.0]) == (1, 7)
    assert alpha_range([10.0, 20.0, 30.0, 40.0])[1] >= 40
    assert alpha_range([40.0])[1] == 40.5
    assert alpha_range([1e300, math.inf]) == (1, 100)


# Figures and nothing else


def every_figure(layer, report, **options):
    history = history_of([3.0, 2.0], [4.0, 3.0])
    yield from (figure(layer, **options) for figure in LAYER_FIGURES)
    yield from (figure(report, **options) for figure in REPORT_FIGURES)
    yield from (figure(history, **options) for figure in HISTORY_FIGURES)
    yield plots.alpha_vs_alpha(report, report, **options)
    yield plots.compare_models({"model": report}, **options)


def test_every_public_figure_is_tested_here(layer, report):
    assert len(list(every_figure(layer, report))) == len(plots.__all__)
    for name in plots.__all__:
        function = getattr(plots, name)
        assert function.__doc__
        assert inspect.signature(function).parameters["ax"].kind == inspect.Parameter.KEYWORD_ONLY


def test_figures_have_a_canvas_and_a_white_background(layer, report):
    with matplotlib.rc_context():
        matplotlib.rcParams.update(
            {"figure.facecolor": "black", "axes.facecolor": "black", "text.color": "white"}
            | {"axes.labelcolor": "white", "xtick.color": "white", "legend.labelcolor": "white"}
        )
        before = dict(matplotlib.rcParams)
        figures = list(every_figure(layer, report))
        assert dict(matplotlib.rcParams) == before
        for figure in figures:
            assert isinstance(figure, Figure)
            assert isinstance(figure.canvas, FigureCanvasAgg)
            sketch(figure)
            assert to_hex(figure.get_facecolor()) == "#ffffff"
            for text in figure.findobj(matplotlib.text.Text):
                assert sum(matplotlib.colors.to_rgb(text.get_color())) < 1.5 or not text.get_text()


def test_nothing_is_cut_off(layer, report):
    name = "transformer.encoder.layers.{}.self_attention.output_projection"
    layer = replace(layer, name=name.format(0))
    layers = (replace(x, name=name.format(i)) for i, x in enumerate(report))
    report = Report(tuple(layers), ())
    for figure in every_figure(layer, report):
        draw(figure)
        box = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert box.x0 >= -0.02
        assert box.y0 >= -0.02
        assert box.x1 <= width + 0.02
        assert box.y1 <= height + 0.02


def test_figures_draw_into_given_axes(layer, report):
    figure = Figure(figsize=(24, 18), layout="constrained")
    FigureCanvasAgg(figure)
    grid = iter(figure.subplots(4, 4).flat)
    functions = (*LAYER_FIGURES, *REPORT_FIGURES, *HISTORY_FIGURES)
    arguments = [layer] * 9 + [report] * 3 + [history_of([3.0, 2.0])] * 2
    for function, argument in zip(functions, arguments, strict=True):
        ax = next(grid)
        assert function(argument, ax=ax) is figure
        assert ax.get_title(loc="left")
    draw(figure)


def test_figures_draw_into_subfigures(layer):
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2)
    assert plots.esd(layer, ax=left.subplots()) is figure
    assert plots.xmin_scan(layer, ax=right.subplots()) is figure
    draw(figure)


def test_the_layer_is_not_changed(layer):
    evals = layer.spectrum.evals.copy()
    state = torch.get_rng_state()
    for figure in LAYER_FIGURES:
        figure(layer)
    assert np.array_equal(layer.spectrum.evals, evals)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_report_gives_the_same_picture(layer, report, tmp_path):
    for figure in (plots.vector_metrics, plots.esd):
        first, second = (np.asarray(sketch(figure(layer)).canvas.buffer_rgba()) for _ in range(2))
        assert np.array_equal(first, second)


def python(code):
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_pyplot_is_neither_imported_nor_used():
    out = python(
        "import sys, torch\n"
        "from ww_train import measure, plots\n"
        "report = measure(torch.randn(40, 30), randomize=True)\n"
        "figures = [plots.esd(report.layers[0]), plots.correlation_flow(report)]\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
        "import matplotlib.pyplot\n"
        "print(matplotlib.pyplot.get_fignums())\n"
    )
    assert out.split() == ["False", "[]"]


def test_without_matplotlib_the_import_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **options)

    for module in [m for m in sys.modules if m.startswith("ww_train.") and "plot" in m]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ww-train\[plots\]'"):
        real("ww_train.plots")


@pytest.mark.parametrize(
    "figure", [plots.esd, plots.esd_linear, plots.esd_semilog, plots.xmin_scan]
)
def test_a_fit_of_ones_own_can_have_any_xmin(figure):
    fit = PowerLawFit(alpha=3.0, xmin=1.0, xmax=9.0, D=0.1, sigma=0.1, num_pl_spikes=5)
    layer = one(gaussian(50, 40), fit=lambda evals: fit)
    lines_are(axes(figure(layer)), red=1.0)


def test_the_gallery_shows_every_figure_and_its_lines_run(layer, report):
    text = (ROOT / "examples" / "figures.md").read_text(encoding="utf-8")
    shown = re.findall(r"results/figures/(\w+)\.png", text)
    assert sorted(shown) == plots.__all__
    for name in shown:
        assert (ROOT / "examples" / "results" / "figures" / f"{name}.png").stat().st_size < 60_000
    names = {"plots": plots, "layer": layer, "report": report, "base": report}
    names |= {"finetuned": report, "history": history_of([3.0, 2.0])}
    lines = re.findall(r"```python\n(plots\..*)\n```", text)
    assert [line.partition("(")[0] for line in lines] == [f"plots.{name}" for name in shown]
    for line in lines:
        assert isinstance(eval(line, names), Figure)
