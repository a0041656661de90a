import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, prune

from ww_train.weights.matrices import (
    Deferred,
    Skipped,
    WeightMatrix,
    layer_name,
    slices,
    weight_matrices,
)

from .oracles import Experts, gaussian, zoo


def matrices(source):
    return [m for m in weight_matrices(source) if isinstance(m, WeightMatrix)]


def names(source):
    return [m.name for m in matrices(source)]


def skipped(source):
    return {m.name: m.reason for m in weight_matrices(source) if isinstance(m, Skipped)}


def as_set(slices):
    return {tuple(s.flatten().tolist()) for s in slices}


def test_dense_weight_is_the_stack_itself():
    layer = nn.Sequential(nn.Linear(12, 20))
    (matrix,) = matrices(layer)
    assert (matrix.name, matrix.layer_type, matrix.scale) == ("0", "dense", 1.0)
    assert (matrix.N, matrix.M, matrix.rf, matrix.num_evals) == (20, 12, 1, 12)
    assert torch.equal(matrix.stack, layer[0].weight[None])
    assert not matrix.stack.requires_grad


@pytest.mark.parametrize("layer", [nn.Embedding(30, 12), nn.EmbeddingBag(30, 12)])
def test_embedding(layer):
    (matrix,) = matrices(nn.Sequential(layer))
    assert (matrix.layer_type, matrix.N, matrix.M) == ("embedding", 30, 12)


@pytest.mark.parametrize(
    ("conv", "kind", "positions"),
    [
        (nn.Conv1d(10, 12, 3), "conv1d", 3),
        (nn.Conv2d(10, 12, (3, 2)), "conv2d", 6),
        (nn.Conv3d(10, 12, (1, 2, 3)), "conv3d", 6),
        (nn.Conv2d(10, 12, 1), "conv2d", 1),
    ],
)
def test_convolution_has_one_slice_for_each_kernel_position(conv, kind, positions):
    (matrix,) = matrices(nn.Sequential(conv))
    assert (matrix.layer_type, matrix.rf, matrix.N, matrix.M) == (kind, positions, 12, 10)
    assert matrix.num_evals == positions * 10
    assert matrix.scale == pytest.approx(0.5**0.5)
    literal = conv.weight.detach().reshape(12, 10, positions)
    assert as_set(matrix.stack) == as_set(literal[:, :, k] for k in range(positions))


def test_transposed_convolution_has_the_input_channels_first():
    conv = nn.ConvTranspose2d(10, 12, 2)
    (matrix,) = matrices(nn.Sequential(conv))
    w = conv.weight.detach()
    assert matrix.stack.shape == (4, 10, 12)
    assert as_set(matrix.stack) == as_set(w[:, :, i, j] for i in range(2) for j in range(2))


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_convolution_has_one_slice_for_each_group_and_position(transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(8, 8, 3, groups=2)
    (matrix,) = matrices(nn.Sequential(conv))
    literal = [
        part[:, :, i, j]
        for part in conv.weight.detach().chunk(2)
        for i in range(3)
        for j in range(3)
    ]
    assert matrix.stack.shape == (18, 4, 4)
    assert as_set(matrix.stack) == as_set(literal)


@pytest.mark.parametrize("conv", [nn.Conv2d(16, 16, 3, groups=16), nn.Conv1d(8, 16, 5, groups=8)])
@pytest.mark.parametrize("from_state_dict", [False, True])
def test_depthwise_convolution_is_skipped(conv, from_state_dict):
    model = nn.Sequential(conv)
    source = model.state_dict() if from_state_dict else model
    assert names(source) == []
    assert "depthwise" in skipped(source)["0"]


@pytest.mark.parametrize("from_state_dict", [False, True])
def test_attention_projections_are_three_layers(from_state_dict):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 4)})
    q, k, v, out = matrices(model.state_dict() if from_state_dict else model)
    assert [q.name, k.name, v.name, out.name] == [
        "attn.in_proj_weight.q",
        "attn.in_proj_weight.k",
        "attn.in_proj_weight.v",
        "attn.out_proj",
    ]
    assert torch.equal(
        torch.cat([q.stack[0], k.stack[0], v.stack[0]]), model["attn"].in_proj_weight
    )
    assert q.layer_type == "attention"


def test_attention_with_separate_projections():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 4, kdim=12, vdim=10)})
    assert names(model) == [f"attn.{p}_proj_weight" for p in "qkv"] + ["attn.out_proj"]


