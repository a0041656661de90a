import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from ww_train import WWPGD, Skipped, WeightMatrix
from ww_train.steering.targets import chosen, projection_targets, refuse_flattened

from .oracles import zoo


def targets(params, model=None):
    """Names to project, and reasons of the others, for an optimizer over `params`."""
    groups = torch.optim.SGD(params, lr=0.1).param_groups
    found = list(projection_targets(groups, model))
    names = [m.name for m in found if isinstance(m, WeightMatrix)]
    return names, {m.name: m.reason for m in found if not isinstance(m, WeightMatrix)}


def of_model(model):
    """The same for a model whose every parameter is trained."""
    return targets(list(model.parameters()), model)


class Tied(nn.Module):
    def __init__(self, head_first):
        super().__init__()
        if head_first:
            self.lm_head = nn.Linear(16, 50, bias=False)
            self.wte = nn.Embedding(50, 16)
        else:
            self.wte = nn.Embedding(50, 16)
            self.lm_head = nn.Linear(16, 50, bias=False)
        self.lm_head.weight = self.wte.weight
        self.fc = nn.Linear(16, 16)


def test_a_linear_layer_is_a_target_and_a_view_of_its_weight():
    model = nn.Sequential(nn.Linear(30, 20))
    groups = torch.optim.SGD(model.parameters(), lr=0.1).param_groups
    (matrix,) = projection_targets(groups, model)
    assert matrix.name == "0"
    assert matrix.parameter is model[0].weight
    assert matrix.stack.data_ptr() == model[0].weight.data_ptr()


@pytest.mark.parametrize("layer", [nn.Embedding(50, 16), nn.EmbeddingBag(50, 16)])
def test_an_embedding_is_not(layer):
    names, reasons = of_model(nn.Sequential(layer, nn.Linear(16, 16)))
    assert names == ["1"]
    assert reasons == {"0": "an embedding, or tied to one"}


@pytest.mark.parametrize("head_first", [False, True])
def test_a_head_tied_to_an_embedding_is_not(head_first):
    names, reasons = of_model(Tied(head_first))
    assert names == ["fc"]
    assert set(reasons) == {"wte", "lm_head"}
    assert "an embedding, or tied to one" in reasons.values()


def test_a_head_of_its_own_is_a_target():
    model = Tied(head_first=False)
    model.lm_head.weight = nn.Parameter(model.wte.weight.detach().clone())
    names, _ = of_model(model)
    assert names == ["lm_head", "fc"]


def test_two_linear_layers_with_one_weight_are_one_target():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    model[1].weight = model[0].weight
    names, reasons = of_model(model)
    assert names == ["0"]
    assert reasons == {"1": "shares its weights with 0"}


@pytest.mark.parametrize("norm", [nn.LayerNorm(20), nn.RMSNorm(20), nn.BatchNorm1d(20)])
def test_norms_and_biases_are_not_matrices(norm):
    assert of_model(nn.Sequential(norm, nn.Linear(20, 20))) == (["1"], {})


def test_a_layer_norm_over_two_dimensions_is_not_a_matrix():
    names, reasons = of_model(nn.Sequential(nn.LayerNorm((30, 20))))
    assert names == []
    assert "normalisation" in reasons["0"]


def test_every_kind_of_layer_that_the_library_knows():
    names, reasons = of_model(zoo())
    assert names == [
        "fc",
        "conv1",
        "conv2",
        "conv3",
        "transposed",
        *[f"attention.in_proj_weight.{part}" for part in "qkv"],
        "attention.out_proj",
        *[
            f"lstm.weight_{kind}_l{layer}{direction}.{gate}"
            for layer in (0, 1)
            for direction in ("", "_reverse")
            for kind in ("ih", "hh")
            for gate in "ifgo"
        ],
        *[f"gru.weight_{kind}_l0.{gate}" for kind in ("ih", "hh") for gate in "rzn"],
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        *[f"cell.weight_{kind}.{gate}" for kind in ("ih", "hh") for gate in "ifgo"],
        *[f"experts.gate_up_proj.{i}" for i in range(3)],
    ]
    assert reasons == {"embed": "an embedding, or tied to one"}


def test_a_depthwise_convolution_is_not():
    names, reasons = of_model(nn.Sequential(nn.Conv2d(16, 16, 3, groups=16)))
    assert names == []
    assert "depthwise" in reasons["0"]


def test_frozen_weights_are_not():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    model[0].requires_grad_(False)
    assert of_model(model) == (["1"], {"0": "frozen"})
    names, reasons = targets(list(model.parameters()))
    assert names == ["group0.param2"]
    assert reasons == {"group0.param0": "frozen"}


