"""The commands `plan` and `calibrate`: what they print and write, and that bad input is one line."""

import json
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ww_train import calibration, describe
from ww_train.calibration import cache_file, machine
from ww_train.cli.plan import advice, duration, size
from ww_train.cli.shapes import hollow, shapes
from ww_train.costs import Costs, Curve, Machine
from ww_train.scale import scale, step_seconds
from ww_train.weights.matrices import WeightMatrix, weight_matrices

from .commands import one_line, run
from .oracles import gaussian

TINY = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 300,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def paper():
    curve = Curve((64, 4096), (1e-4, 0.5))
    here = Machine("Paper 1", "cuda", "2.99", "13.0", 4)
    return Costs(here, curve, curve, curve, curve, curve, curve, curve, 1e10)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(paper().to_json(), encoding="utf-8")
    return str(path)


@pytest.fixture
def model(tmp_path):
    state = {f"{i}.weight": gaussian(90, 60, seed=i).float() for i in range(3)}
    path = tmp_path / "model.safetensors"
    save_file({**state, "small.weight": gaussian(4, 40, seed=4).float()}, path)
    return str(path)


def config(tmp_path, **changes):
    folder = tmp_path / "gpt"
    folder.mkdir()
    text = json.dumps({k: v for k, v in (TINY | changes).items() if v is not None})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


# plan


def test_the_plan_of_a_checkpoint_is_that_of_its_shapes(model, saved, capsys):
    code, out, err = run(capsys, "plan", model, "--costs", saved, "--gpus", "3", "--json", "-")
    assert (code, err) == (0, "")
    document = json.loads(out)
    found = scale(model, paper(), 3)
    assert document["traps"] == asdict(found)["traps"]
    assert document["spectra"]["layers"] == 3
    assert document["skipped"][0]["name"] == "small"
    assert document["machine"]["device"] == "Paper 1"
    assert document["every"] is None


def test_the_plan_says_how_often(model, saved, capsys):
    argv = ("plan", model, "--costs", saved, "--step-seconds", "0.1", "--overhead", "0.02")
    code, out, err = run(capsys, *argv)
    assert (code, err) == (0, "")
    found = scale(model, paper())
    lines = out.splitlines()
    rounds = {line.split()[0]: line.split() for line in lines[4:7]}
    assert set(rounds) == {"spectra", "traps", "projection"}
    for name, cells in rounds.items():
        load = getattr(found, name)
        assert int(cells[1]) == load.layers
        assert float(cells[2]) == pytest.approx(load.seconds, rel=1e-3)
    assert lines[-1] == advice(found, 0.1, 0.02)
    every = found.spectra.every(0.1, 0.02)
    assert f"to stay within 2 % of the training time, measure spectra at most every {every}" in out
    assert out.splitlines()[3].split()[:6] == ["round", "layers", "seconds", "on", "one", "rank"]
    assert "with" not in out.splitlines()[3]
    assert "Paper 1 (cuda), torch 2.99, CUDA 13.0, 4 threads" in out
    assert "skipped 1: small: 4 eigenvalues" in out
    assert "sharded" not in out


def test_a_step_is_known_from_its_tokens(model, saved, capsys):
    argv = ("--tokens-per-step", "1e6", "--flops", "1e12", "--gpus", "4", "--json", "-")
    _, out, _ = run(capsys, "plan", model, "--costs", saved, *argv)
    document = json.loads(out)
    assert document["step_seconds"] == step_seconds(document["parameters"], 1e6, 1e12, 4)
    assert document["every"]["traps"] == scale(model, paper(), 4).traps.every(
        document["step_seconds"], 0.01
    )


def test_traffic_is_added_where_its_rate_is_known(model, saved, capsys):
    argv = ("plan", model, "--costs", saved, "--gpus", "2")
    assert "(not counted in the seconds)" in run(capsys, *argv)[1]
    _, out, _ = run(capsys, *argv, "--network", "0.001", "--json", "-")
    assert json.loads(out)["spectra"]["longest"] == pytest.approx(
        scale(model, paper(), 2, network=1e6).spectra.longest
    )


def test_without_the_time_of_a_step_the_advice_is_in_seconds(model, saved, capsys):
    _, out, _ = run(capsys, "plan", model, "--costs", saved)
    every = duration(scale(model, paper()).spectra.longest / 0.01)
    assert f"spectra at most every {every} (traps: " in out
    assert out.endswith("if only one of them is done; --step-seconds gives steps\n")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.00234, "0.0023 s"),
        (0.97, "0.97 s"),
        (9.97, "10 s"),
        (119.0, "119 s"),
        (120.0, "2 min"),
        (5000.0, "83 min"),
        (1.193e5, "33 h"),
        (373e3, "104 h"),
        (5 * 86400.0, "5 days"),
        (1e8, "1,157 days"),
    ],
)
def test_durations_are_what_people_say(seconds, shown):
    assert duration(seconds) == shown


