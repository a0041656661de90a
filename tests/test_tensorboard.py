import gc
import io
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("tensorboard")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter

from ww_train import Report, Skipped, measure
from ww_train.callbacks.layouts import bands, kinds, layout
from ww_train.callbacks.monitor import SpectralMonitor
from ww_train.callbacks.panel import panel
from ww_train.callbacks.tensorboard import Board, power_of_two
from ww_train.report import worst_first

from .training import collect

ODD = [
    "a/b",
    "conv[3]",
    "Größe.层",
    "<b>x</b>",
    "p|q*r_s_`t`",
    "back\\slash",
    " spaced  out",
    "x" * 300,
]


def mlp(layers=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(24, 24) for _ in range(layers)))


@pytest.fixture(scope="module")
def measured():
    """Eight real layers, with traps counted."""
    return measure(mlp(8), randomize=True).layers


@pytest.fixture
def model_of(measured):
    """A report of as many layers as there are names."""

    def make(names):
        layers = [
            replace(measured[i % len(measured)], name=name, layer_id=i)
            for i, name in enumerate(names)
        ]
        return Report(tuple(layers), ())

    return make


def transformer(layers):
    """Names as of a transformer with four layers a block."""
    parts = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    return [f"model.layers.{i // 4}.{parts[i % 4]}" for i in range(layers)]


def never(count):
    return False


def write(folder, report, epochs=1, due=never, **options):
    """Let a board write some epochs that are all alike."""
    board, history = Board(folder, due=due), []
    for n in range(epochs):
        scalars = report.scalars() | {"ww/seconds": 0.1}
        history.append({"epoch": float(n), "step": 10.0 * n, **scalars})
        board(scalars, 10 * n)
        board.log_report(report, history, n, 10 * n, **options)
    board.close()


def read(folder):
    """Everything that TensorBoard knows of a folder, without leaving anything out."""
    files = [file for _, _, names in os.walk(folder) for file in names]
    assert len(files) == 1, "one run is one event file"
    events = EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    )
    return events.Reload()


def tags(events):
    return set(events.Tags()["scalars"])


def group(events, name):
    return {tag for tag in tags(events) if tag.startswith(f"{name}/")}


def charts(events):
    (event,) = events.Tensors("custom_scalars__config__")
    parsed = Layout.FromString(event.tensor_proto.string_val[0])
    return {category.title: list(category.chart) for category in parsed.category}