GATES = [
    (nn.LSTM(11, 12), "ifgo"),
    (nn.GRU(11, 12), "rzn"),
    (nn.LSTMCell(11, 12), "ifgo"),
    (nn.GRUCell(11, 12), "rzn"),
    (nn.LSTM(16, 12), "ifgo"),  # 48 rows are also three times its 16 inputs
    (nn.GRU(12, 12), "rzn"),
]


@pytest.mark.parametrize(("layer", "gates"), GATES)
@pytest.mark.parametrize("from_state_dict", [False, True])
def test_recurrent_weights_are_one_layer_for_each_gate(layer, gates, from_state_dict):
    model = nn.ModuleDict({"rec": layer})
    found = {m.name: m for m in matrices(model.state_dict() if from_state_dict else model)}
    parameters = {f"rec.{k}": p for k, p in layer.named_parameters() if p.ndim == 2}
    assert list(found) == [f"{name}.{gate}" for name in parameters for gate in gates]
    for name, parameter in parameters.items():
        parts = [found[f"{name}.{gate}"].stack[0] for gate in gates]
        assert torch.equal(torch.cat(parts), parameter)
        assert all(part.shape[0] == 12 for part in parts)


@pytest.mark.parametrize("layer", [nn.RNN(11, 12), nn.RNNCell(11, 12)])
@pytest.mark.parametrize("from_state_dict", [False, True])
def test_plain_recurrent_weights_are_not_split(layer, from_state_dict):
    model = nn.ModuleDict({"rec": layer})
    found = matrices(model.state_dict() if from_state_dict else model)
    assert [m.stack.shape for m in found] == [(1, 12, 11), (1, 12, 12)]


@pytest.mark.parametrize("layer", [nn.LSTM(10, 12), nn.LSTM(16, 12), nn.GRU(10, 12)])
def test_recurrent_layer_at_the_root_of_a_state_dict(layer):
    assert names(layer.state_dict()) == names(layer)


def test_recurrent_projection_is_one_matrix():
    layer = nn.LSTM(11, 16, proj_size=9)
    found = {m.name: m.stack.shape for m in matrices(nn.ModuleDict({"rec": layer}))}
    assert found["rec.weight_hr_l0"] == (1, 9, 16)
    assert found["rec.weight_hh_l0.i"] == (1, 16, 9)


def test_bilinear_pools_one_slice_for_each_output():
    layer = nn.Bilinear(10, 12, 5)
    (matrix,) = matrices(nn.Sequential(layer))
    assert (matrix.layer_type, matrix.scale, matrix.rf) == ("bilinear", 1.0, 5)
    assert torch.equal(matrix.stack, layer.weight)


@pytest.mark.parametrize("from_state_dict", [False, True])
def test_each_fused_expert_is_a_layer(from_state_dict):
    model = nn.ModuleDict({"mlp": Experts()})
    found = matrices(model.state_dict() if from_state_dict else model)
    assert [m.name for m in found] == [f"mlp.gate_up_proj.{i}" for i in range(3)]
    assert all(m.layer_type == "expert" for m in found)
    assert torch.equal(torch.cat([m.stack for m in found]), model["mlp"].gate_up_proj)


def test_huggingface_conv1d_is_dense():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="no transformers")
    layer = pytorch_utils.Conv1D(24, 12)  # weight is (inputs, outputs)
    (matrix,) = matrices(nn.ModuleDict({"c_attn": layer}))
    assert (matrix.name, matrix.layer_type) == ("c_attn", "dense")
    assert torch.equal(matrix.stack[0], layer.weight)


@pytest.mark.parametrize(
    ("layer", "weight"),
    [
        (parametrizations.weight_norm(nn.Linear(12, 10)), (1, 10, 12)),
        (parametrizations.spectral_norm(nn.Linear(12, 10)), (1, 10, 12)),
        (parametrizations.orthogonal(nn.Linear(12, 10)), (1, 10, 12)),
        (parametrizations.weight_norm(nn.Conv2d(9, 10, 3)), (9, 10, 9)),
    ],
)
def test_parametrized_weight_is_the_effective_one_and_read_only(layer, weight):
    model = nn.Sequential(layer.eval())
    (matrix,) = matrices(model)
    assert (matrix.name, tuple(matrix.stack.shape)) == ("0", weight)
    assert "parametrization" in matrix.read_only
    flat = layer.weight.detach().flatten(2) if layer.weight.ndim > 2 else layer.weight[..., None]
    assert as_set(matrix.stack) == as_set(flat.unbind(-1))


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune"])
def test_a_weight_computed_by_a_hook_is_the_effective_one_and_read_only(kind):
    layer = nn.Linear(12, 10).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the first two
        if kind == "prune":
            layer = prune.random_unstructured(layer, "weight", 0.5)
        else:
            layer = getattr(nn.utils, kind)(layer)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    (matrix,) = matrices(nn.Sequential(layer))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert matrix.name == "0"
    assert "hook" in matrix.read_only
    layer.eval()(torch.ones(1, 12))  # evaluation mode: the spectral norm is not advanced
    torch.testing.assert_close(matrix.stack[0], layer.weight.detach())


