"""The examples to begin with and those of WWPGD, run small: each leaves a figure and a table."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def run(script, *args, folder, rc=0):
    """Run an example without any data folder; what it printed."""
    env = {k: v for k, v in os.environ.items() if k not in ("WW_TRAIN_DATA", "WW_TRAIN_TEXT")}
    # the monitor's alarms about layers are wanted; everything else is an error
    command = [sys.executable, "-W", "error", "-W", "ignore:layer ", EXAMPLES / f"{script}.py"]
    done = subprocess.run(
        [*command, *args, "--out", folder],
        cwd=folder,
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == rc, done.stderr[-2000:]
    return done.stdout + done.stderr


def results(script, folder):
    """The rows of the table that a run left, as dicts; checks what comes with it."""
    png = (folder / f"{script}.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 15_000  # of a figure of that size with nothing but axes there are fewer
    text = (folder / f"{script}.md").read_text(encoding="utf-8")
    assert f"`python examples/{script}.py" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]], text


def test_single_layer(tmp_path):
    printed = run("single_layer", "--epochs", "3", folder=tmp_path)
    (before, after), text = results("single_layer", tmp_path)
    assert (before["layer"], after["layer"]) == ("untrained", "trained")
    assert float(after["test_error"]) < 20.0 < float(before["test_error"])
    assert float(after["alpha"]) < float(before["alpha"])
    assert f"from alpha {float(before['alpha']):.2f}" in text
    assert "epoch" in printed


def test_monitor_existing_script(tmp_path):
    printed = run("monitor_existing_script", "--epochs", "3", folder=tmp_path)
    rows, text = results("monitor_existing_script", tmp_path)
    assert [row["layer"] for row in rows] == ["0", "2", "4"]
    assert float(rows[0]["alpha_last_epoch"]) <= float(rows[0]["alpha_first_epoch"])
    assert "watching took" in printed  # the table of (3)
    assert "test accuracy is 9" in text


def test_the_lines_to_add_are_marked():
    source = (EXAMPLES / "monitor_existing_script.py").read_text(encoding="utf-8")
    loop, _ = source.split("    history = ")
    assert re.findall(r"^ +monitor\b.*# \((\d)\)", loop, flags=re.MULTILINE) == ["1", "2", "3"]
    assert len(re.findall(r"^ +.*\bmonitor\b.*", loop, flags=re.MULTILINE)) == 3  # and no other


def test_accelerate_loop(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    run("accelerate_loop", "--epochs", "6", "--wwpgd", "--device", "cpu", folder=tmp_path)
    rows, text = results("accelerate_loop", tmp_path)
    hidden = [float(row["alpha_at_end"]) for row in rows if row["layer"] in "024"]
    assert hidden == pytest.approx([2.0] * 3, abs=0.01)  # found and projected through the wrappers
    assert "Alpha came nearer to 2 in 3 of 4 layers" in text or "in 4 of 4" in text
    assert list((tmp_path / "tensorboard").iterdir())


def test_huggingface_trainer(tmp_path):
    pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("tensorboard")
    options = ["--epochs", "6", "--windows", "32", "--wwpgd", "--device", "cpu"]
    printed = run("huggingface_trainer", *options, folder=tmp_path)
    rows, text = results("huggingface_trainer", tmp_path)
    blocks = [row for row in rows if row["layer"].startswith("model.layers.")]
    assert len(blocks) == 21
    assert all(float(row["alpha_at_end"]) < 2.6 for row in blocks)
    assert "reference manual is used instead" in printed
    assert "Steered by WWPGD" in text


def test_watch_a_large_model(tmp_path):
    printed = run("watch_a_large_model", folder=tmp_path)
    rows, text = results("watch_a_large_model", tmp_path)
    assert len(rows) == 27
    assert "a random one, is measured instead" in printed
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(row["longname"] in page for row in rows)
    assert "0 weights were skipped" in text
    sentence = run("watch_a_large_model", str(tmp_path / "none"), folder=tmp_path, rc=1)
    assert "cannot read" in sentence
    assert "Traceback" not in sentence


def test_wwpgd_quickstart(tmp_path):
    run("wwpgd_quickstart", "--epochs", "7", folder=tmp_path)
    (plain, steered), text = results("wwpgd_quickstart", tmp_path)
    assert abs(float(plain["alpha"]) - 2.0) > 0.2
    assert float(steered["alpha"]) == pytest.approx(2.0, abs=0.001)
    assert int(steered["ERG_gap"]) == 0
    apart = re.search(r"are (\d+) % of their norm apart", text)
    assert int(apart[1]) > 5


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
def test_wwpgd_muon_mlp3(tmp_path):
    run("wwpgd_muon_mlp3", "--epochs", "6", "--seeds", "1", folder=tmp_path)
    rows, text = results("wwpgd_muon_mlp3", tmp_path)
    assert [row["optimizer"] for row in rows] == ["AdamW", "WWPGD(AdamW)", "Muon", "WWPGD(Muon)"]
    for row in rows:
        alphas = [float(row["alpha_0_mean"]), float(row["alpha_2_mean"])]
        near = alphas == pytest.approx([2.0, 2.0], abs=0.01)
        assert near == row["optimizer"].startswith("WWPGD")
        assert f"{row['optimizer']} {float(row['error_mean']):.2f}" in text


def test_wwpgd_tiny_transformer(tmp_path):
    options = ["--steps", "6", "--every", "1", "--windows", "2"]
    printed = run("wwpgd_tiny_transformer", *options, folder=tmp_path)
    (plain, steered), text = results("wwpgd_tiny_transformer", tmp_path)
    assert (plain["within_0.1_of_2"], steered["within_0.1_of_2"]) == ("0", "24")
    assert float(steered["alpha_max"]) == pytest.approx(2.0, abs=0.01)
    assert float(plain["validation_loss"]) < 4.9  # ln 128 is chance
    assert "reference manual is used instead" in printed
    assert "On manual" in text


def test_early_stopping_on_alpha(tmp_path):
    pytest.importorskip("lightning")
    options = ["--epochs", "6", "--images", "100", "--patience", "1"]
    run("early_stopping_on_alpha", *options, folder=tmp_path)
    (stop, best, end), text = results("early_stopping_on_alpha", tmp_path)
    assert int(float(end["epoch"])) == 6
    assert float(best["error"]) <= min(float(stop["error"]), float(end["error"]))
    assert f"after epoch {float(stop['epoch']):.0f}" in text


def test_a_wrong_folder_is_told_what_was_expected(tmp_path):
    printed = run("wwpgd_tiny_transformer", "--data-dir", tmp_path, folder=tmp_path, rc=1)
    assert "expected the file tinyshakespeare.txt" in printed
    assert "Traceback" not in printed


def test_the_readme_has_every_example_and_no_dead_link():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = [
        path.name
        for path in EXAMPLES.glob("*.py")
        if "__main__" in path.read_text(encoding="utf-8")
    ]
    assert len(scripts) > 10
    assert [name for name in scripts if f"examples/{name}" not in text] == []
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert [link for link in links if not (EXAMPLES / link).exists()] == []
