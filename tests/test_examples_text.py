"""The scripts about texts and spectra run as printed, at a tiny size, and leave what they should."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["--pretrain-steps", "3"]
GPT_LAYERS = [f"blocks.{i}.{x}" for i in range(4) for x in ("q", "k", "v", "o", "up", "down")]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A working directory in which the base model is trained once."""
    return tmp_path_factory.mktemp("examples")


def run(script, folder, *args):
    """Run a script in a folder, without data but the embedded ones."""
    hidden = ("WW_TRAIN_TEXT", "WW_TRAIN_DATA")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), *args]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def results(script, folder, *args):
    """Run a script; its output and the rows of its table, one dictionary a row."""
    done = run(script, folder, *args)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    out = folder / "runs" / script
    assert (out / f"{script}.png").read_bytes().startswith(b"\x89PNG")
    report = (out / f"{script}.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in report.splitlines() if line[:1] == "|"]
    header, rows = lines[0], lines[2:]
    assert f"`python examples/{script}.py {' '.join(args)}` (seed 0)" in report
    assert re.search(r"torch \d.*CPU cores", report)
    sentence = report.splitlines()[2]
    assert sentence in done.stdout
    assert "nan" not in sentence
    return done.stdout, [dict(zip(header, row, strict=True)) for row in rows]


def test_double_descent(folder):
    _, rows = results("double_descent_1989", folder, "--repeats", "2")
    error = {float(row["load"]): float(row["test_error"]) for row in rows}
    assert error[0.5] < error[1.0] > error[2.0] > error[3.0]
    alpha = {float(row["load"]): float(row["alpha"]) for row in rows if row["alpha"] != "–"}
    assert alpha[0.5] > alpha[1.0] < alpha[2.0]


def test_finetuning(folder):
    output, rows = results("finetuning", folder, *TINY, "--steps", "3", "--windows", "2")
    assert "Python's reference manual is used instead" in output
    assert [row["longname"] for row in rows] == GPT_LAYERS
    assert all(0.0 < float(row["relative_delta"]) < 1.0 for row in rows)
    summary = json.loads((folder / "runs/finetuning/metrics_summary.json").read_text())
    parts = summary["weightwatcher"]
    assert list(parts) == ["baseline", "finetuned", "changes"]
    change = parts["finetuned"]["alpha"] - parts["baseline"]["alpha"]
    assert parts["changes"]["alpha"] == pytest.approx(change)


def test_lora(folder):
    pytest.importorskip("peft")
    output, rows = results("lora", folder, *TINY, "--steps", "2", "--windows", "2")
    both = ["rate 0.001", "rate 0.01"]
    assert [row["update"] for row in rows] == [*both, *both, "random", *both, "random"]
    assert [int(row["rank"]) for row in rows] == [2, 2, 8, 8, 8, 32, 32, 32]
    assert [row["updates"] for row in rows] == ["0", "0", *["24"] * 6]
    assert [row["alpha_BA"] == "–" for row in rows] == [True, True, *[False] * 6]
    assert [row["loss"] == "–" for row in rows] == [row["update"] == "random" for row in rows]
    assert "rank 2: no alpha (2 positive eigenvalues by its rank" in output


def test_dragon_kings(folder):
    _, rows = results("dragon_kings", folder, *TINY, "--draws", "3")
    assert [row["spectrum"] for row in rows[4:]] == GPT_LAYERS
    clean, kings, noise, noise_kings = rows[:4]
    assert float(kings["raw"]) < float(clean["raw"])
    assert float(noise_kings["raw"]) < float(noise["raw"])
    assert kings["drop_top_3"] == clean["drop_top_3"]
    assert noise_kings["drop_top_3"] == noise["drop_top_3"]


def test_laser(folder):
    _, rows = results("laser", folder, *TINY, "--windows", "2")
    assert [row["layer"] for row in rows] == GPT_LAYERS
    costs = [float(row[f"keep {share}"]) for row in rows for share in ("0.05", "0.8")]
    assert any(costs)
    assert max(map(abs, costs)) < 1.0


def test_laser_mlp(folder):
    _, rows = results("laser_mlp", folder, "--epochs", "4", "--seeds", "1")
    error = {(row["optimizer"], row["kept"]): float(row["error"]) for row in rows}
    for optimizer in ("AdamW", "WWPGD(AdamW)"):
        assert error[optimizer, "whole"] < 15.0
        assert error[optimizer, "without the power-law tail"] > 30.0


@pytest.fixture
def corpus(monkeypatch):
    """The module of the texts, without any folder set."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("WW_TRAIN_TEXT", "WW_TRAIN_DATA"):
        monkeypatch.delenv(name, raising=False)
    return importlib.import_module("corpus")


@pytest.mark.parametrize("place", ["folder", "file"])
@pytest.mark.parametrize("variable", ["WW_TRAIN_TEXT", "WW_TRAIN_DATA", None])
def test_a_text_of_ones_own(corpus, place, variable, tmp_path, monkeypatch, capsys):
    file = tmp_path / "tinyshakespeare.txt"
    file.write_text("To be — or not", encoding="utf-8")
    path = str(tmp_path if place == "folder" else file)
    if variable:
        monkeypatch.setenv(variable, path)
    name, text = corpus.shakespeare(None if variable else path)
    assert (name, bytes(text.tolist())) == ("shakespeare", b"To be ? or not")
    assert capsys.readouterr().out == ""


def test_a_folder_of_other_data_is_no_mistake(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WW_TRAIN_DATA", str(tmp_path))
    name, text = corpus.shakespeare()
    assert name == "manual"
    assert len(text) > 200_000
    assert capsys.readouterr().out.count("\n") == 1


def test_the_embedded_texts_are_code_and_prose(corpus):
    (_, prose), (_, code) = corpus.manual(), corpus.source()
    assert b"    def __init__(self" in bytes(code.tolist())
    assert len(code) == corpus.SOURCE_SIZE
    for text in (prose, code):
        assert int(text.max()) < corpus.CHARACTERS
        train, held_out = corpus.split(text)
        assert len(train) + len(held_out) == len(text)
        assert len(train) // 9 == pytest.approx(len(held_out), abs=1)


@pytest.mark.parametrize("option", [True, False])
def test_a_folder_without_the_text_says_what_was_expected(corpus, option, tmp_path, monkeypatch):
    if not option:
        monkeypatch.setenv("WW_TRAIN_TEXT", str(tmp_path))
    with pytest.raises(SystemExit, match=r"expected the file tinyshakespeare\.txt") as refused:
        corpus.shakespeare(str(tmp_path) if option else None)
    assert str(tmp_path) in str(refused.value)


def test_help(folder):
    done = run("finetuning", folder, "--help")
    assert done.returncode == 0
    assert "python examples/finetuning.py" in done.stdout
    assert all(option in done.stdout for option in ("--steps", "--data-dir", "--device", "--seed"))