def test_weights_of_no_optimizer_are_not():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    names, reasons = targets(model[1].parameters(), model)
    assert names == ["1"]
    assert reasons == {"0": "not among the optimizer's parameters"}


def test_all_groups_count():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    groups = [{"params": model[1].parameters()}, {"params": model[0].parameters()}]
    assert targets(groups, model) == (["0", "1"], {})
    assert targets([{"params": m.parameters()} for m in model])[0] == [
        "group0.param0",
        "group1.param0",
    ]


@pytest.mark.parametrize(
    "parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_a_computed_weight_is_not(parametrize):
    names, reasons = of_model(nn.Sequential(parametrize(nn.Linear(20, 30)), nn.Linear(30, 20)))
    assert names == ["1"]
    assert "parametrization" in reasons["0"]


def test_a_pruned_weight_is_not():
    layer = prune.l1_unstructured(nn.Linear(20, 30), "weight", amount=0.5)
    names, reasons = of_model(nn.Sequential(layer, nn.Linear(30, 20)))
    assert names == ["1"]
    assert "hook" in reasons["0"]


@pytest.mark.parametrize(
    "layer",
    [
        parametrizations.weight_norm(nn.Linear(20, 30)),
        parametrizations.orthogonal(nn.Linear(20, 30)),
        prune.l1_unstructured(nn.Linear(20, 30), "weight", amount=0.5),
    ],
    ids=["weight norm", "orthogonal", "pruned"],
)
def test_a_computed_weight_is_known_by_its_name(layer):
    names, reasons = targets(nn.Sequential(layer, nn.Linear(30, 20)).named_parameters())
    assert names == ["1"]
    assert all("computed" in reason for reason in reasons.values())
    assert len(reasons) >= 1


def test_the_matrices_of_a_lora_adapter_are_not():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 30))
    config = peft.LoraConfig(r=8, target_modules=["0"], modules_to_save=["2"])
    adapted = peft.get_peft_model(model, config)
    names, reasons = of_model(adapted)
    (saved,) = names
    assert saved.endswith("modules_to_save.default")
    lora = {name: reason for name, reason in reasons.items() if "lora" in name}
    assert lora
    assert all("LoRA" in reason for reason in lora.values())
    assert {reason for name, reason in reasons.items() if name not in lora} == {"frozen"}


def test_lora_factors_are_known_by_their_names():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 30))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["0"]))
    names, reasons = targets((n, p) for n, p in adapted.named_parameters() if p.requires_grad)
    assert names == []
    assert len(reasons) == 2
    assert all("LoRA" in reason for reason in reasons.values())


def test_without_names_and_a_model_two_dimensions_make_a_target():
    names, _ = targets(nn.Sequential(nn.Linear(20, 30), nn.Embedding(50, 20)).parameters())
    assert names == ["group0.param0", "group0.param2"]


@pytest.mark.parametrize(("conv", "ndim"), [(nn.Conv2d, 4), (nn.Conv1d, 3)])
def test_without_a_model_more_dimensions_are_skipped(conv, ndim):
    names, reasons = targets(nn.Sequential(conv(20, 24, 3)).named_parameters())
    assert names == []
    assert list(reasons) == ["0"]
    assert reasons["0"].startswith(f"{ndim}-D: pass model=")


def test_a_nameless_convolution_is_one_layer():
    _, reasons = targets([nn.Conv2d(20, 24, 3).weight])
    assert list(reasons) == ["group0.param0"]


@pytest.mark.parametrize(
    "name", ["wte", "wpe", "embed_tokens", "tok_embeddings", "lm_head", "model.embeddings.word"]
)
def test_named_parameters_tell_embeddings(name):
    weight, other = (nn.Parameter(torch.randn(30, 20)) for _ in range(2))
    names, reasons = targets([(f"{name}.weight", weight), ("fc.weight", other)])
    assert names == ["fc"]
    assert reasons == {name: "named like an embedding or a head tied to one"}


@pytest.mark.parametrize("name", ["fc.wtex", "lm_headless", "blurora_A", "disembed"])
def test_names_that_only_look_like_embeddings(name):
    names, _ = targets([(name, nn.Parameter(torch.randn(30, 20)))])
    assert names == [name]


def test_named_parameters_of_a_model():
    names, reasons = targets(Tied(head_first=False).named_parameters())
    assert names == ["fc"]
    assert reasons == {"wte": "named like an embedding or a head tied to one"}


def test_wrapper_segments_do_not_reach_the_names():
    compiled = torch.compile(nn.Sequential(nn.Linear(20, 20)), backend="eager")
    assert of_model(compiled) == (["0"], {})
    assert targets(compiled.named_parameters()) == (["0"], {})


