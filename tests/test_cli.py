"""The command line: what it prints and writes, its exit codes, and that bad input is one line."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from contextlib import suppress

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from ww_train import distances, measure
from ww_train.cli import main
from ww_train.cli.conditions import Condition, condition
from ww_train.cli.help import glossary
from ww_train.cli.parser import joined
from ww_train.exports import plain, replacing, to_json, write_bytes
from ww_train.glossary import DETAILS, HEADLINES, VERDICTS
from ww_train.tables import fitting, printable, shortened, text
from ww_train.verdicts import WORST_FIRST

from .commands import one_line, run, strict
from .oracles import gaussian

HEAVY, NOISE, TRAPPED = "encoder.heavy", "encoder.noise", "head.trapped"


def heavy(rows, cols, seed):
    values = np.random.default_rng(seed).standard_t(2.0, (rows, cols))
    return torch.from_numpy(values).float()


def state():
    trapped = gaussian(48, 40, seed=3).float()
    trapped[5, 7] = 60.0
    return {
        f"{HEAVY}.weight": heavy(80, 60, 1),
        f"{NOISE}.weight": gaussian(60, 40, seed=2).float(),
        "head.bias": torch.zeros(4),
        "head.small.weight": gaussian(4, 40, seed=4).float(),
        f"{TRAPPED}.weight": trapped,
    }


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(state(), folder / "model.safetensors")
    return str(folder / "model.safetensors")


# analyze


def test_the_table_shows_what_measure_finds(model, capsys):
    code, out, err = run(capsys, "analyze", model, "--randomize")
    assert (code, err) == (0, "")
    report = measure(state(), randomize=True)
    lines = [line.split() for line in out.splitlines()]
    header = lines[0]
    for line, layer in zip(lines[1:], report, strict=False):
        row = dict(zip(header, line, strict=True))
        assert row["longname"] == layer.name
        assert float(row["alpha"]) == pytest.approx(layer.alpha, abs=0.005)
        assert int(row["num_traps"]) == layer.num_traps
        assert row["verdict"] == layer.verdict
    assert report.verdict in out
    assert "head.small: 4 eigenvalues" in out


def test_json_is_strict_and_has_every_column(model, capsys):
    code, out, _ = run(capsys, "analyze", model, "--json", "-", "--mp-fit")
    document = strict(out)
    report = measure(state(), mp_fit=True)
    assert code == 0
    assert set(document) == {"layers", "skipped", "summary"}
    for row, layer in zip(document["layers"], report, strict=True):
        assert row == {**plain(layer.to_dict()), "verdict": layer.verdict}
    assert document["skipped"] == [
        {"name": "head.small", "reason": "4 eigenvalues, fewer than min_evals=8"}
    ]
    assert document["summary"] == report.summary()


def test_a_missing_number_is_null(tmp_path, capsys):
    path = tmp_path / "flat.safetensors"
    save_file({"flat.weight": torch.eye(32)}, path)
    _, out, _ = run(capsys, "analyze", str(path), "--json", "-")
    row = strict(out)["layers"][0]
    assert row["alpha"] is None
    assert row["lambda_max"] == pytest.approx(1.0)
    assert row["verdict"] == "malformed"


def test_csv_and_parquet_hold_the_same_table(model, tmp_path, capsys):
    csv, parquet = tmp_path / "a.csv", tmp_path / "a.parquet"
    pytest.importorskip("pyarrow")
    code, out, _ = run(capsys, "analyze", model, "--csv", str(csv), "--parquet", str(parquet))
    assert code == 0
    assert HEAVY in out  # the table is printed as well
    pd.testing.assert_frame_equal(
        pd.read_csv(csv, keep_default_na=False, na_values=[""]).drop(columns="warning"),
        pd.read_parquet(parquet).drop(columns="warning"),
        check_dtype=False,
        rtol=1e-14,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.parquet", "model"]


def test_csv_to_standard_output_replaces_the_table(model, capsys):
    _, out, _ = run(capsys, "analyze", model, "--csv", "-")
    frame = pd.read_csv(io.StringIO(out))
    assert list(frame.longname) == [HEAVY, NOISE, TRAPPED]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--layers", "encoder.*"), [HEAVY, NOISE]),
        (("--layers", "-encoder.*"), [TRAPPED]),
        (("--layers", "-encoder.heavy", "--layers", "encoder.*"), [NOISE]),
        (("--layers=-head.*",), [HEAVY, NOISE]),
        (("--layers", NOISE, "--layers", TRAPPED), [NOISE, TRAPPED]),
        (("--types", "dense"), [HEAVY, NOISE, TRAPPED]),
    ],
)
def test_layers_are_chosen(model, capsys, options, expected):
    _, out, _ = run(capsys, "analyze", model, *options, "--json", "-")
    assert [row["longname"] for row in strict(out)["layers"]] == expected


def test_only_the_word_after_layers_is_taken_for_a_pattern():
    assert joined(["analyze", "x", "--layers", "-head", "--wide"]) == [
        "analyze",
        "x",
        "--layers=-head",
        "--wide",
    ]
    assert joined(["--layers"]) == ["--layers"]


def test_base_measures_the_difference(model, tmp_path, capsys):
    changed = state()
    changed[f"{NOISE}.weight"] = changed[f"{NOISE}.weight"] + heavy(60, 40, 9)
    path = tmp_path / "after.safetensors"
    save_file(changed, path)
    _, out, _ = run(capsys, "analyze", str(path), "--base", model, "--json", "-")
    document = strict(out)
    assert [row["longname"] for row in document["layers"]] == [NOISE]
    expected = measure(changed, base_model=state())[NOISE].alpha
    assert document["layers"][0]["alpha"] == expected


@pytest.fixture
def lora(tmp_path):
    """The folder of an adapter of one layer, and the state of the model with it."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    a, b = gaussian(8, 40, seed=5).float(), gaussian(60, 8, seed=6).float()
    prefix = f"base_model.model.{NOISE}"
    factors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    merged = state()
    merged[f"{NOISE}.weight"] = merged[f"{NOISE}.weight"] + 2.0 * b @ a
    return adapter, merged


