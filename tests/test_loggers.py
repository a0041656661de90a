import csv
import errno
import math
import os
import sys
import warnings

import pytest
from torch import nn

from ww_train import measure
from ww_train.callbacks.loggers import (
    CSVLog,
    LightningLog,
    WandbLog,
    logger_for,
    send,
)
from ww_train.callbacks.monitor import SpectralMonitor
from ww_train.callbacks.tensorboard import Board

from .oracles import gaussian

SCALARS = {"ww/alpha_mean": 2.5, "ww_alpha/fc": 1 / 3}


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def model():
    layer = nn.Linear(24, 32, bias=False)
    layer.weight.data = gaussian(32, 24)
    return nn.Sequential(layer)


def collect(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return [str(w.message) for w in caught], result


def test_a_csv_file_is_appended_to(tmp_path):
    path = tmp_path / "deep" / "log.csv"
    log = logger_for(path)
    assert isinstance(log, CSVLog)
    log(SCALARS, 3)
    logger_for(str(path))(SCALARS, 6)
    assert rows(path) == [
        ["step", "tag", "value"],
        *[[step, tag, repr(value)] for step in ("3", "6") for tag, value in SCALARS.items()],
    ]
    assert float(rows(path)[2][2]) == 1 / 3


@pytest.mark.parametrize("as_path", [False, True])
def test_tensorboard(tmp_path, as_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    target = str(tmp_path) if as_path else tensorboard.SummaryWriter(str(tmp_path))
    log = logger_for(target)
    assert isinstance(log, Board)
    log(SCALARS, 3)
    log(SCALARS, 6)
    written = events(tmp_path)
    assert written.keys() == SCALARS.keys()
    assert [event.step for event in written["ww_alpha/fc"]] == [3, 6]
    assert len(list(tmp_path.iterdir())) == 1
    log.close()
    assert as_path == (log.writer is None)  # a writer of somebody else stays open


def test_a_tensorboard_folder_is_made_at_the_first_numbers(tmp_path):
    log = logger_for(tmp_path / "runs")
    log.close()
    assert not (tmp_path / "runs").exists()


class Run:
    """What is used of a W&B run."""

    def __init__(self):
        self.metrics, self.logged = [], []

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, data):
        self.logged.append(data)


def test_wandb_gets_the_step_as_a_number():
    run = Run()
    log = logger_for(run)
    assert isinstance(log, WandbLog)
    log(SCALARS, 3)
    assert run.metrics == [("ww/step", None), ("ww*", "ww/step")]
    assert run.logged == [{**SCALARS, "ww/step": 3}]


def test_a_logger_of_lightning(tmp_path):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    target = loggers.CSVLogger(tmp_path, name="", version="v")
    log = logger_for(target)
    assert isinstance(log, LightningLog)
    log(SCALARS, 3)
    target.save()
    header, values = rows(tmp_path / "v" / "metrics.csv")
    assert dict(zip(header, values, strict=True))["step"] == "3"
    assert set(header) == {"step", *SCALARS}


def test_a_function_is_a_logger():
    seen = []
    log = logger_for(lambda scalars, step: seen.append((scalars, step)))
    log(SCALARS, 3)
    assert seen == [(SCALARS, 3)]


@pytest.mark.parametrize("target", [None, 3, object()])
def test_what_takes_no_numbers_is_refused(target):
    with pytest.raises(TypeError, match=r"log_to takes a SummaryWriter.* got"):
        logger_for(target)
    with pytest.raises(TypeError, match="log_to takes"):
        SpectralMonitor(log_to=[target])


class Painter:
    """A logger that also draws."""

    def __init__(self):
        self.seen = []

    def __call__(self, scalars, step):
        self.seen.append(("scalars", step))

    def log_report(self, report, history, epoch, step, **_):
        self.seen.append((report, len(history), epoch, step))


def test_a_logger_that_draws_gets_the_report_after_the_numbers():
    board, report = Painter(), measure(model())
    send(board, SCALARS, report, [{}, {}], epoch=2, step=9)
    assert board.seen == [("scalars", 9), (report, 2, 2, 9)]
    send(board, SCALARS, None, [], epoch=2, step=9)
    assert board.seen[2:] == [("scalars", 9)]


def test_the_monitor_serves_several_loggers_and_its_history(tmp_path):
    board, path = Painter(), tmp_path / "log.csv"
    monitor = SpectralMonitor(log_to=[board, path])
    scalars = monitor.boundary(model(), epoch=2, step=20, log_step=7)
    assert board.seen == [("scalars", 7), (monitor.report, 1, 2, 7)]
    assert {row[0] for row in rows(path)[1:]} == {"7"}
    assert {row[1]: float(row[2]) for row in rows(path)[1:]} == scalars
    assert all(math.isfinite(value) for value in scalars.values())


# Loggers that fail: one warning, and the others go on


def check(target, pattern, **also):
    """Three boundaries with a logger that fails: one warning that says why."""
    net, board = model(), Painter()
    monitor = SpectralMonitor(log_to=[target, board])

    def run():
        for step in (1, 2, 3):
            monitor.boundary(net, epoch=step, step=step)

    messages, _ = collect(run)
    (message,) = messages
    assert pattern in message
    assert ".history" in message
    assert [record["step"] for record in monitor.history] == [1.0, 2.0, 3.0]
    assert len(board.seen) == 6


def test_a_full_disk_warns_once():
    def full(scalars, step):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    check(full, "full does not take the spectra")


def test_a_log_folder_that_cannot_be_written_warns_once(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    check(tmp_path / "file" / "log.csv", "CSVLog does not take the spectra")


def test_a_read_only_folder_warns_once(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("not a folder")
    check(str(tmp_path / "file" / "runs"), "Board does not take the spectra")


def test_without_tensorboard_the_warning_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    check(str(tmp_path / "runs"), "pip install tensorboard")


def test_a_drawing_that_fails_warns_once():
    class Crooked(Painter):
        def log_report(self, report, history, epoch, step, **_):
            raise ValueError("no pencil")

    check(Crooked(), "no pencil")
