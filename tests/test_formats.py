"""One reader a format: names, layouts and values are those of the model in memory."""

import io
import json
import os
import pickle
import random
import re
import zipfile

import gguf
import h5py
import numpy as np
import onnx
import pytest
import torch
import torch.distributed.checkpoint as dcp
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from ww_train import Skipped, WeightMatrix, distances, measure, weight_matrices
from ww_train.weights.formats import naturally
from ww_train.weights.matrices import CheckpointError

from .oracles import Experts, gaussian


def model():
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(30, 12),
            "conv": nn.Conv2d(10, 12, (3, 2)),
            "attn": nn.MultiheadAttention(16, 4),
            "lstm": nn.LSTM(11, 12),
            "experts": Experts(),
            "norm": nn.LayerNorm(12),
            "fc": nn.Linear(20, 14),
        }
    )


def matrices(source):
    return {m.name: m for m in weight_matrices(source) if isinstance(m, WeightMatrix)}


def reasons(source):
    return {m.name: m.reason for m in weight_matrices(source) if isinstance(m, Skipped)}


def assert_same(source, expected):
    """Names, shapes, types and exact values of every layer, and nothing read before it is needed."""
    found, expected = matrices(source), matrices(expected)
    assert set(found) == set(expected)
    for name, matrix in found.items():
        other = expected[name]
        assert matrix.deferred
        assert (matrix.N, matrix.M, matrix.rf) == (other.N, other.M, other.rf)
        assert (matrix.dtype, matrix.scale) == (other.dtype, other.scale)
        assert matrix.layer_type == other.layer_type
        assert torch.equal(matrix.stack, other.stack)


def save_safetensors(state, path):
    save_file(state, path)


def save_torch(state, path):
    torch.save(state, path)


def save_lightning(state, path):
    torch.save({"epoch": 3, "state_dict": state, "optimizer_states": [{"m": gaussian(9, 9)}]}, path)


def save_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_npz(state, path):
    with path.open("wb") as file:
        np.savez(file, **{name: t.numpy() for name, t in state.items()})


def save_npz_compressed(state, path):
    with path.open("wb") as file:
        np.savez_compressed(file, **{name: t.numpy() for name, t in state.items()})


SAVERS = [
    save_safetensors,
    save_torch,
    save_lightning,
    save_legacy,
    save_npz,
    save_npz_compressed,
]