def test_an_adapter_is_merged(model, lora, capsys):
    adapter, merged = lora
    code, out, err = run(capsys, "analyze", model, "--adapter", str(adapter), "--json", "-")
    assert code == 0, err
    rows = {row["longname"]: row["alpha"] for row in strict(out)["layers"]}
    assert rows[NOISE] == pytest.approx(measure(merged)[NOISE].alpha, rel=1e-5)
    assert rows[HEAVY] == measure(state())[HEAVY].alpha


def test_device_cpu_changes_nothing(model, capsys):
    assert run(capsys, "analyze", model, "--device", "cpu") == run(capsys, "analyze", model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_cuda_gives_the_same_numbers(model, capsys):
    on = [
        strict(run(capsys, "analyze", model, "--device", device, "--json", "-")[1])
        for device in ("cpu", "cuda")
    ]
    for cpu, cuda in zip(on[0]["layers"], on[1]["layers"], strict=True):
        assert cuda["alpha"] == pytest.approx(cpu["alpha"], rel=1e-6)


# conditions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha<2", Condition("alpha", "<", 2.0)),
        (" ERG_gap >= -3.5 ", Condition("ERG_gap", ">=", -3.5)),
        ("num_traps!=0", Condition("num_traps", "!=", 0.0)),
        ("mean( alpha ) > 1e1", Condition("alpha", ">", 10.0, "mean")),
        ("sum(num_traps)==inf", Condition("num_traps", "==", float("inf"), "sum")),
    ],
)
def test_conditions_are_read(text, expected):
    assert condition(text) == expected
    assert condition(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alpha", "is no condition"),
        ("alpha=2", "== or !="),
        ("alpha<", "is no condition"),
        ("alpha<two", "'two' is not a number"),
        ("alpha<nan", "'nan' is not a number"),
        ("std(alpha)<2", "none of mean, median"),
        ("alpha<2; print()", "is no condition"),
        ("__import__('os')<2", "is no condition"),
        ("", "is no condition"),
    ],
)
def test_what_is_no_condition_says_why(text, says):
    with pytest.raises(ValueError, match=says.replace("!", r"\!").replace("(", r"\(")):
        condition(text)


