from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ww_train.callbacks.sharing import Ranks, ranks_of, unwrapped

from .oracles import gaussian
from .processes import run_ranks
from .test_ranks import FOURTH, THIRD, current

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def model():
    layer = nn.Linear(24, 32, bias=False)
    layer.weight.data = gaussian(32, 24)
    return nn.Sequential(layer)


def test_a_single_process_decides_by_itself():
    ranks = ranks_of(model())
    assert ranks == Ranks()
    assert ranks.first
    assert ranks.agree("plan") == "plan"
    assert not Ranks(main=False).first


def test_the_model_inside_its_wrappers():
    net = model()
    assert unwrapped(net) is net
    assert unwrapped(torch.compile(net, backend="eager")) is net
    assert unwrapped(None) is None


@pytest.fixture
def alone(tmp_path):
    if dist.is_initialized():
        pytest.skip("needs that nobody else has made a process group")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "device", [None, torch.device("cpu"), THIRD], ids=["unknown", "cpu", "cuda"]
)
def test_objects_are_sent_through_the_device_of_the_model(monkeypatch, alone, device):
    seen = current(monkeypatch)
    ranks = Ranks(alone, device=device)
    assert ranks.collect("own") == ["own"]
    assert ranks.agree("plan") == "plan"
    assert ranks.decide(lambda: list(seen)) == seen[:4]
    assert seen == [THIRD, "left"] * (3 if device == THIRD else 0)


class Elsewhere(nn.Module):
    """Stands for a sharded model on devices that this machine may not have."""

    def parameters(self, recurse=True):
        for device in (torch.device("cpu"), THIRD, FOURTH):
            yield SimpleNamespace(device=device, is_cuda=device.type == "cuda", full_tensor=None)


def test_the_device_is_that_of_the_model(alone):
    assert ranks_of(Elsewhere()) == Ranks(alone, device=THIRD)
    assert ranks_of(nn.parallel.DistributedDataParallel(model())).device is None


DDP = """
import torch, warnings
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from ww_train import WWPGD, measure, measurement
from ww_train.callbacks.monitor import SpectralMonitor
from ww_train.callbacks.sharing import ranks_of, unwrapped

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(24, 24) for _ in range(5)])
model = DistributedDataParallel(model)
ranks = ranks_of(model)
opt = WWPGD(torch.optim.AdamW(model.parameters(), lr=1e-2), strength=0.5)

def train():
    for i in range(2):
        opt.zero_grad()
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(10 * RANK + i))
        (model(x) - x.flip(1)).square().mean().backward()
        opt.step()

heard = []
monitor = SpectralMonitor(
    model, opt, log_to=f"{FOLDER}/log.csv", early_stop=lambda report: len(monitor.history) == 2,
    budget=None, on_verdict=lambda layer, previous: heard.append((layer.name, layer.verdict, previous)),
)
with monitor:
    for _ in range(3):
        train()
        monitor.epoch_end()
stopped = monitor.should_stop
weights = [p.flatten()[:5].tolist() + [float(p.double().sum())] for p in model.parameters()]
strip = ("ww/seconds", "ww/overhead")
history = [{k: v for k, v in r.items() if k not in strip} for r in monitor.history]
alone = measure(model, randomize=True).scalars()

# one rank that fails to measure leaves none waiting
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    other = SpectralMonitor()
    other.begin(step=0, ranks=ranks)
    if RANK == 1:
        def unlucky(*_):
            raise RuntimeError("no luck on rank 1")
        measurement.count_traps = unlucky
    first = other.boundary(unwrapped(model), epoch=1, step=1)
RESULT = {
    "replicated": ranks.replicated, "first": ranks.first, "weights": weights, "history": history,
    "alone": alone, "stopped": stopped, "heard": heard, "failed": first,
    "warnings": [str(w.message) for w in caught],
}
"""


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return folder, run_ranks(DDP, folder)


def test_replicas_stay_equal_and_all_ranks_know_the_same(ddp):
    _, (zero, one) = ddp
    assert zero["replicated"]
    assert (zero["first"], one["first"]) == (True, False)
    for key in ("weights", "history", "stopped", "heard"):
        assert zero[key] == one[key]
    assert len(zero["history"]) == 4
    assert zero["history"][-1]["ww/strength"] == 0.5
    assert zero["stopped"]
    recorded = {tag: zero["history"][-1][tag] for tag in zero["alone"]}
    assert recorded == pytest.approx(zero["alone"], rel=1e-6, abs=1e-6)
    assert recorded["ww/num_layers"] == 5.0


def test_the_first_rank_writes(ddp):
    folder, _ = ddp
    lines = (folder / "log.csv").read_text().splitlines()
    assert len([line for line in lines if ",ww/alpha_mean," in line]) == 4


def test_one_rank_that_fails_leaves_none_waiting(ddp):
    _, (zero, one) = ddp
    assert zero["failed"] == one["failed"] == {}
    (message,) = zero["warnings"]
    assert "no luck on rank 1" in message
    assert one["warnings"] == []


SHARDED = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from ww_train import measure
from ww_train.callbacks.monitor import SpectralMonitor
from ww_train.callbacks.sharing import ranks_of

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(24, 24) for _ in range(3)])
whole = measure(model, randomize=True).scalars()
mesh = dist.init_device_mesh("cpu", (2,))
fully_shard(model, mesh=mesh)
ranks = ranks_of(model)
clock = (lambda: 0.0) if RANK == 0 else (lambda: 1e9)  # ranks that would plan differently
monitor = SpectralMonitor(model, log_to=f"{FOLDER}/log.csv", summary=False, clock=clock)
for _ in range(2):
    scalars = monitor.epoch_end()
RESULT = {
    "group": ranks.group is not None, "replicated": ranks.replicated, "whole": whole,
    "scalars": scalars, "summary": monitor.verdict,
}
"""


def test_sharded_weights_are_read_by_all_ranks_together(tmp_path):
    zero, one = run_ranks(SHARDED, tmp_path)
    assert zero["group"]
    assert not zero["replicated"]
    assert zero["scalars"] == one["scalars"]
    assert {tag: zero["scalars"][tag] for tag in zero["whole"]} == zero["whole"]
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert len([line for line in lines if ",ww/alpha_mean," in line]) == 2
