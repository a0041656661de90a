"""A small network, deterministic steps and what is asserted of them, for the tests of `WWPGD`."""

import warnings

import torch
from torch import nn
from torch.optim import lr_scheduler

from ww_train import WWPGD, ManifoldProjection

from .oracles import gaussian

SIZE = 24


def net(seed=0, bias=True):
    """A small network, without touching the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(SIZE, 32, bias), nn.Tanh(), nn.Linear(32, SIZE, bias))


def loss_of(model, i):
    batch = gaussian(8, SIZE, seed=i).to(next(model.parameters()).dtype)
    return (model(batch) - batch.flip(1)).square().mean()


def train(model, opt, steps, *, first=0, after=lambda: None):
    """Deterministic steps `first`, `first + 1`, ...; `after` is called behind each."""
    for i in range(first, first + steps):
        opt.zero_grad()
        loss_of(model, i).backward()
        opt.step()
        after()


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def clock(opt):
    return opt.state_dict()["ww_pgd"]


def adamw(model, **settings):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **settings)


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **settings})


def wrap(model, base=adamw, **settings):
    return WWPGD(base(model), model=model, **settings)


def weights(model):
    return [p for p in model.parameters() if p.ndim == 2]


def assert_projected(model):
    """Every layer is on the manifold: another projection would not move it."""
    for weight in weights(model):
        done = ManifoldProjection().project_(weight.detach().clone())
        assert done.distance < 1e-6


def assert_free(model):
    """No layer is anywhere near the manifold."""
    for weight in weights(model):
        assert ManifoldProjection().project_(weight.detach().clone()).distance > 0.05


BASES = {
    "AdamW": adamw,
    "AdamW foreach": lambda m: adamw(m, foreach=True),
    "AdamW fused": lambda m: adamw(m, fused=True),
    "Adam amsgrad": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True),
    "SGD momentum": sgd,
    "SGD nesterov": lambda m: sgd(m, nesterov=True),
    "SGD fused": lambda m: sgd(m, fused=True),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters()),
    "two groups": lambda m: torch.optim.AdamW(
        [{"params": m[0].parameters(), "lr": 1e-3}, {"params": m[2].parameters()}], lr=1e-2
    ),
}


def settings_of(opt):
    """Every setting of every group; the clock that is mirrored there is none."""
    return [
        {k: v for k, v in group.items() if k != "params" and not k.startswith("ww_pgd_")}
        for group in opt.param_groups
    ]


def scheduled(model, opt, scheduler, steps=8, first=0):
    """Train with a scheduler; the groups' settings after each step."""
    trace = []

    def advance():
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
        trace.append(settings_of(opt))

    train(model, opt, steps, first=first, after=advance)
    return trace


def collect(function):
    """The warnings that a call gives, as strings, and its result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return [str(w.message) for w in caught], result


def epoch(model, opt):
    train(model, opt, 1)
    return collect(opt.end_epoch)