def rendered(markdown):
    """The page that TensorBoard makes of a text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what TensorBoard brings along
        from tensorboard.plugin_util import markdown_to_safe_html

    return markdown_to_safe_html(markdown)


def text(event):
    return event.tensor_proto.string_val[0].decode()


def test_a_training_of_three_layers(tmp_path):
    model = mlp()
    board = Board(tmp_path, due=never)
    with SpectralMonitor(model, log_to=board, budget=None, summary=False) as monitor:
        for _ in range(3):
            with torch.no_grad():
                model[0].weight.mul_(1.1)
            monitor.epoch_end()
    events = read(tmp_path)
    for record in monitor.history:
        logged = {
            tag: [point.value for point in events.Scalars(tag) if point.step == record["step"]]
            for tag in tags(events)
        }
        expected = {t: v for t, v in record.items() if t.startswith("ww")}
        shown = {tag: values[0] for tag, values in logged.items() if values}
        assert shown == pytest.approx(expected, rel=1e-6)
    assert [point.step for point in events.Scalars("ww_alpha/0")] == [0, 1, 2, 3]
    assert len(group(events, "ww")) <= 12
    groups = {tag.partition("/")[0] for tag in tags(events)}
    assert groups == {"ww", "ww_alpha", "ww_erg_gap", "ww_trace_log", "ww_traps"}
    assert events.Tags()["histograms"] == []
    titles = {title: [chart.title for chart in row] for title, row in charts(events).items()}
    assert titles == {"ww: layers": ["alpha", "ERG gap", "trace-log", "traps"]}


@pytest.mark.parametrize(
    ("layers", "metrics"),
    [
        (3, {"alpha", "erg_gap", "trace_log", "traps"}),
        (64, {"alpha", "erg_gap", "trace_log", "traps"}),
        (65, {"alpha"}),
        (300, {"alpha"}),
        (1025, set()),
    ],
)
def test_more_layers_get_fewer_charts_each(tmp_path, model_of, layers, metrics):
    names = transformer(layers)
    write(tmp_path, model_of(names))
    events = read(tmp_path)
    of_layers = {tag for tag in tags(events) if tag.partition("/")[2] in names}
    assert of_layers == {f"ww_{metric}/{name}" for metric in metrics for name in names}
    assert len(group(events, "ww")) == 8
    assert bool(group(events, "ww_bands")) == bool(group(events, "ww_kinds")) == (layers > 12)
    assert events.Tags()["histograms"] == (["ww_hist/alpha"] if layers > 12 else [])
    assert len(tags(events)) < max(4 * layers, 40) + 40


def test_a_layer_that_is_measured_alone_is_one_of_many(tmp_path, model_of):
    names = transformer(65)
    board, report = Board(tmp_path), model_of(names)
    board(report.scalars(), 0)
    board({f"ww_{metric}/{names[0]}": 1.0 for metric in ("alpha", "traps", "distance")}, 1)
    board.close()
    events = read(tmp_path)
    assert [point.step for point in events.Scalars(f"ww_alpha/{names[0]}")] == [0, 1]
    assert group(events, "ww_traps") == group(events, "ww_distance") == set()


@pytest.mark.parametrize("layers", [3, 12, 13, 65, 300])
def test_every_chart_of_the_layout_has_numbers(tmp_path, model_of, layers):
    write(tmp_path, model_of(transformer(layers)), epochs=2)
    events = read(tmp_path)
    shown = [chart for row in charts(events).values() for chart in row]
    for chart in shown:
        for regex in chart.multiline.tag:
            assert len([tag for tag in tags(events) if re.match(regex, tag)]) == layers
        for series in chart.margin.series:
            low, median, high = (
                events.Scalars(tag)[-1].value for tag in (series.lower, series.value, series.upper)
            )
            assert low <= median <= high
    assert len(shown) == (4 if layers <= 12 else 7)


def test_a_layout_has_no_chart_for_what_is_not_measured():
    assert layout(["fc1"], {"alpha", "distance"}) == {
        "ww: layers": {
            "alpha": ["Multiline", ["ww_alpha/"]],
            "distance to criticality": ["Multiline", ["ww_distance/"]],
        }
    }


def test_bands_are_quantiles_over_the_layers(model_of):
    report = model_of(transformer(40))
    numbers = bands(report)
    for metric, values in {
        "alpha": [layer.alpha for layer in report],
        "erg_gap": [layer.ERG_gap for layer in report],
        "trace_log": [layer.trace_log for layer in report],
    }.items():
        for name, percent in (("p10", 10), ("median", 50), ("p90", 90)):
            expected = np.percentile(values, percent)
            assert numbers.pop(f"ww_bands/{metric}_{name}") == pytest.approx(expected)
    ups = [layer.alpha for layer in report if layer.name.endswith("up_proj")]
    assert numbers.pop("ww_kinds/up_proj_median") == pytest.approx(np.median(ups))
    assert len(numbers) == 3 * 4 - 1
    assert {type(value) for value in numbers.values()} == {float}


def test_bands_leave_out_layers_without_a_power_law(model_of):
    report = model_of(transformer(40))
    lame = Report((replace(report.layers[0], fit=None), *report.layers[1:]), ())
    alphas = [layer.alpha for layer in lame if layer.alpha is not None]
    assert len(alphas) == 39
    assert bands(lame)["ww_bands/alpha_median"] == pytest.approx(np.median(alphas))
    none = Report(tuple(replace(layer, fit=None) for layer in report), ())
    assert not [tag for tag in bands(none) if "alpha" in tag or "kinds" in tag]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["fc1", "fc2", "fc3"], {}),
        (["0", "2", "4"], {}),
        (["a.0", "b.0", "a.1", "b.1"], {"a": [0, 2], "b": [1, 3]}),
        (["h.0.c_attn[0]", "h.0.c_attn[1]", "0", "1"], {"c_attn": [0, 1], "numbered": [2, 3]}),
        (["x.q", "y.q", "x.k", "y.k", "head"], {"q": [0, 1], "k": [2, 3]}),
        (
            [f"{part}{i}" for part in ("conv", "fc") for i in range(7)],
            {"conv": list(range(7)), "fc": list(range(7, 14))},
        ),
        (["q_proj", "k_proj", "q_proj", "k_proj"], {"q_proj": [0, 2], "k_proj": [1, 3]}),
    ],
)
def test_kinds(names, expected):
    assert kinds(names) == expected


def test_kinds_are_few_and_the_most_frequent():
    names = [f"{kind}.{i}" for kind in "abcdefghijklmnop" for i in range(3)] + ["p.3"] * 5
    assert len(kinds(names)) == 12
    assert len(kinds(names)["p"]) == 8


def test_the_histogram_counts_every_alpha_once(tmp_path, model_of):
    report = model_of(transformer(40))
    far = replace(report.layers[0].fit, alpha=500.0)
    report = Report((replace(report.layers[0], fit=far), *report.layers[1:]), ())
    write(tmp_path, report)
    (event,) = read(tmp_path).Histograms("ww_hist/alpha")
    counts = np.asarray(event.histogram_value.bucket)
    assert counts.sum() == 40
    near = sum(3.0 <= min(layer.alpha, 12.0) < 4.0 for layer in report)
    edges = np.asarray(event.histogram_value.bucket_limit)
    assert counts[(edges > 3.0) & (edges <= 4.0)].sum() == near
    assert event.histogram_value.max == 12.0


def test_figures_are_images_and_drawn_when_due(tmp_path, model_of):
    write(tmp_path, model_of(["fc1", "fc2"]), epochs=5, due=power_of_two)
    events = read(tmp_path)
    names = {"alpha_histogram", "correlation_flow", "heat_map"}
    expected = {f"ww_figures/{x}" for x in names} | {"ww_spectra/worst_1", "ww_spectra/worst_2"}
    assert set(events.Tags()["images"]) == expected
    for tag in expected:
        shown = events.Images(tag)
        assert [image.step for image in shown] == [0, 10, 30]  # the first, second and fourth
        picture = np.asarray(Image.open(io.BytesIO(shown[-1].encoded_image_string)).convert("L"))
        assert picture.shape == (shown[-1].height, shown[-1].width)
        assert picture.std() > 10  # not blank
        assert len(shown[-1].encoded_image_string) < 120_000


def test_powers_of_two():
    assert [count for count in range(70) if power_of_two(count)] == [1, 2, 4, 8, 16, 32, 64]


def test_the_last_report_is_drawn_once_whatever_it_costs(tmp_path, model_of):
    report = model_of(transformer(13))
    board, history = Board(tmp_path), [{"epoch": 0.0}] * 4
    history[-1] = {"epoch": 3.0, **report.scalars()}
    board.log_report(report, history, 3, 30, seconds=0.0)
    board.log_report(report, history, 3, 30, seconds=0.0, last=True)
    board.log_report(report, history, 3, 30, seconds=0.0, last=True)
    board.close()
    events = read(tmp_path)
    assert [image.step for image in events.Images("ww_figures/heat_map")] == [30]
    assert len(events.Tensors("ww/summary/text_summary")) == 1
    assert len(events.Scalars("ww_bands/alpha_p10")) == 1


def test_figures_wait_until_they_can_be_afforded(tmp_path, model_of):
    ticks = iter(range(100))  # a second between any two looks at the clock
    board = Board(tmp_path, clock=lambda: float(next(ticks)))
    report, history = model_of(["fc1"]), []
    for n, seconds in enumerate([0.5, 3.9, 4.0, 4.0, 1.9, 2.0]):
        history.append({"epoch": float(n), "ww_alpha/fc1": 2.0})
        board.log_report(report, history, n, n, seconds=seconds)
    board.close()
    events = read(tmp_path)
    # due at 0, 1, 3; two seconds are expected at first, then the one that they took
    assert [image.step for image in events.Images("ww_figures/heat_map")] == [2, 3]
    assert [event.step for event in events.Tensors("ww/summary/text_summary")] == [0, 1, 3]


def test_chosen_layers_are_drawn_instead_of_the_worst(tmp_path, model_of):
    report = model_of(["fc1", "fc2", "fc3"])
    board = Board(tmp_path, layers=["fc3"])
    board.log_report(report, [{"epoch": 0.0, **report.scalars()}], 0, 0)
    board.close()
    spectra = [t for t in read(tmp_path).Tags()["images"] if t.startswith("ww_spectra/")]
    assert spectra == ["ww_spectra/fc3"]


def test_a_chosen_layer_that_is_not_there_warns_once_and_the_rest_is_drawn(tmp_path, model_of):
    report, board = model_of(["fc1"]), Board(tmp_path, layers=["fc9", "fc8"])
    history = [{"epoch": 0.0, **report.scalars()}]
    given, _ = collect(lambda: board.log_report(report, history, 0, 0))
    again, _ = collect(lambda: board.log_report(report, history * 2, 1, 1, last=True))
    board.close()
    assert len(given) == 1
    assert "fc9" in given[0]
    assert again == []
    assert "ww_figures/heat_map" in read(tmp_path).Tags()["images"]


def test_figures_do_not_pile_up(tmp_path, model_of):
    def open_figures():
        gc.collect()
        return sum(type(thing) is Figure for thing in gc.get_objects())

    before = open_figures()
    write(tmp_path, model_of(["fc1", "fc2"]), due=power_of_two)
    assert open_figures() == before


def test_the_text_is_a_table_of_the_worst_layers(tmp_path, model_of):
    report = model_of(transformer(40))
    write(
        tmp_path, report, seconds=0.0, due=power_of_two, settings={"budget": 0.01, "layers": None}
    )
    (event,) = read(tmp_path).Tensors("ww/summary/text_summary")
    page = rendered(text(event))
    assert report.verdict in page
    assert page.count("<table>") == 2
    rows = [re.findall("<td>(.*?)</td>", row, re.S) for row in page.split("<tr>")]
    rows = [row for row in rows if len(row) == 5]
    assert [row[0] for row in rows] == [layer.name for layer in worst_first(report)[:20]]
    assert rows[0][1] == f"{report[rows[0][0]].alpha:.2f}"
    assert "and 20 more" in page
    assert "<td>budget</td>\n<td>0.01</td>" in page
    worst = worst_first(report)[0]
    assert worst.advice in page


def test_worst_first():
    def read_as(alpha, traps, word):
        return type("Layer", (), {"alpha": alpha, "num_traps": traps, "verdict": word})

    layers = [
        read_as(2.0, 0, "critical"),
        read_as(3.0, 0, "well-trained"),
        read_as(5.0, None, "well-trained"),
        read_as(None, None, "malformed"),
        read_as(9.0, 0, "under-trained"),
        read_as(3.0, 1, "trapped"),
        read_as(2.5, 4, "trapped"),
        read_as(1.2, 0, "over-trained"),
        read_as(1.8, 0, "over-trained"),
    ]
    assert [layers.index(layer) for layer in worst_first(layers)] == [6, 5, 7, 8, 4, 3, 2, 1, 0]


def test_layer_names_may_be_odd(tmp_path, model_of):
    report = model_of(ODD)
    write(tmp_path, report, epochs=2)
    events = read(tmp_path)
    assert group(events, "ww_alpha") == {f"ww_alpha/{name}" for name in ODD}
    page = rendered(panel(report, epoch=1, step=10))
    cells = re.findall("<td>(.*?)</td>", page, re.S)[::5]
    shown = [" ".join(name.split()) for name in ODD]
    plain = [cell.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for cell in cells]
    assert sorted(plain) == sorted(shown)
    assert page.count("<tr>") == 1 + len(ODD)


def test_skipped_layers_are_told(model_of):
    report = replace(model_of(["fc1"]), skipped=(Skipped("fc2", "it holds NaN"),))
    assert "fc2, it holds NaN" in rendered(panel(report, epoch=1, step=1))


def test_without_layers_or_power_laws(tmp_path, model_of):
    report = model_of(transformer(20))
    lame = Report(tuple(replace(layer, fit=None) for layer in report), ())
    board = Board(tmp_path)
    board({}, 0)
    board.log_report(Report((), ()), [{"epoch": 0.0}], 0, 0, last=True)
    board.log_report(lame, [{"epoch": 1.0, **lame.scalars()}], 1, 1, last=True)
    board.close()
    events = read(tmp_path)
    assert events.Tags()["histograms"] == []
    assert "ww_figures/heat_map" in events.Tags()["images"]


def test_a_writer_of_the_user_stays_open(tmp_path, model_of):
    with SummaryWriter(tmp_path) as writer:
        board = Board(writer)
        board(model_of(["fc1"]).scalars(), 0)
        board.close()
        writer.add_scalar("loss", 1.0, 1)
    assert {"loss", "ww_alpha/fc1"} <= tags(read(tmp_path))


def test_nothing_is_written_before_the_first_numbers(tmp_path):
    Board(tmp_path / "run").close()
    assert not (tmp_path / "run").exists()


def watch(log_to):
    """Train with a monitor; the warnings and the history."""
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.01)

    def run():
        with SpectralMonitor(model, opt, log_to=log_to, budget=None, summary=False) as monitor:
            for _ in range(3):
                monitor.epoch_end()
        return monitor.history

    return collect(run)


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    given, history = watch(Board(tmp_path / "file" / "run"))
    assert len(given) == 1
    assert "Board" in given[0]
    assert len(history) >= 1


def test_a_writer_that_was_closed_costs_one_warning(tmp_path):
    writer = SummaryWriter(tmp_path)
    writer.file_writer.event_writer._async_writer.close()
    given, history = watch(Board(writer))
    assert len(given) == 1
    assert "closed" in given[0]
    assert len(history) >= 1


ALONE = """
import sys, warnings
{before}
from torch import nn
from ww_train.callbacks.monitor import SpectralMonitor
from ww_train.callbacks.tensorboard import Board

