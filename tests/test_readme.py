"""The README's snippets and commands run as they stand, one after another."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from ww_train.cli import main

from .oracles import gaussian

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_there_is_a_snippet_for_each_use():
    assert len(SNIPPETS) >= 6


def test_the_snippets_run(tmp_path):
    pytest.importorskip("lightning")
    pytest.importorskip("transformers")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    program = "\n".join(SNIPPETS)
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "malformed" in run.stdout or "trained" in run.stdout  # the report of the plain loop


def test_what_the_readme_points_to_exists():
    local = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(local) > 1
    missing = [path for path in local if not (ROOT / path).exists()]
    scripts = re.findall(r"`([a-z_]+\.py)(?: --large)?` \|$", README, flags=re.MULTILINE)
    assert len(scripts) > 5
    missing += [name for name in scripts if not (ROOT / "benchmarks" / name).exists()]
    assert missing == []


COMMANDS = re.findall(r"^ww-train .*", README, flags=re.MULTILINE)


def test_the_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i, folder in enumerate(("my-model", "base", "finetuned")):
        (tmp_path / folder).mkdir()
        weights = {f"layers.{k}.weight": gaussian(64, 48, seed=3 * i + k) for k in range(3)}
        save_file(weights, tmp_path / folder / "model.safetensors")
    assert len(COMMANDS) >= 6
    for command in COMMANDS:
        argv = shlex.split(command, comments=True)[1:]
        assert main(argv) in ((0, 1) if "--fail-if" in argv else (0,)), capsys.readouterr().err
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "smoothed" / "model.safetensors").is_file()