@pytest.mark.parametrize("save", SAVERS, ids=lambda save: save.__name__)
@pytest.mark.parametrize("name", ["model.bin", "weights"])
def test_a_file_gives_what_the_model_gives_whatever_it_is_called(tmp_path, save, name):
    state = model().state_dict()
    save(state, tmp_path / name)
    assert_same(tmp_path / name, state)
    assert_same(str(tmp_path / name), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("save", [save_safetensors, save_torch, save_legacy])
def test_the_values_have_the_type_of_the_file(tmp_path, save, dtype):
    state = {"a.weight": gaussian(20, 12).to(dtype)}
    save(state, tmp_path / "w")
    assert_same(tmp_path / "w", state)


def test_views_and_memory_formats_of_a_torch_file(tmp_path):
    wide = gaussian(30, 24)
    state = {
        "columns.weight": wide[:, 3:15],
        "transposed.weight": wide.t(),
        "rows.weight": wide[10:25],
        "conv.weight": gaussian(12, 10 * 9)
        .view(12, 10, 3, 3)
        .to(memory_format=torch.channels_last),
    }
    torch.save(state, tmp_path / "w.pt")
    assert_same(tmp_path / "w.pt", {name: t.contiguous() for name, t in state.items()})


@pytest.mark.parametrize("save", [save_torch, save_legacy])
def test_tied_weights_of_a_torch_file_come_once(tmp_path, save):
    net = nn.ModuleDict({"embed": nn.Embedding(30, 12), "head": nn.Linear(12, 30, bias=False)})
    net["head"].weight = net["embed"].weight
    save(net.state_dict(), tmp_path / "w.bin")
    assert list(matrices(tmp_path / "w.bin")) == ["embed"]
    assert reasons(tmp_path / "w.bin") == {"head": "shares its weights with embed"}


def test_a_safetensors_file_is_in_the_order_of_its_numbers(tmp_path):
    state = {f"layers.{i}.fc.weight": gaussian(9, 8, seed=i) for i in range(12)}
    save_file(state, tmp_path / "w.safetensors")
    assert list(matrices(tmp_path / "w.safetensors")) == [f"layers.{i}.fc" for i in range(12)]
    assert naturally(["a10", "a9", "a", "b1", "10", "9"]) == ["9", "10", "a", "a9", "a10", "b1"]


@pytest.mark.parametrize("saved", [gaussian(20, 12), np.float64(gaussian(20, 12).numpy())])
def test_a_single_array_is_named_w(tmp_path, saved):
    path = tmp_path / "w.npy"
    if isinstance(saved, torch.Tensor):
        torch.save(saved, path)
    else:
        np.save(path, saved)
    assert_same(path, saved)


@pytest.mark.parametrize(
    "turn",
    [np.asfortranarray, lambda w: w.astype(">f4"), lambda w: w.astype(np.longdouble)],
    ids=["fortran", "big endian", "long double"],
)
def test_arrays_of_any_layout(tmp_path, turn):
    array = turn(gaussian(20, 12).numpy())
    np.save(tmp_path / "w.npy", array)
    (matrix,) = matrices(tmp_path / "w.npy").values()
    assert np.array_equal(matrix.stack[0].numpy(), array.astype(matrix.stack.numpy().dtype))


def test_float8_codes_without_scales_are_the_weights(tmp_path):
    codes = gaussian(20, 12).to(torch.float8_e4m3fn)
    save_file({"a.weight": codes}, tmp_path / "w.safetensors")
    (matrix,) = matrices(tmp_path / "w.safetensors").values()
    assert torch.equal(matrix.stack[0].float(), codes.float())


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize(
    ("scale", "literal"),
    [
        (torch.tensor(3.0), lambda i, j: 0),
        (torch.tensor([3.0]), lambda i, j: 0),
        (torch.arange(1.0, 301), lambda i, j: i),
        (torch.arange(1.0, 301)[:, None], lambda i, j: i),
        (torch.arange(1.0, 7).view(3, 2), lambda i, j: i // 128 * 2 + j // 128),
        (torch.arange(1.0, 11).view(5, 2), lambda i, j: i // 64 * 2 + j // 128),
    ],
    ids=["scalar", "one", "row vector", "rows", "blocks", "oblong blocks"],
)
def test_float8_codes_are_scaled(tmp_path, name, scale, literal):
    codes = gaussian(300, 200).to(torch.float8_e4m3fn)
    state = {"a.weight": codes, f"a.{name}": scale}
    save_file(state, tmp_path / "w.safetensors")
    factors = [[literal(i, j) for j in range(200)] for i in range(300)]
    expected = codes.float() * scale.flatten()[torch.tensor(factors)]
    for source in (state, tmp_path / "w.safetensors"):
        (matrix,) = matrices(source).values()
        assert (matrix.name, matrix.dtype, matrix.read_only) == ("a", torch.float32, "quantised")
        assert torch.equal(matrix.stack[0], expected)
        assert reasons(source) == {}


def test_float8_scales_that_fit_no_block_skip_the_layer(tmp_path):
    state = {
        "a.weight": gaussian(30, 20).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.ones(7, 3),
    }
    save_file(state, tmp_path / "w.safetensors")
    assert matrices(tmp_path / "w.safetensors") == {}
    assert "scales of shape (7, 3)" in reasons(tmp_path / "w.safetensors")["a"]


def test_integer_codes_are_skipped(tmp_path):
    save_file({"a.qweight": torch.ones(20, 12, dtype=torch.int32)}, tmp_path / "w.safetensors")
    assert reasons(tmp_path / "w.safetensors") == {
        "a.qweight": "quantised or integer codes (torch.int32)"
    }


def test_an_export_archive(tmp_path):
    net = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 12))
    program = torch.export.export(net, (torch.ones(1, 12),))
    torch.export.save(program, tmp_path / "model.pt2")
    assert_same(tmp_path / "model.pt2", net)


class Grouped(nn.Module):
    """Convolutions with and without groups, a tied weight and a buffer."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(12, 16, 3)
        self.grouped = nn.Conv2d(16, 24, 3, groups=2)
        self.up = nn.ConvTranspose2d(24, 20, 2, groups=2)
        self.depth = nn.Conv2d(20, 20, 3, groups=20)
        self.fc = nn.Linear(20, 18)
        self.register_buffer("table", gaussian(18, 18))

    def forward(self, x):
        x = self.depth(self.up(self.grouped(self.plain(x))))
        return self.fc(x.mean((2, 3))) @ self.table


def export_as(version, program, path):
    """An archive as torch.export.save of another version of torch wrote it."""
    from torch._export.serde.serialize import serialize

    if version == "now":
        torch.export.save(program, path)
        return
    artifact = serialize(program)
    if version == "2.7":
        members = {
            "serialized_exported_program.json": artifact.exported_program,
            "serialized_state_dict.pt": artifact.state_dict,
            "serialized_constants.pt": artifact.constants,
            "serialized_example_inputs.pt": artifact.example_inputs,
            "version": "8.2",
        }
    else:
        members = {
            "m/archive_format": "pt2",
            "m/archive_version": "0",
            "m/models/model.json": artifact.exported_program,
            "m/data/weights/model.pt": artifact.state_dict,
            "m/data/constants/model.pt": artifact.constants,
            "m/data/sample_inputs/model.pt": artifact.example_inputs,
            "m/byteorder": "little",
            "m/.data/version": "3",
            "m/.data/serialization_id": "0",
        }
    kind = zipfile.ZIP_DEFLATED if version.endswith("compressed") else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", ["2.7", "2.8", "2.8 compressed", "now"])
def test_export_archives_of_all_versions_with_groups_of_convolutions(tmp_path, version):
    net, path = Grouped(), tmp_path / "model.pt2"
    program = torch.export.export(net, (torch.ones(1, 12, 8, 8),))
    export_as(version, program, path)
    if version != "2.8 compressed":
        loaded = torch.export.load(path).state_dict  # torch reads what was written here too
        assert torch.equal(loaded["grouped.weight"], net.grouped.weight)
    assert_same(path, net)
    assert matrices(path)["grouped"].shape == (18, 12, 8)
    assert matrices(path)["up"].shape == (8, 12, 10)
    assert "depthwise" in reasons(path)["depth"]
    assert "table" not in matrices(path)


def test_a_grouped_convolution_is_never_compared_with_one_read_without_its_groups(tmp_path):
    net, path = Grouped(), tmp_path / "w.safetensors"
    save_file(net.state_dict(), path)
    assert matrices(net)["grouped"].shape == (18, 12, 8)
    assert matrices(path)["grouped"].shape == (9, 24, 8)  # the file does not say
    assert set(matrices(net)) == set(matrices(path)) - {"table"}
    found = distances(net, path)
    assert {layer.name for layer in found.layers} == {"plain", "fc"}
    assert {layer.name for layer in found.matching.reshaped} == {"grouped", "up"}
    for model, base in ((net, path), (path, net)):
        skipped = {x.name: x.reason for x in measure(model, base_model=base).skipped}
        assert "in the base model" in skipped["grouped"]
        assert "in the base model" in skipped["up"]


def test_an_old_export_archive_runs_no_code(tmp_path):
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        buffer = io.BytesIO()
        torch.save({"fc.weight": Grouped()}, buffer)
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", buffer.getvalue())
    with pytest.raises(CheckpointError, match="Python objects that could run code"):
        matrices(path)


def test_an_export_archive_without_weights_says_so(tmp_path):
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/data/aotinductor/model/model.so", "code")
    with pytest.raises(CheckpointError, match="compiled code, perhaps"):
        matrices(path)


def test_a_safetensors_header_whose_length_begins_as_a_pickle(tmp_path):
    for length in range(1, 300):
        save_file({"x" * length: gaussian(12, 10)}, tmp_path / "w.safetensors")
        if (tmp_path / "w.safetensors").read_bytes()[:1] == b"\x80":
            break
    else:
        pytest.fail("no header of such a length")
    assert list(matrices(tmp_path / "w.safetensors")) == ["x" * length]


# torch.distributed.checkpoint


@pytest.mark.filterwarnings("ignore")
def save_dcp(state, path):
    dcp.save(state, checkpoint_id=path, no_dist=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_a_distributed_checkpoint(tmp_path, key):
    state = model().state_dict()
    tree = state if key is None else {key: state, "optim": {"exp_avg": gaussian(20, 20)}}
    save_dcp(tree, tmp_path / "dcp")
    assert_same(tmp_path / "dcp", state)


def write_chunks(folder, name, whole, cuts):
    """A folder as several processes write it, each its rectangle of one tensor."""
    chunks, storage, offset = [], {}, 0
    with (folder / "__0_0.distcp").open("wb") as file:
        for rows, columns in cuts:
            corner, part = torch.Size([rows.start, columns.start]), whole[rows, columns].clone()
            torch.save(part, file)
            chunks.append(dcp.metadata.ChunkStorageMetadata(corner, part.shape))
            info = dcp.filesystem._StorageInfo("__0_0.distcp", offset, file.tell() - offset)
            storage[dcp.metadata.MetadataIndex(name, corner)] = info
            offset = file.tell()
    properties = dcp.metadata.TensorProperties(dtype=whole.dtype)
    entry = dcp.metadata.TensorStorageMetadata(properties, whole.shape, chunks)
    metadata = dcp.metadata.Metadata({name: entry}, {name: (name,)}, storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_the_chunks_of_a_sharded_tensor_are_put_together(tmp_path):
    whole = gaussian(21, 12)
    top, bottom, left, right = slice(0, 11), slice(11, 21), slice(0, 7), slice(7, 12)
    cuts = [(top, left), (bottom, left), (top, right), (bottom, right)]
    write_chunks(tmp_path, "a.weight", whole, cuts)
    assert_same(tmp_path, {"a.weight": whole})
    (tmp_path / "__0_0.distcp").write_bytes(b"PK")
    assert "copy the folder again" in measure(tmp_path).skipped[0].reason


@pytest.mark.filterwarnings("ignore")
def test_distributed_metadata_that_would_run_code_is_refused(tmp_path):
    save_dcp({"a.weight": gaussian(20, 12)}, tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="may run code"):
        matrices(tmp_path / "dcp")
    assert not (tmp_path / "ran").exists()


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [save_torch, save_legacy])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, save):
    save({"a.weight": gaussian(20, 12), "x": Evil(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"could run code.*state_dict\(\) alone") as error:
        matrices(tmp_path / "w.pt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_pickled_objects_in_a_numpy_file_are_refused(tmp_path):
    np.save(tmp_path / "w.npy", np.array([Evil(tmp_path / "ran")]), allow_pickle=True)
    assert "object" in next(iter(reasons(tmp_path / "w.npy").values()))
    assert not (tmp_path / "ran").exists()


# GGUF


def write_gguf(path, tensors, arch="llama"):
    writer = gguf.GGUFWriter(str(path), arch)
    for name, (array, kind) in tensors.items():
        data = array if kind is None else gguf.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_tensors_are_dequantised_and_named_as_in_transformers(tmp_path):
    w = {name: gaussian(64, 96, seed=i).numpy() for i, name in enumerate("qkod")}
    kinds = gguf.GGMLQuantizationType
    tensors = {
        "token_embd.weight": (w["q"], None),
        "blk.10.attn_q.weight": (w["k"], kinds.F16),
        "blk.10.ffn_down.weight": (w["o"], kinds.Q8_0),
        "blk.10.attn_output.weight": (w["d"], kinds.BF16),
        "blk.10.attn_norm.weight": (np.ones(96, np.float32), None),
        "output.weight": (w["d"], kinds.Q4_0),
    }
    write_gguf(tmp_path / "model.gguf", tensors)
    found = matrices(tmp_path / "model.gguf")
    assert list(found) == [
        "model.embed_tokens",
        "model.layers.10.self_attn.q_proj",
        "model.layers.10.mlp.down_proj",
        "model.layers.10.self_attn.o_proj",
        "lm_head",
    ]
    embed, q, down, o, head = found.values()
    assert embed.layer_type == "embedding"
    assert np.array_equal(embed.stack[0].numpy(), w["q"])
    assert np.array_equal(q.stack[0].numpy(), w["k"].astype(np.float16))
    assert torch.equal(o.stack[0], torch.from_numpy(w["d"]).bfloat16())
    for matrix, name, kind in ((down, "o", kinds.Q8_0), (head, "d", kinds.Q4_0)):
        expected = gguf.quants.dequantize(gguf.quants.quantize(w[name], kind), kind)
        assert matrix.read_only == "quantised"
        assert np.array_equal(matrix.stack[0].numpy(), expected)


def test_gguf_experts_are_layers_and_other_architectures_keep_their_names(tmp_path):
    experts = gaussian(3 * 20, 32).numpy().reshape(3, 20, 32)
    tensors = {"blk.0.ffn_gate_exps.weight": (experts, gguf.GGMLQuantizationType.Q8_0)}
    write_gguf(tmp_path / "w", {**tensors, "token_embd.weight": (experts[0], None)}, "gpt2")
    found = matrices(tmp_path / "w")
    assert list(found) == [*(f"blk.0.ffn_gate_exps.{i}" for i in range(3)), "token_embd"]
    codes = gguf.quants.quantize(experts, gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.quants.dequantize(codes, gguf.GGMLQuantizationType.Q8_0)
    for i in range(3):
        assert np.array_equal(found[f"blk.0.ffn_gate_exps.{i}"].stack[0].numpy(), expected[i])


# ONNX


def onnx_model(weights, external=None):
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["h"], name="/conv/Conv"),
        helper.make_node("MatMul", ["h", "onnx::MatMul_12"], ["y"], name="/encoder/fc/MatMul"),
        helper.make_node("Gemm", ["y", "w3"], ["z"], name="/Gemm"),
    ]
    initializers = [numpy_helper.from_array(w, name) for name, w in weights.items()]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xz"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    return helper.make_model(graph)


@pytest.mark.parametrize("external", [False, True])
def test_onnx_initialisers(tmp_path, external):
    weights = {
        "conv.weight": gaussian(12, 90).numpy().reshape(12, 10, 3, 3),
        "onnx::MatMul_12": gaussian(20, 14, seed=1).numpy(),
        "w3": gaussian(14, 9, seed=2).numpy(),
        "unused": gaussian(9, 9).numpy(),
    }
    path = tmp_path / "model.onnx"
    options = {"save_as_external_data": True, "location": "data", "size_threshold": 0}
    onnx.save(onnx_model(weights), str(path), **(options if external else {}))
    weights["encoder.fc.weight"] = weights.pop("onnx::MatMul_12")
    weights["w3.weight"] = weights.pop("w3")
    del weights["unused"]
    assert_same(path, weights)
    if external:
        (tmp_path / "data").unlink()
        report = measure(path)
        assert len(report) == 0
        assert "keep its data beside it" in report.skipped[0].reason


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_onnx_says_the_groups_of_a_convolution(tmp_path, kind):
    net = nn.ModuleDict({"conv": kind(24, 20, 3, groups=2)})
    weight = net["conv"].weight.detach().numpy()
    operator = "Conv" if kind is nn.Conv2d else "ConvTranspose"
    node = helper.make_node(operator, ["x", "conv.weight"], ["h"], group=2)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xh"]
    initializers = [numpy_helper.from_array(weight, "conv.weight")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], initializers)
    onnx.save(helper.make_model(graph), str(tmp_path / "model.onnx"))
    assert_same(tmp_path / "model.onnx", net)


# Keras, in the layout of Keras 3.15's own files

KERNELS = {
    "layers/conv2d": ("first", [(3, 2, 10, 12), (12,)]),
    "layers/conv2d_transpose": ("up", [(2, 2, 9, 12), (9,)]),
    "layers/depthwise_conv2d": ("depth", [(3, 3, 12, 1), (12,)]),
    "layers/embedding": ("tokens", [(30, 12)]),
    "layers/multi_head_attention/query_dense": ("query", [(10, 2, 9), (2, 9)]),
    "layers/multi_head_attention/output_dense": ("attention_output", [(2, 9, 10), (10,)]),
    "layers/conv1d": ("line", [(3, 10, 11), (11,)]),
    "layers/lstm/cell": ("lstm_cell", [(11, 36), (9, 36), (36,)]),
    "layers/dense": ("head", [(14, 20), (20,)]),
    "layers/conv2d_1": ("branches", [(3, 3, 10, 24), (24,)]),
}
LAYERS = {"layers/multi_head_attention": "attn", "layers/lstm": "rec"}


def write_keras(path):
    """A .keras archive; the kernels by group."""
    rng, kernels, buffer = np.random.default_rng(0), {}, io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for group, name in LAYERS.items():
            file.create_group(f"{group}/vars").attrs["name"] = name
        for group, (name, shapes) in KERNELS.items():
            variables = file.create_group(f"{group}/vars")
            variables.attrs["name"] = name
            kernels[group] = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
            for i, values in enumerate(kernels[group]):
                variables[str(i)] = values
        file.create_group("optimizer/vars")["0"] = np.ones((9, 9))
    order = ["head", "first", "tokens", "up", "depth", "attn", "line", "rec"]
    layers = [{"config": {"name": name}} for name in order]
    layers.append({"config": {"name": "branches", "groups": 2}})
    config = {"config": {"layers": layers}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", buffer.getvalue())
    (path.parent / "model.weights.h5").write_bytes(buffer.getvalue())
    return kernels


def test_keras_kernels_are_turned_to_the_layout_of_torch(tmp_path):
    kernels = write_keras(tmp_path / "model.keras")
    expected = {
        "head.weight": kernels["layers/dense"][0].T,
        "first.weight": kernels["layers/conv2d"][0].transpose(3, 2, 0, 1),
        "tokens.weight": kernels["layers/embedding"][0],
        "up.weight": kernels["layers/conv2d_transpose"][0].transpose(3, 2, 0, 1),
        "attn.attention_output.weight": kernels["layers/multi_head_attention/output_dense"][0]
        .reshape(18, 10)
        .T,
        "attn.query.weight": kernels["layers/multi_head_attention/query_dense"][0]
        .reshape(10, 18)
        .T,
        "line.weight": kernels["layers/conv1d"][0].transpose(2, 1, 0),
        "rec.lstm_cell.weight": kernels["layers/lstm/cell"][0].T,
        "rec.lstm_cell.recurrent_kernel.weight": kernels["layers/lstm/cell"][1].T,
    }
    found = matrices(tmp_path / "model.keras")
    branches = found.pop("branches")
    kernel = torch.from_numpy(kernels["layers/conv2d_1"][0])
    literal = [part[i, j].T for part in kernel.chunk(2, 3) for i in range(3) for j in range(3)]
    assert sorted(x.tolist() for x in branches.stack) == sorted(x.tolist() for x in literal)
    assert list(found) == [name.removesuffix(".weight") for name in expected]
    for name, matrix in found.items():
        other = matrices({f"{name}.weight": expected[f"{name}.weight"].copy()})[name]
        assert torch.equal(matrix.stack, other.stack)
        assert matrix.scale == other.scale
    assert "depthwise" in reasons(tmp_path / "model.keras")["depth"]
    assert set(matrices(tmp_path / "model.weights.h5")) == {*found, "branches"}


def test_a_keras_model_in_the_old_hdf5_format(tmp_path):
    kernel, conv = gaussian(12, 14).numpy(), gaussian(90, 12).numpy().reshape(3, 3, 10, 12)
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file["model_weights/fc/fc/kernel:0"] = kernel
        file["model_weights/fc/fc/bias:0"] = np.ones((3, 14))
        file["model_weights/conv/conv/kernel"] = conv
        file["optimizer_weights/adam/m"] = np.ones((9, 9))
    found = matrices(tmp_path / "model.h5")
    assert list(found) == ["conv", "fc"]
    assert np.array_equal(found["fc"].stack[0].numpy(), kernel.T)
    assert found["conv"].shape == (9, 12, 10)


# Damage


def damaged(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.97])
@pytest.mark.parametrize(
    "write",
    [
        *SAVERS,
        lambda state, path: write_gguf(path, {"a.weight": (gaussian(64, 96).numpy(), None)}),
        lambda state, path: (
            write_keras(path.with_name("x.keras")) and os.replace(path.with_name("x.keras"), path)
        ),
        lambda state, path: (
            write_keras(path.with_name("x.keras"))
            and os.replace(path.with_name("model.weights.h5"), path)
        ),
    ],
    ids=[*(save.__name__ for save in SAVERS), "gguf", "keras", "h5"],
)
def test_a_file_cut_short_is_an_error_of_one_line(tmp_path, write, keep):
    path = tmp_path / "w.bin"
    write(model().state_dict(), path)
    damaged(path, int(keep * path.stat().st_size))
    try:
        text = measure(path).skipped[-1].reason  # found when it is read
    except CheckpointError as error:
        text = str(error)
    assert re.search("cut short|damaged|download|no format", text)
    assert "\n" not in text


@pytest.mark.parametrize("save", [*SAVERS, "onnx", "dcp"], ids=lambda s: getattr(s, "__name__", s))
@pytest.mark.filterwarnings("ignore")
def test_changed_bytes_are_an_error_of_one_line_or_other_values(tmp_path, save):
    state, generator = {"a.weight": gaussian(20, 12)}, random.Random(0)
    path = target = tmp_path / "model.onnx"
    if save == "onnx":
        weights = ((90, "conv.weight"), (14, "onnx::MatMul_12"), (9, "w3"))
        onnx.save(onnx_model({name: gaussian(12, n).numpy() for n, name in weights}), str(path))
    elif save == "dcp":
        save_dcp(state, tmp_path / "dcp")
        path, target = tmp_path / "dcp", tmp_path / "dcp" / ".metadata"
    else:
        path = target = tmp_path / "w"
        save(state, path)
    whole = target.read_bytes()
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(generator.choice([1, 3, 20])):
            changed[generator.randrange(len(whole))] = generator.randrange(256)
        target.write_bytes(changed)
        try:
            texts = [layer.reason for layer in measure(path).skipped]
        except CheckpointError as error:
            texts = [str(error)]
        assert all("\n" not in text for text in texts)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a.weight": 3}',
        b'{"a.weight": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 4]}}',
        b'{"a.weight": {"dtype": "F32", "shape": [9, 9], "data_offsets": [-4, 320]}}',
        b'{"a.weight": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 9999]}}',
        b'{"a.weight": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
    ],
)
def test_a_damaged_header_of_safetensors(tmp_path, header):
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(400))
    with pytest.raises(CheckpointError, match=r"damaged|cut short"):
        matrices(path)


def test_a_type_that_torch_does_not_have_skips_only_its_tensor(tmp_path):
    entry = '"%s": {"dtype": "%s", "shape": [9, 9], "data_offsets": [%d, %d]}'
    header = "{" + entry % ("a", "F7", 0, 80) + "," + entry % ("b", "F32", 80, 404) + "}"
    path = tmp_path / "w.safetensors"
    values = np.ones((9, 9), np.float32).tobytes()
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(80) + values)
    assert reasons(path) == {"a": "stored as F7, which cannot be read"}
    assert torch.equal(matrices(path)["b"].stack, torch.ones(1, 9, 9))


@pytest.mark.parametrize("saved", [[1, 2], 3, None, "text"])
def test_a_pickle_that_holds_no_state_dict(tmp_path, saved):
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=f"holds a {type(saved).__name__}, no state dict"):
        matrices(tmp_path / "w.pt")
