"""The scripts about training run at a tiny size without warnings, and leave what they should."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = ["mlp_sweeps", "epochwise_double_descent", "optimizers", "random_labels", "overtraining"]


def run(script, folder, *args):
    """Run a script in a folder, without data but the embedded ones."""
    env = {key: value for key, value in os.environ.items() if key != "WW_TRAIN_DATA"}
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{script}.py"), *args]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def results(script, folder, *args):
    """Run a script; the rows of its table, one dictionary a row, and the finding."""
    done = run(script, folder, *args, "--seeds", "1")
    assert done.returncode == 0, done.stderr
    out = folder / "runs" / script
    assert (out / f"{script}.png").read_bytes().startswith(b"\x89PNG")
    report = (out / f"{script}.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in report.splitlines() if line[:1] == "|"]
    header, rows = lines[0], lines[2:]
    assert re.search(rf"`python examples/{script}.py .*` \(seed 0\).*torch \d.*CPU cores", report)
    sentence = report.splitlines()[2]
    assert sentence in done.stdout
    assert "nan" not in sentence
    return [dict(zip(header, row, strict=True)) for row in rows], sentence


def test_mlp_sweeps(tmp_path):
    rows, sentence = results("mlp_sweeps", tmp_path, "--epochs", "1", "--samples", "500")
    batches = [row for row in rows if row["sweep"] == "batch size"]
    assert [row["batch size"] for row in batches] == ["1", "2", "4", "8", "16", "32", "64", "128"]
    assert float(batches[1]["alpha_fc1"]) < float(batches[4]["alpha_fc1"])
    rates = [float(row["rate"]) for row in rows if row["sweep"] == "rate"]
    assert rates == sorted(rates)
    assert "rank correlation +" in sentence
    assert "means of 1 seed" in sentence


def test_epochwise_double_descent(tmp_path):
    rows, sentence = results(
        "epochwise_double_descent", tmp_path, "--epochs", "4", "--noise", "0.5", "--samples", "300"
    )
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["train_error"]) > 20.0
    assert "50 % random labels" in sentence


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with PyTorch 2.9")
def test_optimizers(tmp_path):
    rows, sentence = results("optimizers", tmp_path, "--epochs", "3", "--samples", "500")
    assert {(row["layer"], row["optimizer"]) for row in rows} == {
        (layer, name) for layer in ("fc1", "fc2") for name in ("AdamW", "SGD", "Muon")
    }
    rank = {(row["layer"], row["optimizer"]): float(row["stable_rank"]) for row in rows}
    assert rank["fc2", "Muon"] > rank["fc2", "AdamW"]
    assert sentence.count("in this order with") == 6


def test_random_labels(tmp_path):
    rows, _ = results("random_labels", tmp_path, "--epochs", "3", "--samples", "500")
    assert [row["noise"] for row in rows] == ["0", "20", "40", "60", "80", "100"]
    assert float(rows[0]["test_error"]) < 50.0 < float(rows[-1]["test_error"])


def test_overtraining(tmp_path):
    rows, _ = results("overtraining", tmp_path, "--steps", "30", "--samples", "50")
    assert {row["decay"] for row in rows} == {"0", "0.1"}
    last = [row for row in rows if row["step"] == "30"]
    assert len(last) == 2
    assert all(float(row["train_error"]) <= 100.0 for row in last)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short(script):
    text = (EXAMPLES / f"{script}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120


def test_help(tmp_path):
    done = run("overtraining", tmp_path, "--help")
    assert done.returncode == 0
    assert "python examples/overtraining.py" in done.stdout
    options = ("--steps", "--dataset", "--data-dir", "--samples", "--device", "--seed", "--out")
    assert all(option in done.stdout for option in options)


def test_a_wrong_folder_says_what_was_expected(tmp_path):
    done = run("random_labels", tmp_path, "--dataset", "mnist", "--data-dir", str(tmp_path))
    assert done.returncode == 1
    assert "expected the files train-images-idx3-ubyte" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def small_mlp(monkeypatch):
    """The module that the scripts share."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("small_mlp")


@pytest.fixture
def data(small_mlp):
    """A hundred digits."""
    return small_mlp.read(small_mlp.arguments(None, "x").parse_args(["--samples", "100"]))


@pytest.mark.parametrize("samples", ["0", "1348", "-1"])
def test_a_wrong_number_of_samples_says_how_many_there_are(small_mlp, samples):
    args = small_mlp.arguments(None, "x").parse_args(["--samples", samples])
    with pytest.raises(SystemExit, match=f"--samples {samples}: digits has 1 to 1347"):
        small_mlp.read(args)


def test_noise_is_of_its_seed_and_keeps_a_tenth(small_mlp, data):
    clean, noisy = data.with_noise(0.0, 1), data.with_noise(1.0, 1)
    assert torch.equal(clean.y, data.y)
    assert torch.equal(noisy.y, data.with_noise(1.0, 1).y)
    assert not torch.equal(noisy.y, data.with_noise(1.0, 2).y)
    assert 0.02 < float((noisy.y == data.y).float().mean()) < 0.25
    half = data.with_noise(0.5, 1)
    assert 35 <= int((half.y != data.y).sum()) <= 50


def test_training_depends_on_the_seed_alone(small_mlp, data):
    def trained():
        model = small_mlp.mlp(data, (16, 16), 3)
        sgd = [torch.optim.SGD(model.parameters(), lr=0.1)]
        how = {"epochs": 2, "batch_size": 10, "seed": 3, "title": ""}
        assert list(small_mlp.train(model, sgd, data, **how)) == [1, 2]
        return model.head.weight

    first = trained()
    torch.rand(5)
    assert torch.equal(first, trained())


def test_a_diverged_network_stops_and_has_no_alpha(small_mlp, data):
    model = small_mlp.mlp(data, (16, 16), 0)
    sgd = [torch.optim.SGD(model.parameters(), lr=1e30)]
    how = {"epochs": 9, "batch_size": 10, "seed": 0, "title": ""}
    assert list(small_mlp.train(model, sgd, data, **how)) == []
    assert small_mlp.state(model, data)["alpha_fc1"] != small_mlp.state(model, data)["alpha_fc1"]


def test_measuring_is_even_on_a_logarithmic_axis(small_mlp):
    steps = [step for step in range(1, 1001) if small_mlp.due(step, 1000, per_decade=2)]
    assert steps == [1, 3, 10, 32, 100, 316, 1000]
    assert [step for step in range(1, 6) if small_mlp.due(step, 5, per_decade=1)] == [1, 5]


def test_rank_correlation_in_words(small_mlp):
    import pandas as pd

    rising, constant = pd.Series([1.0, 5.0, 6.0]), pd.Series([2.0, 2.0, 2.0])
    assert small_mlp.rank_correlation(rising, -rising) == "rank correlation -1.00"
    assert small_mlp.rank_correlation(rising, constant) == "no rank correlation"