model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with SpectralMonitor(model, log_to=Board(sys.argv[1]), budget=None, summary=False) as monitor:
        for _ in range(3):
            model[0].weight.data.mul_(1.1)
            monitor.epoch_end()
print([str(w.message) for w in caught if "spectra" in str(w.message) or "figure" in str(w.message)])
print("matplotlib.pyplot" in sys.modules, len(monitor.history))
"""


def alone(folder, before=""):
    """A run in a process of its own; its warnings about logging, and whether pyplot was imported."""
    command = [sys.executable, "-c", ALONE.format(before=before), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    given, pyplot = done.stdout.strip().splitlines()
    return eval(given), pyplot


def test_pyplot_is_not_imported(tmp_path):
    assert alone(tmp_path) == ([], "False 4")
    assert read(tmp_path).Tags()["images"]


def test_without_matplotlib_numbers_arrive_with_one_warning(tmp_path):
    given, _ = alone(tmp_path, "sys.modules['matplotlib'] = None")
    assert len(given) == 1
    assert "pip install 'ww-train[plots]'" in given[0]
    events = read(tmp_path)
    assert len(events.Scalars("ww_alpha/0")) == 4
    assert events.Tags()["images"] == []
    assert events.Tensors("ww/summary/text_summary")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of file sizes")
def test_a_full_disk_costs_one_warning_and_no_run(tmp_path):
    limit = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
    )
    given, pyplot = alone(tmp_path, limit)
    assert len(given) == 1
    assert "File too large" in given[0]
    assert pyplot.endswith("4")


def one_epoch_of_lightning(folder, **options):
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import TensorBoardLogger

    from ww_train.callbacks.lightning import WeightWatcherCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, _):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(
        max_epochs=1,
        logger=TensorBoardLogger(folder, name="", version="", **options),
        callbacks=[WeightWatcherCallback(summary=False)],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    collect(lambda: trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(4, 24))))


def test_a_tensorboard_logger_of_lightning_gets_everything(tmp_path):
    one_epoch_of_lightning(tmp_path)
    (tmp_path / "hparams.yaml").unlink()  # Lightning's own
    events = read(tmp_path)
    assert len(group(events, "ww_alpha")) == 3
    assert [image.step for image in events.Images("ww_figures/heat_map")] == [4]  # at the end
    assert "ww_spectra/worst_3" in events.Tags()["images"]
    assert set(charts(events)) == {"ww: layers"}
    assert "budget" in text(events.Tensors("ww/summary/text_summary")[-1])


def test_a_prefix_of_lightning_is_kept(tmp_path):
    one_epoch_of_lightning(tmp_path, prefix="mine")
    (tmp_path / "hparams.yaml").unlink()
    events = read(tmp_path)
    assert "mine-ww/alpha_mean" in tags(events)
    assert events.Tags()["images"] == []


def test_hugging_faces_tensorboard_gets_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from ww_train.callbacks.huggingface import WeightWatcherCallback

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return {"loss": self.net(x).square().mean()}

    def fit():
        args = transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=1,
            report_to="tensorboard",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        transformers.Trainer(
            Model(),
            args,
            train_dataset=[{"x": torch.ones(24)}] * 8,
            callbacks=[WeightWatcherCallback(summary=False)],
        ).train()

    collect(fit)
    (folder,) = {parent for parent, _, names in os.walk(tmp_path) for n in names if "tfevents" in n}
    events = read(folder)
    assert len(group(events, "ww_alpha")) == 3
    assert events.Images("ww_figures/heat_map")[-1].step == 1
    assert set(charts(events)) == {"ww: layers"}
    assert events.Tensors("ww/summary/text_summary")
