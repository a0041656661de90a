import copy
import hashlib
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ww_train.analysis import measure
from ww_train.editing.rewriting import rewrite_checkpoint
from ww_train.editing.rules import Top
from ww_train.editing.smoothing import smooth_checkpoint, smoothed
from ww_train.weights.matrices import CheckpointError, Skipped

from .oracles import gaussian

RULE = Top(0.3)


def weights():
    state = {f"layers.{i}.fc.weight": gaussian(30, 20, i) for i in range(3)}
    state["lstm.weight_ih_l0"] = gaussian(48, 11, 3)
    state["lstm.weight_hh_l0"] = gaussian(48, 12, 4).bfloat16()
    state["conv.weight"] = gaussian(16, 108, 5).view(16, 12, 3, 3)
    state["norm.weight"] = torch.ones(20)
    state["steps"] = torch.tensor(7)
    return state


SHARDS = {
    "model-00001-of-00002.safetensors": ["layers.0.fc.weight", "lstm.weight_ih_l0", "steps"],
    "model-00002-of-00002.safetensors": [
        *("layers.1.fc.weight", "layers.2.fc.weight", "lstm.weight_hh_l0"),
        *("conv.weight", "norm.weight"),
    ],
}


@pytest.fixture
def folder(tmp_path):
    """A sharded checkpoint as hubs have them, with files to be copied and some not to be."""
    source, state = tmp_path / "source", weights()
    (source / "1_Pooling").mkdir(parents=True)
    (source / "onnx").mkdir()
    for name, keys in SHARDS.items():
        save_file({key: state[key] for key in keys}, source / name, {"format": "pt"})
    weight_map = {key: name for name, keys in SHARDS.items() for key in keys}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "tokenizer.model", "README.md", "1_Pooling/config.json"):
        (source / name).write_text(name)
    for name in ("pytorch_model.bin", "onnx/model.onnx", ".hidden", "pytorch_model.bin.index.json"):
        (source / name).write_text("the old weights")
    return source