def test_nan_satisfies_no_condition():
    frame = pd.DataFrame({"longname": ["a", "b", "c"], "x": [1.0, np.nan, 3.0]})
    assert condition("x!=1").met_by(frame) == ["c (3)"]
    assert condition("x<9").met_by(frame) == ["a (1)", "c (3)"]
    assert condition("mean(x)==2").met_by(frame) == ["mean 2"]
    assert condition("max(x)>3").met_by(frame) == []
    missing = pd.DataFrame({"longname": ["a"], "x": [np.nan]})
    for form in ("x!=1", "mean(x)!=1", "sum(x)==0"):
        assert condition(form).met_by(missing) == []


def test_fail_if_decides_on_the_exit_code_and_names_the_layers(model, capsys):
    report = measure(state())
    top = max(report, key=lambda layer: layer.alpha)
    limit = sorted(layer.alpha for layer in report)[1]
    above = f"alpha>{limit!r}"
    code, out, err = run(capsys, "analyze", model, "--fail-if", above, "--fail-if", "alpha<0")
    assert code == 1
    assert top.name in one_line(err)
    assert HEAVY in out  # the table comes all the same
    assert run(capsys, "analyze", model, "--fail-if", "alpha<0")[::2] == (0, "")
    assert run(capsys, "analyze", model, "--fail-if", "min(alpha)<=0")[0] == 0
    assert run(capsys, "analyze", model, "--fail-if", "min(alpha)>0")[0] == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alfa<2", "did you mean alpha?"),
        ("zzz<2", "there are layer_id"),
        ("longname<2", "is text"),
        ("verdict<2", "there is no column 'verdict'"),
        ("num_traps>0", "needs --randomize"),
        ("num_spikes>0", "needs --mp-fit"),
    ],
)
def test_a_condition_on_no_column_is_an_error(model, capsys, text, says):
    code, out, err = run(capsys, "analyze", model, "--fail-if", text)
    assert (code, out) == (2, "")
    assert says in one_line(err)


def test_what_was_skipped_can_fail(model, tmp_path, capsys):
    broken = state()
    broken[f"{NOISE}.weight"][0, 0] = torch.nan
    after = str(tmp_path / "after.safetensors")
    save_file(broken, after)
    assert run(capsys, "analyze", after, "--fail-if", "alpha<0")[0] == 0
    code, _, err = run(capsys, "analyze", after, "--fail-if", "num_skipped>1")
    assert code == 1
    assert one_line(err).startswith("ww-train: num_skipped>1: ")
    assert f"{NOISE} (" in err
    assert "head.small (4 eigenvalues" in err
    assert run(capsys, "analyze", after, "--fail-if", "num_skipped>2")[0] == 0
    argv = ("analyze", model, "--layers", "encoder.*", "--fail-if")
    code, _, err = run(capsys, *argv, "num_skipped==0")
    assert (code, err) == (1, "ww-train: num_skipped==0: 0\n")
    assert run(capsys, *argv, "num_skipped>0")[0] == 0
    page = str(tmp_path / "page.html")
    assert run(capsys, "report", after, "-o", page, "--fail-if", "num_skipped>1")[0] == 1
    assert run(capsys, "compare", model, model, "--fail-if", "num_skipped>1")[0] == 0
    code, _, err = run(capsys, "compare", model, after, "--fail-if", "num_skipped==2")
    assert code == 1  # each layer counts once, whether one model or both lack its numbers
    assert NOISE in one_line(err)
    code, _, err = run(capsys, "analyze", after, "--fail-if", "mean(num_skipped)>0")
    assert code == 2
    assert "there is no column 'num_skipped'" in one_line(err)