def test_a_normalisation_over_two_dimensions_is_no_matrix():
    model = nn.Sequential(nn.LayerNorm((12, 10)))
    assert names(model) == []
    assert "normalisation" in skipped(model)["0"]


@pytest.mark.parametrize(
    ("parameter", "name"),
    [
        ("encoder.0.fc1.weight", "encoder.0.fc1"),
        ("weight", "weight"),
        ("attn.in_proj_weight", "attn.in_proj_weight"),
        ("_orig_mod.fc.weight", "fc"),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module.fc.weight", "a.fc"),
        ("a._checkpoint_wrapped_module.fc.weight", "a.fc"),
        ("_forward_module._orig_mod.fc.weight", "fc"),
        ("module.encoder.fc.weight", "encoder.fc"),
        ("a.module.fc.weight", "a.module.fc"),
        ("weights.weight", "weights"),
    ],
)
def test_layer_name(parameter, name):
    assert layer_name(parameter) == name


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda m: nn.ModuleDict({"_orig_mod": m}),
        lambda m: nn.ModuleDict({"_forward_module": nn.ModuleDict({"_orig_mod": m})}),
    ],
)
@pytest.mark.parametrize("from_state_dict", [False, True])
def test_wrappers_do_not_change_names(wrap, from_state_dict):
    model = nn.Sequential(nn.Linear(12, 10), nn.Sequential(nn.Linear(10, 12)))
    wrapped = wrap(model)
    source = wrapped.state_dict() if from_state_dict else wrapped
    assert names(source) == names(model) == ["0", "1.0"]


def test_module_and_state_dict_agree_in_names_and_values():
    model = zoo()
    of_module, of_state = matrices(model), matrices(model.state_dict())
    assert len(of_module) > 30
    assert [m.name for m in of_module] == [m.name for m in of_state]
    for a, b in zip(of_module, of_state, strict=True):
        assert torch.equal(a.stack, b.stack)
        assert a.scale == b.scale


def test_order_is_that_of_registration():
    model = nn.ModuleDict({k: nn.Linear(9, 9) for k in ("z", "a", "m")})
    assert names(model) == ["z", "a", "m"]


def test_vectors_are_passed_over_without_a_word():
    model = nn.Sequential(nn.LayerNorm(12), nn.BatchNorm1d(12), nn.PReLU(12))
    assert list(weight_matrices(model)) == []


@pytest.mark.parametrize("from_state_dict", [False, True])
def test_tied_weights_come_once_under_the_first_name(from_state_dict):
    model = nn.ModuleDict({"embed": nn.Embedding(30, 12), "head": nn.Linear(12, 30, bias=False)})
    model["head"].weight = model["embed"].weight
    source = model.state_dict() if from_state_dict else model
    assert names(source) == ["embed"]
    assert skipped(source) == {"head": "shares its weights with embed"}


def test_equal_but_separate_weights_are_not_tied():
    layer = nn.Linear(12, 10)
    twin = nn.Linear(12, 10)
    twin.load_state_dict(layer.state_dict())
    model = nn.Sequential(layer, twin)
    assert names(model) == names(model.state_dict()) == ["0", "1"]


def test_checkpoint_with_a_nested_state_dict():
    state = nn.Sequential(nn.Linear(12, 10)).state_dict()
    assert names({"state_dict": state, "epoch": 3}) == names(state) == ["0"]


def test_state_dict_entries_that_are_no_matrices_are_passed_over():
    state = {
        "epoch": 3,
        "name": "x",
        "none": None,
        "fc.bias": torch.ones(9),
        "s": torch.tensor(1.0),
    }
    assert list(weight_matrices(state)) == []


