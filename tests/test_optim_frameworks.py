import copy
import importlib.util
import os
import shutil

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ww_train import WWPGD, ManifoldProjection, Projected, Skipped

from .oracles import gaussian
from .training import (
    SIZE,
    adamw,
    assert_projected,
    clock,
    loss_of,
    net,
    same,
    scheduled,
    train,
    weights,
    wrap,
)

# Other people's wrappers


def test_a_compiled_model_sees_the_projection():
    model = net()
    compiled = torch.compile(model, backend="eager")
    opt = WWPGD(adamw(compiled), model=compiled, strength=1.0)
    x = gaussian(4, SIZE)
    before = compiled(x)
    train(compiled, opt, 1)
    names = [result.name for result in opt.end_epoch()]
    assert names == ["0", "2"]
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), before)
    assert_projected(model)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_step_counts_and_projects():
    bare, wrapped = net(), net()
    opt = wrap(wrapped, strength=1.0)
    for model, optimizer in ((bare, adamw(bare)), (wrapped, opt)):
        step = torch.compile(optimizer.step, backend="eager")  # rounds differently from AdamW.step
        for i in range(3):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            step()
    assert same(bare, wrapped)
    assert clock(opt)["steps"] == 3
    assert len(opt.end_epoch()) == 2
    assert_projected(wrapped)


COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.skipif(
    "WW_TRAIN_INDUCTOR" not in os.environ,
    reason="compiles C++ for half a minute: set WW_TRAIN_INDUCTOR=1 to run it",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_generated_code_of_model_and_step_sees_the_projection():
    bare, wrapped = net(), net()
    opt = wrap(wrapped, strength=1.0)
    for model, optimizer in ((bare, adamw(bare)), (wrapped, opt)):
        compiled, step = torch.compile(model), torch.compile(optimizer.step)
        for i in range(3):
            optimizer.zero_grad()
            loss_of(compiled, i).backward()
            step()
    assert same(bare, wrapped)
    assert clock(opt)["steps"] == 3
    assert len(opt.end_epoch()) == 2
    assert_projected(wrapped)
    x = gaussian(4, SIZE)
    torch.testing.assert_close(compiled(x), wrapped(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"capturable": True}])
def test_on_a_cuda_device(settings):
    bare, wrapped = net(), net()
    batch = gaussian(8, SIZE).cuda()
    reference = adamw(bare.cuda(), **settings)
    opt = wrap(wrapped.cuda(), lambda m: adamw(m, **settings), strength=1.0)
    addresses = [p.data_ptr() for p in wrapped.parameters()]
    for model, optimizer in ((bare, reference), (wrapped, opt)):
        for _ in range(3):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    assert same(bare, wrapped)
    assert len(opt.end_epoch()) == 2
    assert [p.data_ptr() for p in wrapped.parameters()] == addresses  # as CUDA graphs need
    assert_projected(wrapped.cpu())


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield accelerate.Accelerator(cpu=True)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def test_accelerate(accelerator):
    bare, wrapped = net(), net()
    reference, opt = adamw(bare), wrap(wrapped, strength=1.0)
    expected = scheduled(bare, reference, lr_scheduler.StepLR(reference, 2))
    model, prepared, scheduler = accelerator.prepare(wrapped, opt, lr_scheduler.StepLR(opt, 2))
    assert prepared.optimizer is opt
    trace = []
    for i in range(8):
        prepared.zero_grad()
        accelerator.backward(loss_of(model, i))
        prepared.step()
        scheduler.step()
        trace.append([group["lr"] for group in prepared.param_groups])
    assert trace == [[group["lr"] for group in groups] for groups in expected]
    assert same(bare, wrapped)
    assert clock(opt)["steps"] == 8
    assert opt.end_epoch()
    assert_projected(model)


def test_the_proxy_of_lightning_shares_the_clock():
    pytest.importorskip("lightning")
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = net()
    opt = wrap(model, strength=1.0)
    train(model, opt, 2)
    proxy = LightningOptimizer(opt)
    assert len(proxy.end_epoch()) == 2
    assert clock(opt) == {"steps": 2, "epochs": 1, "boundary": 2}
    assert opt.end_epoch() == proxy.end_epoch() == ()
    assert_projected(model)


def test_fabric():
    fabric_module = pytest.importorskip("lightning.fabric")
    bare, wrapped = net(), net()
    train(bare, adamw(bare), 4)
    opt = wrap(wrapped, strength=1.0)
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    model, prepared = fabric.setup(wrapped, opt)
    for i in range(4):
        prepared.zero_grad()
        fabric.backward(loss_of(model, i))
        prepared.step()
    assert same(bare, wrapped)
    assert clock(opt)["steps"] == 4
    assert prepared.state_dict()["ww_pgd"]["steps"] == 4
    assert [type(result) for result in prepared.end_epoch()] == [Projected, Projected]
    assert opt.end_epoch() == ()
    assert_projected(wrapped)