# what is printed


def test_the_examples_measure_a_difference_of_whole_models(capsys):
    for command in ("analyze", "report"):
        _, out, _ = run(capsys, command, "--help")
        assert f"ww-train {command} finetuned/ --base base/" in out
        assert "lora/ --base" not in out


def test_help_explains_itself(capsys):
    code, out, _ = run(capsys, "analyze", "--help")
    assert code == 0
    for term in (*VERDICTS, *HEADLINES):
        assert term.name in out
    assert "--fail-if 'alpha<2'" in out
    assert max(map(len, glossary().splitlines())) <= 88
    for command in ("describe", "compare", "plot", "report", "smooth"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0
        assert f"examples:\n  ww-train {command} " in out
    code, out, _ = run(capsys, "--help")
    assert all(
        name in out for name in ("analyze", "describe", "compare", "plot", "report", "smooth")
    )


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("ww-train 0.")


def test_the_glossary_speaks_of_verdicts_and_columns_that_exist():
    assert tuple(term.name for term in VERDICTS) == WORST_FIRST
    report = measure(state(), mp_fit=True, randomize=2, replicates=20)
    columns = {*report.to_dataframe().columns, "slice_id"}  # the last one without pooling
    assert {term.name for term in (*HEADLINES, *DETAILS)} <= columns


def test_a_name_cannot_steer_the_terminal(tmp_path, capsys):
    path = tmp_path / "hostile.safetensors"
    save_file({"\x1b[2Jgone\r\n\u202efake.weight": gaussian(40, 30, seed=1).float()}, path)
    code, out, err = run(capsys, "analyze", str(path), "--fail-if", "alpha>0")
    assert code == 1
    assert r"\x1b[2Jgone\r\n\u202efake" in out
    assert r"\x1b[2Jgone\r\n\u202efake" in one_line(err)
    assert "\x1b" not in out + err


def test_columns_go_by_importance():
    widths = {"name": 20, "a": 5, "b": 5, "c": 5}
    assert fitting(widths, ("c", "a", "b"), 100) == ["name", "a", "b", "c"]
    assert fitting(widths, ("c", "a", "b"), 20 + 7 + 7) == ["name", "a", "c"]
    assert fitting(widths, ("c", "a", "b"), 33) == ["name", "c"]
    assert fitting(widths, ("c", "a", "b"), 1) == ["name"]


@pytest.mark.parametrize(
    ("value", "column", "expected"),
    [
        (2.0049, "alpha", "2.00"),
        (12.0, "alpha", "12.00"),
        (-1e-9, "alpha_change", "0"),
        (0.0701, "alpha_change", "+0.07"),
        (float("nan"), "alpha", "-"),
        (None, "", "-"),
        (384.0, "N", "384"),
        (np.int64(7), "", "7"),
        (1234567.8, "norm", "1.235e+06"),
        ("a\tb", "", r"a\tb"),
    ],
)
def test_cells(value, column, expected):
    assert text(value, column) == expected


def test_names_are_shortened_in_the_middle():
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghij", 7) == "ab…ghij"
    assert printable("é\u0007\ud800") == r"é\x07\ud800"


def on_terminal(argv):
    """Exit code and output on a pseudo-terminal."""
    parent, child = os.openpty()
    shown = []

    def read():
        with suppress(OSError):  # Linux's way of saying that the other side has closed
            while part := os.read(parent, 65536):
                shown.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with pytest.MonkeyPatch.context() as patch, open(child, "w", encoding="utf-8") as terminal:
        patch.setattr(sys, "stdout", terminal)
        code = main(argv)
    reader.join()
    os.close(parent)
    return code, b"".join(shown).decode()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
@pytest.mark.parametrize("width", [50, 90, 250])
def test_on_a_terminal_the_table_fits(model, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    code, shown = on_terminal(["analyze", model, "--no-progress"])
    assert code == 0
    assert "\x1b[1m" in shown  # headings are bold
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert lines[0].split()[:1] == ["longname"]
    assert "alpha" in lines[0]
    assert max(map(len, lines[:4])) <= width
    assert ("stable_rank" in lines[0]) == (width == 250)
    assert ("not shown for lack of room" in shown) == (width < 250)
    _, whole = on_terminal(["analyze", model, "--no-progress", "--wide"])
    assert "weak_rank_loss" in whole


# files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_text(1000 * "new" + "\ud800", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "old"
    write_bytes(b"new", path)
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="needs /dev/null")
def test_a_device_stays_a_device():
    write_bytes(b"gone", "/dev/null")
    assert not os.path.isfile("/dev/null")


def test_json_has_no_infinity():
    document = {"a": [float("nan"), np.float64("inf"), np.int32(3), True], "b": {"c": None}}
    assert strict(to_json(document)) == {"a": [None, None, 3, True], "b": {"c": None}}


# bad input


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "arguments are required: COMMAND"),
        (("frobnicate",), "there is no command 'frobnicate'; there are analyze, describe"),
        (("analyse", "MODEL"), "did you mean analyze? (see ww-train --help)"),
        (("--frobnicate", "analyze", "MODEL"), "--frobnicate (see ww-train --help)"),
        (("analyze", ""), "the path is empty"),
        (("analyze", "MODEL", "--base", ""), "the path is empty"),
        (("smooth", "", "-o", "OUT"), "the path is empty"),
        (("compare", "MODEL", ""), "the path is empty"),
        (("analyze", "FOLDER/config.json"), "name the folder, or use ww-train plan"),
        (("compare", "MODEL", "FOLDER/config.json"), "is a configuration"),
        (("analyze", "MODEL", "--types", "skipped"), "'skipped' is no type of layers"),
        (("analyze",), "PATH"),
        (("analyze", "MODEL", "--frobnicate"), "--frobnicate (see ww-train analyze --help)"),
        (("analyze", "MISSING"), "no file or folder"),
        (("analyze", "TEXT"), "no format that is known"),
        (("analyze", "CORRUPT"), "CORRUPT"),
        (("analyze", "MODEL", "--base", "MISSING"), "no file or folder"),
        (("analyze", "MODEL", "--adapter", "MISSING"), "no file or folder"),
        (("analyze", "MODEL", "--layers", "encoder.haevy"), "did you mean 'encoder.heavy'"),
        (("analyze", "MODEL", "--types", "conv2d"), "types here are dense"),
        (("analyze", "MODEL", "--layers", "head.small"), "fewer than min_evals"),
        (("analyze", "MODEL", "--device", "abacus"), "is no device"),
        (("analyze", "MODEL", "--device", "mps"), "use cpu or cuda"),
        (("analyze", "MODEL", "--device", "cuda:99"), "PyTorch finds"),
        (("analyze", "MODEL", "--json", "-", "--csv", "-"), "only one of"),
        (("analyze", "MODEL", "--json", "MISSING/x.json"), "there is no folder"),
        (("analyze", "MODEL", "--json", "FOLDER"), "is a folder"),
        (("analyze", "MODEL", "--fail-if", "alpha"), "is no condition"),
        (("describe", "MISSING"), "no file or folder"),
        (("compare", "MODEL", "MISSING"), "no file or folder"),
        (("compare", "MODEL", "OTHER"), "OTHER"),
        (("compare", "MODEL", "MODEL", "--metrics-summary", "MISSING/x"), "there is no folder"),
        (("compare", "MODEL", "MODEL", "--fail-if", "alfa_change<0"), "did you mean alpha_change"),
        (("compare", "MODEL", "MODEL", "--fail-if", "cka<1"), "cka needs --distances"),
        (("plot", "MODEL", "-o", "TEXT"), "exists"),
        (("plot", "MODEL", "-o", "OUT", "--figure", "pie"), "pie"),
        (("report", "MISSING", "-o", "OUT"), "no file or folder"),
        (("report", "MODEL", "-o", "MISSING/page.html"), "there is no folder"),
        (("report", "MODEL"), "-o"),
        (("smooth", "MODEL", "-o", "MODEL"), "write elsewhere"),
        (("smooth", "MODEL", "-o", "OUT", "--top", "2"), "between 0 and 1"),
        (("smooth", "MODEL", "-o", "OUT", "--top", "0.2", "--detx"), "not allowed with"),
    ],
)
def test_bad_input_is_one_line_and_code_2(model, tmp_path, capsys, argv, says):
    (tmp_path / "text").write_text("not a model", encoding="utf-8")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "corrupt.safetensors").write_bytes(b"\xff" * 64)
    save_file({"other.weight": gaussian(30, 30, seed=1).float()}, tmp_path / "other.safetensors")
    stand_for = {
        "MODEL": model,
        "MISSING": str(tmp_path / "missing"),
        "TEXT": str(tmp_path / "text"),
        "CORRUPT": str(tmp_path / "corrupt.safetensors"),
        "OTHER": str(tmp_path / "other.safetensors"),
        "FOLDER": str(tmp_path),
        "OUT": str(tmp_path / "out"),
    }
    before = sorted(tmp_path.rglob("*"))
    words = []
    for word in argv:
        name, slash, rest = word.partition("/")
        words.append(stand_for.get(name, name) + slash + rest)
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    says = "no layer" if says == "OTHER" else "corrupt.safetensors" if says == "CORRUPT" else says
    assert says in one_line(err)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pickle_that_would_execute_code_is_refused(tmp_path, capsys):
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    path = tmp_path / "evil.bin"
    torch.save({"a.weight": torch.zeros(3, 3), "b": Evil()}, path)
    code, out, err = run(capsys, "analyze", str(path))
    assert (code, out) == (2, "")
    one_line(err)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "MemoryError"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a.bin"),
            2,
            "a.bin: Permission denied",
        ),
        (ImportError("needs x: pip install x"), 2, "pip install x"),
        (ZeroDivisionError("oops"), 3, "defect of ww-train"),
    ],
)
def test_what_goes_wrong_has_its_exit_code(model, capsys, monkeypatch, raised, code, says):
    def fail(*args, **options):
        raise raised

    monkeypatch.setattr("ww_train.cli.source.measure", fail)
    found, _, err = run(capsys, "analyze", model)
    assert found == code
    assert says in err
    assert ("Traceback" in err) == (code == 3)


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(model, capsys, monkeypatch):
    def warn(*args, **options):
        warnings.warn("mind\nthe gap", stacklevel=1)
        return measure(*args, **options)

    monkeypatch.setattr("ww_train.cli.source.measure", warn)
    before = warnings.showwarning
    code, _, err = run(capsys, "analyze", model)
    assert (code, err) == (0, "ww-train: warning: mind the gap\n")
    assert warnings.showwarning is before