def fingerprint(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(p.relative_to(folder)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def load(folder):
    state = {}
    for name in SHARDS:
        state |= load_file(folder / name)
    return state


def test_the_shards_hold_what_smoothing_in_memory_gives(folder, tmp_path):
    before, out = fingerprint(folder), tmp_path / "new" / "smoothed"
    done = smooth_checkpoint(folder, out, rule=RULE)
    expected, in_memory = smoothed(weights(), rule=RULE)
    found = load(out)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)
    assert {x.name: x for x in done.layers} == {x.name: x for x in in_memory.layers}
    assert {x.name for x in done.layers} >= {"conv", "layers.2.fc", "lstm.weight_ih_l0.i"}
    assert fingerprint(folder) == before  # the source stays as it is, though it is mapped


def test_names_metadata_index_and_other_files_are_kept(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    smooth_checkpoint(folder, out, rule=RULE)
    for name, keys in SHARDS.items():
        with safe_open(out / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == set(keys)
    kept = ["config.json", "tokenizer.model", "README.md", "1_Pooling/config.json"]
    kept.append("model.safetensors.index.json")
    for name in kept:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert found == {*kept, *SHARDS}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_the_new_checkpoint_can_be_measured(folder, tmp_path):
    smooth_checkpoint(folder, tmp_path / "out", rule=RULE, layers="layers.1.fc")
    before, after = measure(folder), measure(tmp_path / "out")
    assert after["layers.1.fc"].spectrum.matrix_rank == 6 < 20
    for layer in before:
        if layer.name != "layers.1.fc":
            assert (after[layer.name].spectrum.evals == layer.spectrum.evals).all()


def test_layers_are_chosen_among_those_of_all_shards(folder, tmp_path):
    done = smooth_checkpoint(folder, tmp_path / "a", rule=RULE, layers=["layers.*", "-layers.0*"])
    assert [x.name for x in done.layers] == ["layers.1.fc", "layers.2.fc"]
    done = smooth_checkpoint(folder, tmp_path / "b", rule=RULE, types="conv2d")
    assert [x.name for x in done.layers] == ["conv"]
    with pytest.raises(ValueError, match="did you mean"):
        smooth_checkpoint(folder, tmp_path / "c", rule=RULE, layers="layer.1.fc")
    assert not (tmp_path / "c").exists()


def test_skipped_layers_come_with_their_reasons(tmp_path):
    state = {"a.weight": gaussian(30, 20), "b.weight": torch.full((30, 20), math.nan)}
    state |= {"c.weight": gaussian(30, 4), "d.weight": torch.ones(30, 20, dtype=torch.int8)}
    save_file(state, tmp_path / "model.safetensors")
    done = smooth_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", rule=RULE)
    assert [x.name for x in done.layers] == ["a"]
    reasons = {x.name: x.reason for x in done.skipped}
    assert "NaN" in reasons["b"]
    assert "min_evals=8" in reasons["c"]
    assert "int8" in reasons["d"]
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(new["d.weight"], state["d.weight"])


def test_codes_whose_scales_are_in_another_shard_are_left_alone(folder, tmp_path):
    codes, scales = folder / "model-00001-of-00002.safetensors", "layers.1.fc.weight_scale_inv"
    state = load_file(codes)
    save_file(state | {scales: torch.tensor([0.5])}, codes)
    other = folder / "model-00002-of-00002.safetensors"
    state = load_file(other)
    state["layers.1.fc.weight"] = state["layers.1.fc.weight"].to(torch.float8_e4m3fn)
    save_file(state, other)
    done = smooth_checkpoint(folder, tmp_path / "out", rule=RULE, layers="layers.*.fc")
    assert [x.name for x in done.layers] == ["layers.0.fc", "layers.2.fc"]
    assert done.skipped == (Skipped("layers.1.fc", "quantised"),)
    new = load_file(tmp_path / "out" / other.name)["layers.1.fc.weight"]
    assert torch.equal(new.float(), state["layers.1.fc.weight"].float())


def test_a_file_becomes_a_file(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    smooth_checkpoint(tmp_path / "model.safetensors", tmp_path / "small.safetensors", rule=RULE)
    expected, _ = smoothed(weights(), rule=RULE)
    found = load_file(tmp_path / "small.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(FileExistsError):
        smooth_checkpoint(tmp_path / "model.safetensors", tmp_path / "small.safetensors")


def test_a_failure_leaves_nothing_behind(folder, tmp_path):
    def fail(matrix):
        if matrix.name == "layers.2.fc":  # in the second shard
            raise RuntimeError("out of luck")
        return Skipped(matrix.name, "left alone")

    for out in ("new", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(RuntimeError, match="out of luck"):
            rewrite_checkpoint(folder, tmp_path / out, fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "source"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_what_is_there_is_not_overwritten(folder, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    for out in (full, full / "notes.txt", folder, folder / "inside"):
        with pytest.raises(FileExistsError):
            smooth_checkpoint(folder, out, rule=RULE)
    assert [p.name for p in full.iterdir()] == ["notes.txt"]


def damage_cut(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def damage_header(folder):
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"\xff" * 200)


def damage_missing(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()


def rewrite_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def damage_key(folder):
    name = "model-00001-of-00002.safetensors"
    rewrite_index(folder, lambda index: index["weight_map"].update({"norm.weight": name}))


def damage_path(folder):
    rewrite_index(folder, lambda index: index["weight_map"].update(steps="../x.safetensors"))


def damage_index(folder):
    rewrite_index(folder, lambda index: index.pop("weight_map"))


def damage_twice(folder):
    state = load_file(folder / "model-00001-of-00002.safetensors")
    save_file({**state, "conv.weight": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")


def damage_second_index(folder):
    (folder / "other.safetensors.index.json").write_text("{}")


def damage_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_cut, "cut short"),
        (damage_header, "model-00001-of-00002"),
        (damage_missing, "lacks model-00002-of-00002.safetensors"),
        (damage_key, "says that norm.weight is in model-00001-of-00002.safetensors, but it is not"),
        (damage_path, "'../x.safetensors', which is no .safetensors file beside it"),
        (damage_index, "is no index of shards"),
        (damage_twice, "both hold conv.weight"),
        (damage_second_index, "several checkpoints"),
        (damage_adapter, "is an adapter: merge it"),
    ],
)
def test_damaged_checkpoints_are_refused_before_anything_is_written(
    folder, tmp_path, damage, message
):
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        smooth_checkpoint(folder, tmp_path / "out", rule=RULE)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_paths_without_a_safetensors_checkpoint_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_bytes(b"weights")
    for path, message in (
        ("nowhere", "no file or folder"),
        ("empty", "holds no .safetensors file"),
        ("model.bin", "is no .safetensors file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            smooth_checkpoint(tmp_path / path, tmp_path / "out")
    for name in ("a", "b"):
        save_file({"w": gaussian(9, 9)}, tmp_path / "empty" / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="several checkpoints"):
        smooth_checkpoint(tmp_path / "empty", tmp_path / "out")


def test_links_are_followed(folder, tmp_path):
    blobs = tmp_path / "blobs"
    folder.rename(blobs)
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(path)
    smooth_checkpoint(folder, tmp_path / "out", rule=RULE)
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    expected, _ = smoothed(copy.deepcopy(weights()), rule=RULE)
    assert all(torch.equal(value, expected[key]) for key, value in load(tmp_path / "out").items())