def test_parameters_are_read_afresh():
    model = nn.Sequential(nn.Linear(20, 20))
    groups = torch.optim.SGD(model.parameters(), lr=0.1).param_groups
    groups[0]["params"] = [nn.Parameter(torch.randn(30, 20))]  # what FSDP2 and accelerate do
    (matrix,) = projection_targets(groups)
    assert matrix.parameter is groups[0]["params"][0]


def test_unusable_dtypes_are_skipped():
    weight = nn.Parameter(torch.randn(30, 20, dtype=torch.complex64))
    assert targets([weight]) == ([], {"group0.param0": "complex weights (torch.complex64)"})


# Narrowing down


def some(*names):
    return [WeightMatrix(name, "dense", torch.ones(1, 30, 20)) for name in names]


def narrowed(*choices):
    found = [Skipped("emb", "an embedding"), *some("a", "b.0", "b.1")]
    result = chosen(found, *choices)
    assert [t.name for t in result] == ["emb", "a", "b.0", "b.1"]
    assert result[0] is found[0]
    return [t.name if isinstance(t, WeightMatrix) else t.reason for t in result[1:]]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, ["a", "b.0", "b.1"]),
        ("b.*", None, ["not included", "b.0", "b.1"]),
        (None, "b.*", ["a", "excluded", "excluded"]),
        ("b.*", "b.1", ["not included", "b.0", "excluded"]),
        ("a", "a", ["excluded", "not included", "not included"]),
        ("emb", None, ["not included"] * 3),
        (None, "emb", ["a", "b.0", "b.1"]),
        ([], None, ["not included"] * 3),
        (None, [], ["a", "b.0", "b.1"]),
        ((), (), ["not included"] * 3),
        (
            lambda m: "b" in m.name,
            lambda m: m.name.endswith("0"),
            ["not included", "excluded", "b.1"],
        ),
        ([1, -1], None, ["a", "not included", "b.1"]),
    ],
)
def test_choices(include, exclude, expected):
    assert narrowed(include, exclude) == expected


def test_a_predicate_is_asked_about_matrices_only():
    asked = []
    narrowed(lambda matrix: asked.append(matrix.name), None)
    assert asked == ["a", "b.0", "b.1"]


def test_without_an_optimizer_frozen_weights_are_targets():
    model = nn.Sequential(nn.Linear(20, 30), nn.Embedding(30, 20)).requires_grad_(False)
    linear, embedding = projection_targets(None, model)
    assert isinstance(linear, WeightMatrix)
    assert isinstance(embedding, Skipped)


# Frameworks that take the parameters over


def flat(**attributes):
    parameter = nn.Parameter(torch.ones(600))
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


def marked(shape, name):
    parameter = nn.Parameter(torch.ones(shape))
    setattr(parameter, name, True)
    return parameter


def test_deepspeed_is_refused():
    with pytest.raises(RuntimeError, match=r"DeepSpeed .* ww_train\.project_"):
        refuse_flattened([{"params": [flat(), flat(ds_id=3)]}])


def test_deepspeed_is_known_by_its_flat_pieces(monkeypatch):
    groups = [{"params": [flat()]}, {"params": []}]
    refuse_flattened(groups)
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    with pytest.raises(RuntimeError, match="DeepSpeed has taken the parameters over"):
        refuse_flattened(groups)
    refuse_flattened([*groups, {"params": [nn.Parameter(torch.ones(30, 20))]}])


def test_fsdp_is_refused_while_its_parameters_are_flat():
    weight, bias = marked((30, 20), "_fsdp_flattened"), marked((30,), "_fsdp_flattened")
    with pytest.raises(RuntimeError, match=r"use fully_shard.*summon_full_params"):
        refuse_flattened([{"params": [marked((600,), "_fsdp_flattened"), bias]}])
    refuse_flattened([{"params": [weight, bias]}])  # summoned


@pytest.mark.parametrize(
    "params", [[], [nn.Parameter(torch.ones(3))], [nn.Parameter(torch.ones(3, 2))]]
)
def test_plain_parameters_are_not_refused(params):
    refuse_flattened([{"params": params}])


@pytest.mark.parametrize("strict", [False, True])
def test_a_refusal_is_raised_not_warned(strict):
    model = nn.Sequential(nn.Linear(20, 30))
    opt = WWPGD(torch.optim.SGD(model.parameters(), lr=0.1), model=model, strict=strict)
    model[0].weight.ds_id = 0
    with pytest.raises(RuntimeError, match="DeepSpeed has taken the parameters over"):
        opt.end_epoch()