@pytest.mark.skipif(
    importlib.util.find_spec("schedulefree") is None, reason="schedulefree is not installed"
)
def test_schedule_free_weights_are_projected_where_they_are_used():
    from schedulefree import AdamWScheduleFree

    bare, wrapped = net(), net()
    reference = AdamWScheduleFree(bare.parameters(), lr=1e-2)
    opt = wrap(wrapped, lambda m: AdamWScheduleFree(m.parameters(), lr=1e-2), strength=1.0)
    for model, optimizer in ((bare, reference), (wrapped, opt)):
        optimizer.train()
        train(model, optimizer, 5)
    assert same(bare, wrapped)
    assert len(opt.end_epoch()) == 2
    assert opt.param_groups[0]["train_mode"]
    train(wrapped, opt, 1)  # goes on in train mode
    opt.base.eval()
    before = copy.deepcopy(wrapped)
    opt.base.train()
    opt.end_epoch()
    opt.base.eval()
    assert not same(wrapped, before)
    for weight in weights(wrapped):
        assert ManifoldProjection().project_(weight.detach().clone()).distance < 1e-4


def test_accelerate_accumulates_gradients_without_counting_steps(accelerator):
    bare, wrapped = net(), net()
    reference, opt = adamw(bare), wrap(wrapped, every_n_steps=2, strength=0.0)
    accelerator.gradient_accumulation_steps = 3
    model, prepared = accelerator.prepare(wrapped, opt)
    for i in range(12):
        (loss_of(bare, i) / 3).backward()
        if i % 3 == 2:
            reference.step()
            reference.zero_grad()
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, i))
            prepared.step()
            prepared.zero_grad()
    assert same(bare, wrapped)
    assert clock(opt) == {"steps": 4, "epochs": 2, "boundary": 4}


# Averages of weights


@pytest.mark.parametrize("kind", ["SWA", "EMA"])
def test_averages_see_the_projection_and_are_not_projected(kind):
    model = net()
    opt = wrap(model, strength=1.0)
    settings = {} if kind == "SWA" else {"multi_avg_fn": get_ema_multi_avg_fn(0.75)}
    averaged = AveragedModel(model, **settings)
    expected = None
    for i in range(4):
        train(model, opt, 2, first=2 * i)
        opt.end_epoch()
        assert_projected(model)
        averaged.update_parameters(model)
        now = model[0].weight.detach().clone()
        share = 1 / (i + 1) if kind == "SWA" else 0.25
        expected = now if expected is None else expected + share * (now - expected)
    torch.testing.assert_close(averaged.module[0].weight.detach(), expected)
    assert ManifoldProjection().project_(expected.clone()).distance > 1e-4
    assert not same(averaged.module, model)


# Muon for the hidden matrices and AdamW for the rest, as people use it

muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is new in 2.9")


def speaker():
    """Hidden matrices for Muon; an embedding, a head and a norm for AdamW."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(40, SIZE), nn.Linear(SIZE, 32), nn.Linear(32, SIZE), nn.LayerNorm(SIZE),
            nn.Linear(SIZE, 40),
        )  # fmt: skip


def split(model):
    hidden = [model[1].weight, model[2].weight]
    return hidden, [p for p in model.parameters() if all(p is not h for h in hidden)]


class MuonAndAdamW(torch.optim.Optimizer):
    """Both in one optimizer: what trainers that know only one are given."""

    def __init__(self, model):
        hidden, others = split(model)
        self.parts = [torch.optim.Muon(hidden, lr=0.01), torch.optim.AdamW(others, lr=1e-2)]
        super().__init__([{"params": hidden, "lr": 0.01}, {"params": others, "lr": 1e-2}], {})
        for group, part in zip(self.param_groups, self.parts, strict=True):
            part.param_groups = [part.param_groups[0] | group]
            self.state = part.state if not self.state else self.state

    def step(self, closure=None):
        for group, part in zip(self.param_groups, self.parts, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()


def speak(model, optimizers, steps=4):
    tokens = torch.arange(36).view(4, 9) % 40
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flip(1).flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def both(model):
    hidden, others = split(model)
    return torch.optim.Muon(hidden, lr=0.01), torch.optim.AdamW(others, lr=1e-2)


@muon
def test_two_wrappers_share_a_model_and_each_projects_its_own():
    bare, wrapped = speaker(), speaker()
    speak(bare, both(bare))
    optimizers = [WWPGD(base, model=wrapped, strength=1.0) for base in both(wrapped)]
    speak(wrapped, optimizers)
    assert same(bare, wrapped)
    embedding, first, second, head = optimizers[0].end_epoch()
    assert embedding.reason == "an embedding, or tied to one"
    assert head == Skipped("4", "not among the optimizer's parameters")
    assert [type(result) for result in (first, second)] == [Projected, Projected]
    assert torch.equal(wrapped[4].weight, bare[4].weight)
    embedding, first, second, head = optimizers[1].end_epoch()
    assert {first.reason, second.reason} == {"not among the optimizer's parameters"}
    assert isinstance(head, Projected)
    for layer in (wrapped[1], wrapped[2], wrapped[4]):
        assert_projected(layer)


@muon
def test_one_wrapper_around_both():
    bare, wrapped = speaker(), speaker()
    speak(bare, [MuonAndAdamW(bare)])
    opt = WWPGD(MuonAndAdamW(wrapped), model=wrapped, strength=1.0)
    scheduler = lr_scheduler.StepLR(opt, 10)
    speak(wrapped, [opt])
    scheduler.step()
    assert same(bare, wrapped)
    assert clock(opt)["steps"] == 4
    results = opt.end_epoch()
    assert [type(result) for result in results] == [Skipped, *[Projected] * 3]