def test_costs_of_this_cpu_are_not_taken_for_those_of_gpus(model, saved, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "SIZES", (64, 128))
    _, out, _ = run(capsys, "plan", model, "--gpus", "8")
    assert "for GPUs run `ww-train calibrate --device cuda -o costs.json`" in out
    assert "with 8 ranks" in out.splitlines()[4]
    path = cache_file(machine(torch.device("cpu")))
    assert f"measured now, saved in {path}" in out
    again = run(capsys, "plan", model)[1]
    assert f", saved in {path}" in again
    assert "measured now" not in again
    assert "for GPUs" not in again
    elsewhere = run(capsys, "plan", model, "--gpus", "8", "--costs", saved)[1]
    assert "for GPUs" not in elsewhere
    assert f"4 threads, {saved}" in elsewhere


def test_costs_that_cannot_be_saved_are_used(model, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "SIZES", (64, 128))
    monkeypatch.setattr("ww_train.cli.plan.cache_file", lambda here: None)
    assert "measured now, not saved" in run(capsys, "plan", model)[1]


def test_a_plan_is_written_beside_the_table(model, saved, tmp_path, capsys):
    path = tmp_path / "plan.json"
    code, out, _ = run(capsys, "plan", model, "--costs", saved, "--json", str(path))
    assert code == 0
    assert "projection" in out
    assert json.loads(path.read_text(encoding="utf-8"))["ranks"] == 1


def test_the_costs_of_the_cpu_are_measured_once(model, cache, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "SIZES", (64, 128))
    assert run(capsys, "plan", model)[0] == 0
    path = cache_file(machine(torch.device("cpu")))
    assert path.is_relative_to(cache)
    before = path.read_bytes()
    assert run(capsys, "plan", model, "--device", "cpu")[0] == 0
    assert path.read_bytes() == before


# configurations


@pytest.mark.parametrize("named", [True, False])
def test_a_configuration_has_the_shapes_of_the_model(tmp_path, saved, capsys, named):
    transformers = pytest.importorskip("transformers")
    folder = config(tmp_path)
    real = transformers.GPT2LMHeadModel(transformers.AutoConfig.from_pretrained(folder))
    path = str(folder if named else folder / "config.json")
    code, out, err = run(capsys, "plan", path, "--costs", saved, "--json", "-")
    assert (code, err) == (0, "")
    expected = scale(real.to(torch.bfloat16), paper())
    assert json.loads(out)["traps"] == asdict(expected.traps)
    assert "shares its weights" in json.loads(out)["skipped"][-1]["reason"]


@pytest.mark.parametrize(
    ("changes", "head"),
    [
        ({"architectures": None}, True),  # a language model, by its type
        ({"architectures": ["logging"]}, True),  # something else of that name
        ({"architectures": ["GPT2Model"]}, False),
    ],
)
def test_the_class_of_a_configuration(tmp_path, changes, head):
    pytest.importorskip("transformers")
    found = shapes(config(tmp_path, **changes))
    assert type(found).__name__ == ("GPT2LMHeadModel" if head else "GPT2Model")
    matrices = [m for m in weight_matrices(found) if isinstance(m, WeightMatrix)]
    assert len(matrices) == 10
    assert {m.dtype for m in matrices} == {torch.bfloat16}


def test_weights_are_preferred_to_a_configuration(tmp_path, saved, capsys, monkeypatch):
    folder = config(tmp_path)
    save_file({"only.weight": gaussian(50, 40, seed=1).float()}, folder / "model.safetensors")
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, _ = run(capsys, "plan", str(folder), "--costs", saved, "--json", "-")
    assert code == 0
    assert json.loads(out)["parameters"] == 2000


def test_a_hollow_model_has_every_shape_and_no_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10**6, 10**5), nn.Linear(10**5, 10**6), nn.Conv2d(8, 9, 3))
        model[1].weight = model[0].weight
    made = hollow(model)
    assert made[0].weight is made[1].weight
    assert made[0].weight.shape == (10**5, 10**6)
    assert all(p.untyped_storage().nbytes() == 4 for p in made.parameters())
    rows = describe(made)
    assert list(rows.N.dropna()) == [10**6, 9]


# calibrate


