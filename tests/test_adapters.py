"""LoRA: the update scaling * B A of each layer, from folders of peft and from models in memory."""

import json
import math
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ww_train import Skipped, WeightMatrix, measure, weight_matrices
from ww_train.weights.adapters import scaling
from ww_train.weights.low_rank import SUFFIX
from ww_train.weights.matrices import CheckpointError, merge

from .oracles import evals_by_svd, gaussian

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """Every kind of layer that peft can adapt."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.fc1 = nn.Linear(32, 48)
        self.fc2 = nn.Linear(48, 32)
        self.conv = nn.Conv2d(16, 24, 3)
        self.point = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(32, 20)


def adapted(**options):
    targets = options.pop("target_modules", ["embed", "fc1", "fc2", "conv", "point"])
    config = peft.LoraConfig(r=9, lora_alpha=16, target_modules=targets, **options)
    model = peft.get_peft_model(Net(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.ndim > 1:
                parameter.copy_(gaussian(*parameter.flatten(1).shape).view_as(parameter))
    return model


def found(source):
    return {m.name: m for m in weight_matrices(source)}


OPTIONS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"fc1": 12}, "alpha_pattern": {"fc1": 5, "con.": 3}},
    {"modules_to_save": ["head"]},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o), "plain"))
@pytest.mark.parametrize("safetensors", [True, False])
def test_folder_and_model_give_the_update_that_peft_applies(tmp_path, options, safetensors):
    model = adapted(**options)
    model.save_pretrained(tmp_path, safe_serialization=safetensors)
    of_folder, of_model = found(tmp_path), found(model)
    for name in ("embed", "fc1", "fc2", "conv", "point"):
        layer = model.base_model.model.get_submodule(name)
        literal = layer.get_delta_weight("default").detach().double()
        if literal.ndim == 4:
            literal = literal.flatten(2).permute(2, 0, 1)
        for matrices in (of_folder, of_model):
            update = matrices[f"{name}{SUFFIX}"]
            torch.testing.assert_close(
                update.stack, literal.view(update.shape), rtol=1e-5, atol=1e-5
            )
            assert "LoRA" in update.read_only
            assert update.deferred
        assert update.layer_type == of_model[name].layer_type
        assert update.scale == of_model[name].scale


@pytest.mark.filterwarnings("ignore")
def test_the_weights_of_an_adapted_model_keep_their_plain_names():
    model = adapted(modules_to_save=["head"])
    names = [name for name in found(model) if not name.endswith(SUFFIX)]
    assert names[:5] == ["embed", "fc1", "fc2", "conv", "point"]
    assert not any("lora_" in name for name in found(model))
    base = model.base_model.model.fc1.base_layer.weight
    assert found(model)["fc1"].stack.data_ptr() == base.data_ptr()
    order = list(found(model))
    assert order.index(f"fc1{SUFFIX}") == order.index("fc1") + 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("randomize", [False, True])
def test_the_spectrum_of_an_update_is_exact_and_rank_limited(tmp_path, randomize):
    adapted().save_pretrained(tmp_path)
    report = measure(tmp_path, randomize=randomize)
    assert [x.name for x in report.skipped] == []
    for layer in report:
        matrix = found(tmp_path)[layer.name]
        literal = evals_by_svd(*matrix.stack, scale=matrix.scale)
        top = literal[-1]
        np.testing.assert_allclose(layer.spectrum.evals, literal, rtol=1e-9, atol=1e-12 * top)
        assert layer.spectrum.matrix_rank == 9 * matrix.rf
        assert len(layer.spectrum.evals) == matrix.num_evals
        assert np.count_nonzero(layer.spectrum.evals) == 9 * matrix.rf
    direct = measure({"fc1.weight": found(tmp_path)["fc1.lora"].stack[0]})["fc1"]
    assert report["fc1.lora"].alpha == pytest.approx(direct.alpha, rel=1e-8)
    if randomize:
        shuffled = report["fc1.lora"].shuffled
        assert shuffled.matrix_rank == 32
        assert shuffled.norm == pytest.approx(direct.spectrum.norm)


@pytest.mark.filterwarnings("ignore")
def test_an_update_of_low_rank_is_skipped_and_says_so(tmp_path):
    adapted(rank_pattern={"fc1": 4}).save_pretrained(tmp_path)
    report = measure(tmp_path)
    (layer,) = report.skipped
    assert layer.name == "fc1.lora"
    assert layer.reason == "4 positive eigenvalues by its rank, fewer than min_evals=8"
    assert measure(tmp_path, layers="fc1.lora", min_evals=2)["fc1.lora"].spectrum.matrix_rank == 4


@pytest.mark.filterwarnings("ignore")
def test_an_untrained_adapter_has_nothing_to_measure():
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=9, target_modules=["fc1"]))
    report = measure(model, layers="*.lora")
    assert [(x.name, "zero" in x.reason) for x in report.skipped] == [("fc1.lora", True)]


@pytest.mark.filterwarnings("ignore")
def test_weights_of_inputs_by_outputs_are_transposed(tmp_path):
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    net = nn.ModuleDict({"c_attn": pytorch_utils.Conv1D(48, 32)})
    config = peft.LoraConfig(r=9, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(net, config)
    nn.init.normal_(model.base_model.model["c_attn"].lora_B["default"].weight)
    model.save_pretrained(tmp_path)
    literal = model.base_model.model["c_attn"].get_delta_weight("default")
    for source in (tmp_path, model):
        update = found(source)["c_attn.lora"]
        assert update.shape == (1, 32, 48)
        torch.testing.assert_close(update.stack[0].float(), literal)


@pytest.mark.filterwarnings("ignore")
def test_several_active_adapters_add_up():
    model = adapted(target_modules=["fc1"])
    model.add_adapter("second", peft.LoraConfig(r=4, lora_alpha=8, target_modules=["fc1"]))
    layer = model.base_model.model.fc1
    nn.init.normal_(layer.lora_B["second"].weight)
    one, two = (layer.get_delta_weight(name) for name in ("default", "second"))
    assert found(model)["fc1.lora"].max_rank == 9
    model.base_model.set_adapter(["default", "second"])
    update = found(model)["fc1.lora"]
    assert update.max_rank == 13
    torch.testing.assert_close(update.stack[0].float(), one + two)
    literal = evals_by_svd(one.double() + two.double())
    evals = measure(model)["fc1.lora"].spectrum.evals
    np.testing.assert_allclose(evals[-13:], literal[-13:], rtol=1e-4)
    with model.disable_adapter():
        assert "fc1.lora" not in found(model)


@pytest.mark.filterwarnings("ignore")
def test_base_and_adapter_are_merged_layer_by_layer(tmp_path):
    model = adapted(modules_to_save=["head"])
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path / "adapter")
    base = Net()
    base.load_state_dict(_plain(model))
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    expected = model.merge_and_unload().state_dict()
    for source in (base, base.state_dict(), tmp_path / "base.safetensors"):
        merged = {m.name: m for m in merge(source, tmp_path / "adapter")}
        assert set(merged) == set(found(base))
        for name, matrix in merged.items():
            literal = found({f"{name}.weight": expected[f"{name}.weight"]})[name].stack
            torch.testing.assert_close(matrix.stack.float(), literal, rtol=1e-5, atol=1e-4)
        report = measure(merge(source, tmp_path / "adapter"))
        direct = measure(expected)
        assert report["fc1"].alpha == pytest.approx(direct["fc1"].alpha, rel=1e-4)


def _plain(model):
    """The state dict of the model that an adapter was put on."""
    state = {}
    for key, tensor in model.base_model.model.state_dict().items():
        if "lora_" not in key and "modules_to_save" not in key:
            key = key.replace(".base_layer", "").replace(".original_module", "")
            state[key] = tensor.clone()
    return state


@pytest.mark.filterwarnings("ignore")
def test_the_difference_of_merged_and_base_is_the_update(tmp_path):
    model = adapted(target_modules=["fc1", "conv"])
    model.save_pretrained(tmp_path)
    base = _plain(model)
    report = measure(merge(base, tmp_path), base_model=base)
    updates = measure(tmp_path)
    for name in ("fc1", "conv"):
        expected = updates[f"{name}.lora"].spectrum.evals
        evals = report[name].spectrum.evals
        np.testing.assert_allclose(evals, expected, rtol=1e-6, atol=1e-9 * expected[-1])
    reasons = {x.name: x.reason for x in report.skipped}
    assert reasons["fc2"] == "identical to the base model"


def dora(folder=None, *, targets=("embed", "fc1", "fc2", "conv", "point"), **options):
    """A model with DoRA whose sizes have been trained, and its folder."""
    model = adapted(use_dora=True, target_modules=list(targets), **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
    if folder is not None:
        model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True])
def test_dora_is_merged_as_peft_merges_it(tmp_path, rslora):
    model = dora(tmp_path, use_rslora=rslora)
    base = _plain(model)
    merged = {m.name: m for m in merge(base, tmp_path)}
    expected = model.merge_and_unload().state_dict()
    assert set(merged) == set(found(base))
    for name, matrix in merged.items():
        literal = found({f"{name}.weight": expected[f"{name}.weight"]})[name].stack
        torch.testing.assert_close(matrix.stack.float(), literal, rtol=1e-5, atol=1e-4)
        changed = not torch.equal(literal, found(base)[name].stack)
        assert changed == (name != "head")
    report, direct = measure(merge(base, tmp_path)), measure(expected)
    assert report["fc1"].alpha == pytest.approx(direct["fc1"].alpha, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_dora_of_transposed_weights_is_merged_as_peft_merges_it(tmp_path):
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    net = nn.ModuleDict({"c_attn": pytorch_utils.Conv1D(48, 32)})
    config = peft.LoraConfig(r=9, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    base = {"c_attn.weight": net["c_attn"].weight.detach().clone()}
    model = peft.get_peft_model(net, config)
    layer = model.base_model.model["c_attn"]
    nn.init.normal_(layer.lora_B["default"].weight)
    nn.init.uniform_(layer.lora_magnitude_vector["default"].weight, 0.5, 2.0)
    model.save_pretrained(tmp_path)
    (merged,) = merge(base, tmp_path)
    expected = model.merge_and_unload()["c_attn"].weight.detach()
    torch.testing.assert_close(merged.stack[0].float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_each_output_of_a_merged_dora_layer_has_the_size_that_the_adapter_says(tmp_path):
    model = dora(tmp_path, targets=("fc1",))
    (layer,) = (m for m in merge(_plain(model), tmp_path) if m.name == "fc1")
    sizes = load_file(tmp_path / "adapter_model.safetensors")
    (magnitude,) = (v for k, v in sizes.items() if "magnitude" in k)
    torch.testing.assert_close(layer.stack[0].norm(dim=1), magnitude.double())


@pytest.mark.filterwarnings("ignore")
def test_dora_alone_is_skipped_because_it_needs_the_base(tmp_path):
    model = dora(tmp_path, targets=("fc1", "conv"))
    for source in (tmp_path, model):
        of = found(source)
        for name in ("fc1.lora", "conv.lora"):
            assert isinstance(of[name], Skipped)
            assert "DoRA" in of[name].reason
            assert "ww_train.merge(base, adapter)" in of[name].reason
        assert not any("magnitude" in name for name in of)
    report = measure(tmp_path)
    assert len(report) == 0
    skipped = pickle.loads(pickle.dumps(report)).skipped
    assert skipped == tuple(Skipped(x.name, x.reason) for x in report.skipped)
    assert len(skipped) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda w: None, "magnitude vector is missing"),
        (lambda w: w[:-1].clone(), r"magnitudes of shape \(47,\) for 48 outputs"),
    ],
    ids=["missing", "shape"],
)
def test_dora_with_damaged_sizes_is_skipped(tmp_path, damage, reason):
    model = dora(tmp_path, targets=("fc1",))
    path = tmp_path / "adapter_model.safetensors"
    tensors = {k: damage(w) if "magnitude" in k else w for k, w in load_file(path).items()}
    save_file({k: w for k, w in tensors.items() if w is not None}, path)
    assert re.search(reason, found(tmp_path)["fc1.lora"].reason)
    (layer,) = (m for m in merge(_plain(model), tmp_path) if m.name == "fc1")
    assert re.search(reason, layer.reason)


def test_sizes_without_factors_are_said(tmp_path):
    sizes = {"base_model.model.fc.lora_magnitude_vector": torch.ones(20)}
    folder(tmp_path)
    save_file(sizes, tmp_path / "adapter_model.safetensors")
    assert found(tmp_path)["fc.lora"].reason == "it has no factors"


def test_factors_without_a_configuration_are_no_layers():
    state = {"fc.lora_A.weight": gaussian(9, 30), "fc.lora_B.weight": gaussian(20, 9)}
    assert [(m.name, "scaling" in m.reason) for m in weight_matrices(state)] == [
        ("fc.lora_A", True)
    ]


@pytest.mark.parametrize(
    ("config", "layer", "expected"),
    [
        ({"lora_alpha": 16}, "a.fc1", 2),
        ({"lora_alpha": 16, "use_rslora": True}, "a.fc1", 16 / math.sqrt(8)),
        ({"lora_alpha": 16, "alpha_pattern": {"fc1": 4}}, "a.fc1", 0.5),
        ({"lora_alpha": 16, "alpha_pattern": {"fc1": 4}}, "a.xfc1", 2),
        ({"lora_alpha": 16, "alpha_pattern": {"1.fc.": 4, "fc1": 3}}, "a.1.fc1", 0.5),
        ({"lora_alpha": 16, "alpha_pattern": None}, "fc1", 2),
    ],
)
def test_scaling(config, layer, expected):
    assert scaling(config, layer, 8) == expected


def folder(path, config=None, **factors):
    config = {"peft_type": "LORA", "lora_alpha": 16, "r": 9} if config is None else config
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = factors or {"A": gaussian(9, 30), "B": gaussian(20, 9)}
    prefix = "base_model.model.fc.lora_"
    save_file(
        {f"{prefix}{k}.weight": w for k, w in tensors.items()}, path / "adapter_model.safetensors"
    )
    return path


def test_the_file_of_an_adapter_is_read_with_the_configuration_beside_it(tmp_path):
    path = folder(tmp_path)
    assert list(found(path)) == list(found(path / "adapter_model.safetensors")) == ["fc.lora"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA", "lora_alpha": 1}, "type LOHA; only LORA"),
        ({"lora_alpha": 16}, "type unknown"),
        ({"peft_type": "LORA"}, "no lora_alpha"),
        ({"peft_type": "LORA", "lora_alpha": "x"}, "damaged"),
        ([], "damaged"),
    ],
)
def test_a_configuration_that_is_not_lora_is_an_error(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message):
        found(folder(tmp_path, config))


def test_a_configuration_that_is_no_json_is_an_error(tmp_path):
    folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        found(tmp_path)


def test_a_configuration_without_weights_is_an_error(tmp_path):
    folder(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        found(tmp_path)


@pytest.mark.parametrize(
    "factors",
    [
        {"A": gaussian(9, 30)},
        {"A": gaussian(9, 30), "B": gaussian(20, 8)},
        {"A": gaussian(9, 30).view(9, 30, 1, 1), "B": gaussian(20, 9)},
    ],
    ids=["one factor", "ranks", "dimensions"],
)
def test_factors_that_do_not_fit_skip_the_layer(tmp_path, factors):
    matrix = found(folder(tmp_path, **factors))["fc.lora"]
    assert "factor" in matrix.reason


def test_an_adapter_that_fits_nothing_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"fits no layer of the base model.*fc\.lora"):
        merge({"other.weight": gaussian(20, 30)}, folder(tmp_path))


def test_what_does_not_fit_the_base_is_said(tmp_path):
    merged = merge({"fc.weight": gaussian(21, 30)}, folder(tmp_path))
    assert [m.reason for m in merged] == ["shape (1, 21, 30), that of the update is (1, 20, 30)"]
    path = folder(tmp_path)
    more = load_file(path / "adapter_model.safetensors")
    more |= {k.replace(".fc.", ".gone."): w.clone() for k, w in more.items()}
    save_file(more, path / "adapter_model.safetensors")
    merged = {m.name: m for m in merge({"fc.weight": gaussian(20, 30)}, path)}
    assert isinstance(merged["fc"], WeightMatrix)
    assert merged["gone.lora"].reason == "the base model has no layer of this name"