def test_numpy_state_dict():
    array = np.ones((12, 10), dtype=np.float32)
    (matrix,) = matrices({"fc.weight": array})
    assert matrix.name == "fc"
    assert np.array_equal(matrix.stack[0].numpy(), array)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(12, 10),
        nn.Embedding(30, 12),
        nn.Conv1d(10, 12, 3),
        nn.Conv2d(10, 12, 3),
        nn.Conv2d(10, 12, 3).to(memory_format=torch.channels_last),
        nn.Conv3d(10, 12, 2).to(memory_format=torch.channels_last_3d),
        nn.Conv2d(10, 12, 1).to(memory_format=torch.channels_last),
        nn.ConvTranspose2d(10, 12, 2),
        nn.Bilinear(10, 12, 5),
        nn.MultiheadAttention(16, 4),
        nn.LSTM(11, 12, 2),
        nn.GRU(11, 12),
        Experts(),
        zoo(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_writing_to_every_stack_writes_to_every_parameter(layer):
    found = matrices(layer)
    assert found
    for matrix in found:
        assert matrix.read_only is None
        matrix.stack.fill_(7)
    for parameter in layer.parameters():
        if parameter.ndim > 1:
            assert torch.all(parameter == 7)


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_stack_that_is_no_view_says_so(groups, layout):
    conv = nn.Conv2d(10, 20, 3, groups=groups).to(memory_format=layout)
    before = conv.weight.detach().clone()
    (matrix,) = matrices(nn.Sequential(conv))
    matrix.stack.fill_(7)
    written = not torch.equal(conv.weight, before)
    assert written == (matrix.read_only is None)
    assert written == bool(torch.all(conv.weight == 7))


@pytest.mark.parametrize("to_source", [lambda w: w, lambda w: w.numpy(), lambda w: {"a.weight": w}])
def test_arrays_and_state_dicts_are_views_too(to_source):
    weight = gaussian(12, 10)
    (matrix,) = matrices(to_source(weight))
    matrix.stack.zero_()
    assert not weight.any()


def test_ndarray_and_tensor_are_named_w():
    assert names(gaussian(12, 10)) == names(gaussian(12, 10).numpy()) == ["W"]


@pytest.mark.parametrize("source", [None, 3, [gaussian(12, 10)], object(), b"x"])
def test_unsupported_source_is_a_type_error_that_names_what_came(source):
    with pytest.raises(TypeError, match=r"nn\.Module.*state dict.*got .*" + type(source).__name__):
        list(weight_matrices(source))


def test_integer_array_is_a_type_error():
    with pytest.raises(TypeError, match=r"floating-point.*int64"):
        list(weight_matrices(np.arange(100).reshape(10, 10)))


def test_walking_a_model_is_silent_and_leaves_it_alone():
    model = zoo()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert matrices(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_parametrized_embedding_is_read_without_a_power_step():
    embedding = nn.utils.parametrizations.spectral_norm(nn.Embedding(40, 30)).train()
    before = [buffer.clone() for buffer in embedding.buffers()]
    (matrix,) = weight_matrices(nn.Sequential(embedding))
    assert matrix.layer_type == "embedding"
    assert matrix.read_only
    assert all(map(torch.equal, before, embedding.buffers()))


def test_a_sharded_weight_is_gathered_when_it_is_asked_for(tmp_path):
    tensor = pytest.importorskip("torch.distributed.tensor")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        whole = zoo().conv2.weight.detach()
        conv = nn.Conv2d(*whole.shape[1::-1], whole.shape[2:])
        conv.weight = nn.Parameter(tensor.distribute_tensor(whole, mesh, [tensor.Shard(0)]))
        (matrix,) = matrices(nn.Sequential(conv))
        (expected,) = matrices({"0.weight": whole})
        assert matrix.deferred
        assert matrix.collective
        assert (matrix.shape, matrix.dtype) == (expected.shape, expected.dtype)
        assert torch.equal(matrix.stack, expected.stack)
        parts = [part.stack for part in slices(matrix)]
        assert torch.equal(torch.cat(parts), expected.stack)
    finally:
        dist.destroy_process_group()


def test_a_deferred_layer_is_read_at_each_access_and_kept_by_nobody():
    reads = []

    def load():
        reads.append(1)
        return gaussian(24, 10).view(2, 12, 10)

    matrix = WeightMatrix("a", "conv1d", Deferred((2, 12, 10), torch.float32, load))
    assert (matrix.N, matrix.M, matrix.rf, matrix.num_evals, matrix.max_rank) == (12, 10, 2, 20, 20)
    first, second = slices(matrix)
    assert (first.name, second.slice_id, reads) == ("a[0]", 1, [])
    assert torch.equal(second.stack, matrix.stack[1:])
    assert len(reads) == 2
    loaded = matrix.loaded()
    assert len(reads) == 3
    assert loaded.stack is loaded.stack
    assert loaded.loaded() is loaded