def test_calibrate_prints_and_saves(tmp_path, cache, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "SIZES", (64, 128))
    code, out, err = run(capsys, "calibrate")
    assert (code, err) == (0, "")
    path = cache_file(machine(torch.device("cpu")))
    assert path.is_relative_to(cache)
    costs = Costs.from_json(path.read_bytes())
    assert costs.machine == machine(torch.device("cpu"))
    lines = out.splitlines()
    header = lines[2].split()
    row = dict(zip(header, lines[4].split(), strict=False))
    assert row["n"] == "128"
    assert float(row["looped"]) == pytest.approx(1e3 * costs.looped(128), rel=1e-3)
    assert row["host"] == "-"
    assert costs.fastest(128, 64) in lines[4]
    assert str(path) in out


def test_calibrate_saves_elsewhere_or_prints_json(tmp_path, cache, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "SIZES", (64,))
    path = tmp_path / "here.json"
    assert run(capsys, "calibrate", "-o", str(path), "--device", "cpu")[0] == 0
    assert Costs.from_json(path.read_bytes()).looped.sizes == (64,)
    _, out, _ = run(capsys, "calibrate", "-o", "-")
    assert Costs.from_json(out).looped.sizes == (64,)
    assert not cache.exists()


def test_only_the_first_process_measures_and_prints(model, tmp_path, cache, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for argv in (("plan", model), ("calibrate",)):
        assert run(capsys, *argv) == (0, "", "")
    assert not cache.exists()


# bad input


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("plan", "MODEL", "--gpus", "0"), "a whole number above 0, not '0'"),
        (("plan", "MODEL", "--gpus", "2.5"), "a whole number above 0"),
        (("plan", "MODEL", "--overhead", "1.5"), "a share above 0"),
        (("plan", "MODEL", "--step-seconds", "nan"), "a number above 0"),
        (("plan", "MODEL", "--step-seconds", "-1"), "a number above 0"),
        (("plan", "MODEL", "--tokens-per-step", "1e6"), "go together"),
        (("plan", "MODEL", "--flops", "1e6"), "go together"),
        (
            ("plan", "MODEL", "--flops", "1", "--tokens-per-step", "1", "--step-seconds", "1"),
            "not both",
        ),
        (("plan", "MODEL", "--costs", "MISSING"), "No such file"),
        (("plan", "MODEL", "--costs", "TEXT"), "no costs as `ww-train calibrate` saves them"),
        (("plan", "MODEL", "--costs", "SAVED", "--device", "cpu"), "not allowed with"),
        (("plan", "MODEL", "--device", "cuda:99"), "PyTorch finds"),
        (("plan", "MODEL", "--costs", "SAVED", "--json", "MISSING/x"), "there is no folder"),
        (("plan", "MISSING", "--costs", "SAVED"), "no file or folder"),
        (("plan", "TEXT", "--costs", "SAVED"), "makes no model of it"),
        (("plan", "EMPTY", "--costs", "SAVED"), "there is no matrix"),
        (("plan",), "PATH"),
        (("calibrate", "-o", "MISSING/x"), "there is no folder"),
        (("calibrate", "--device", "tpu9"), "is no device"),
    ],
)
def test_bad_input_is_one_line_and_code_2(model, saved, tmp_path, capsys, argv, says):
    (tmp_path / "text.json").write_text("no JSON", encoding="utf-8")
    save_file({"bias": torch.zeros(3)}, tmp_path / "empty.safetensors")
    stand_for = {
        "MODEL": model,
        "SAVED": saved,
        "MISSING": str(tmp_path / "missing"),
        "TEXT": str(tmp_path / "text.json"),
        "EMPTY": str(tmp_path / "empty.safetensors"),
    }
    words = []
    for word in argv:
        name, slash, rest = word.partition("/")
        words.append(stand_for.get(name, name) + slash + rest)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert says in one_line(err)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "unheard-of"}, "unheard-of"),
        ({"model_type": None}, "model_type"),
        ({"n_embd": "many"}, "n_embd"),
        ({"n_embd": -3}, ""),
    ],
)
def test_a_configuration_that_is_none_is_one_line(tmp_path, saved, capsys, changes, says):
    pytest.importorskip("transformers")
    folder = config(tmp_path, **changes)
    code, out, err = run(capsys, "plan", str(folder), "--costs", saved)
    assert (code, out) == (2, "")
    assert "config.json: Transformers makes no model of it (" in one_line(err)
    assert says in err


def test_without_transformers_the_extra_is_named(tmp_path, saved, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = run(capsys, "plan", str(config(tmp_path)), "--costs", saved)
    assert (code, out) == (2, "")
    assert "pip install 'ww-train[huggingface]'" in one_line(err)


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 kB"), (1500, "1.5 kB"), (2_000_000, "2 MB"), (8.1e11, "810 GB")],
)
def test_sizes_have_units(nbytes, shown):
    assert size(nbytes) == shown


def test_help_has_examples(capsys):
    for command in ("plan", "calibrate"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0
        assert f"examples:\n  ww-train {command}" in out