def python(*argv, **options):
    options = {"capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run([sys.executable, *argv], **options)


def test_as_a_module_in_a_pipe(model):
    done = python("-m", "ww_train", "analyze", model, "--fail-if", "alpha>0")
    assert done.returncode == 1
    assert done.stderr.startswith("ww-train: alpha>0: ")
    assert "\x1b" not in done.stdout
    assert done.stdout.splitlines()[1].startswith(HEAVY)


def test_bad_input_as_a_module(tmp_path):
    done = python("-m", "ww_train", "analyze", str(tmp_path / "missing"))
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr)


def test_a_reader_that_goes_away_is_no_error(model):
    command = [sys.executable, "-m", "ww_train", "describe", model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(120) == 141
        assert process.stderr.read() == b""


def test_only_the_first_process_prints_and_writes(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    page, images = str(tmp_path / "p.html"), str(tmp_path / "images")
    for argv in (
        ("analyze", model, "--json", str(tmp_path / "a.json"), "--fail-if", "alpha>0"),
        ("describe", model),
        ("compare", model, model),
        ("report", model, "-o", page),
        ("plot", model, "-o", images),
        ("smooth", model, "-o", str(tmp_path / "smooth.safetensors")),
    ):
        assert run(capsys, *argv) == (0, "", "")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def torchrun(*argv):
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *argv)
    return done.returncode, done.stdout, done.stderr


def test_the_processes_of_torchrun_share_the_layers(model, tmp_path, capsys):
    shared, alone = tmp_path / "shared.json", tmp_path / "alone.json"
    command = ("analyze", model, "--randomize", "--json")
    assert torchrun("-m", "ww_train", *command, str(shared))[0] == 0
    assert run(capsys, *command, str(alone))[0] == 0
    assert strict(shared.read_text()) == strict(alone.read_text())


def test_bad_input_ends_every_process(tmp_path):
    code, out, err = torchrun("-m", "ww_train", "analyze", str(tmp_path / "missing"))
    assert (code != 0, out) == (True, "")
    assert "there is no file or folder" in err


# the other commands


def test_describe(model, capsys):
    code, out, _ = run(capsys, "describe", model)
    assert code == 0
    lines = out.splitlines()
    assert lines[1].split()[:5] == [HEAVY, "dense", "80", "60", "60"]
    assert "fewer than min_evals" in out
    rows = strict(run(capsys, "describe", model, "--json", "-")[1])["layers"]
    assert [row["N"] for row in rows] == [80, 60, 40, 48]


def test_compare(model, tmp_path, capsys):
    changed = state()
    changed[f"{NOISE}.weight"] = changed[f"{NOISE}.weight"] * 1.5
    changed["new.weight"] = gaussian(30, 30, seed=8).float()
    after = str(tmp_path / "after.safetensors")
    save_file(changed, after)
    summary = tmp_path / "metrics_summary.json"
    code, out, err = run(capsys, "compare", model, after, "--metrics-summary", str(summary))
    assert (code, err) == (0, "")
    header, changed_line = (
        next(line.split() for line in out.splitlines() if line.startswith(first))
        for first in ("longname", NOISE)
    )
    row = dict(zip(header, changed_line, strict=True))
    assert row["relative_delta"] == "0.500"
    assert row["alpha_change"] == "0"
    assert "only in the fine-tuned model, 1: new" in out
    assert f"unchanged, 2: {HEAVY}, {TRAPPED}" in out
    written = strict(summary.read_text(encoding="utf-8"))["weightwatcher"]
    assert set(written) == {"baseline", "finetuned", "changes"}
    _, out, _ = run(capsys, "compare", model, after, "--json", "-")
    document = strict(out)
    assert document["summary"] == written
    assert document["extra"] == ["new"]
    assert run(capsys, "compare", model, after, "--fail-if", "relative_delta>0.4")[0] == 1
    assert run(capsys, "compare", model, after, "--fail-if", "relative_delta>0.6")[0] == 0


@pytest.mark.parametrize("name", ["", "adapter_model.safetensors"])
def test_compare_merges_an_adapter_into_its_base(model, lora, tmp_path, capsys, name):
    adapter, merged = lora
    whole = str(tmp_path / "whole.safetensors")
    save_file(merged, whole)
    path = str(adapter / name) if name else str(adapter)
    code, out, err = run(capsys, "compare", model, path, "--distances")
    assert (code, err) == (0, "")
    assert f"{path} is a LoRA adapter: it was merged into the base" in out
    rows, expected = (
        strict(run(capsys, "compare", model, after, "--json", "-")[1])["layers"]
        for after in (path, whole)
    )
    for row, other in zip(rows, expected, strict=True):
        assert row["longname"] == other["longname"]
        assert row["relative_delta"] == pytest.approx(other["relative_delta"], rel=1e-5)
        assert row["alpha_finetuned"] == pytest.approx(other["alpha_finetuned"], rel=1e-4)
    code, out, err = run(capsys, "compare", path, model)
    assert (code, out) == (2, "")
    assert "the base is a LoRA adapter" in one_line(err)
    assert "adapter" not in run(capsys, "compare", model, whole)[1]


def test_compare_with_distances(model, tmp_path, capsys):
    changed = state()
    changed[f"{NOISE}.weight"] = changed[f"{NOISE}.weight"] * 1.5
    after = str(tmp_path / "after.safetensors")
    save_file(changed, after)
    expected = {layer.name: layer for layer in distances(model, after).layers}
    plain = strict(run(capsys, "compare", model, after, "--json", "-")[1])
    code, out, err = run(capsys, "compare", model, after, "--distances", "--json", "-")
    assert (code, err) == (0, "")
    document = strict(out)
    names = ("frobenius", "spectral", "cka", "left_overlap", "right_overlap")
    more = ("cosine", "cka_centred", "num_tail", "esd_distance")
    for row, without in zip(document["layers"], plain["layers"], strict=True):
        layer = expected[row["longname"]]
        assert row == without | {name: getattr(layer, name) for name in (*names, *more)}
    assert document | {"layers": []} == plain | {"layers": []}
    by_name = {row["longname"]: row for row in document["layers"]}
    assert by_name[HEAVY]["frobenius"] == 0.0
    norm = float(torch.linalg.matrix_norm(state()[f"{NOISE}.weight"].double(), 2))
    assert by_name[NOISE]["spectral"] == pytest.approx(0.5 * norm, rel=1e-6)
    assert by_name[NOISE]["cka"] == pytest.approx(1.0)
    out = run(capsys, "compare", model, after, "--distances")[1]
    assert set(names) <= set(out.splitlines()[0].split())
    table = tmp_path / "table.csv"
    assert run(capsys, "compare", model, after, "--distances", "--csv", str(table))[0] == 0
    assert {*names, *more} <= set(table.read_text().splitlines()[0].split(","))
    condition = ("--fail-if", "spectral>0")
    assert run(capsys, "compare", model, after, "--distances", *condition)[0] == 1
    assert run(capsys, "compare", model, model, "--distances", *condition)[0] == 0


def test_smooth_writes_a_model_of_smaller_rank(model, tmp_path, capsys):
    out_path = str(tmp_path / "smooth.safetensors")
    argv = ("smooth", model, "-o", out_path, "--top", "0.25", "--layers", HEAVY)
    code, out, err = run(capsys, *argv)
    assert (code, err) == (0, "")
    assert "1 smoothed layers" in out
    after, before = load_file(out_path), state()
    rank = torch.linalg.matrix_rank(after[f"{HEAVY}.weight"].double(), rtol=1e-5)
    assert int(rank) == 15
    assert torch.equal(after[f"{NOISE}.weight"], before[f"{NOISE}.weight"])


def test_plot_writes_figures_into_one_folder_whatever_the_names(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "m.safetensors"
    weights = {
        f"{name}.weight": heavy(40, 30, i) for i, name in enumerate(("../../up", "a/b", "a_b"))
    }
    save_file(weights, path)
    folder = tmp_path / "images" / "new"
    argv = ("--figure", "esd", "--figure", "alpha_histogram", "--figure", "randomized_esd")
    code, out, err = run(capsys, "plot", str(path), "-o", str(folder), *argv)
    assert (code, err) == (0, "")
    assert "7 figures" in out
    written = sorted(folder.iterdir())
    assert len(written) == 7
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in written)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "m.safetensors"]


def test_report_writes_a_page_and_obeys_conditions(model, tmp_path, capsys):
    page = tmp_path / "page.html"
    argv = ("report", model, "-o", str(page), "--randomize", "--date", "some day")
    code, out, err = run(capsys, *argv, "--fail-if", "num_traps>0")
    assert code == 1
    assert TRAPPED in one_line(err)
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>")
    assert "model.safetensors</title>" in html
    assert "some day" in html
    assert measure(state(), randomize=True).verdict in out
    code, out, _ = run(capsys, "report", model, "-o", "-", "--date", "")
    assert code == 0
    assert out.startswith("<!DOCTYPE html>")
    assert out.rstrip().endswith("</html>")
