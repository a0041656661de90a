"""Sharded weights, on a mesh of one process over gloo."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ww_train import WWPGD, Skipped, measure

from .oracles import gaussian

tensor = pytest.importorskip("torch.distributed.tensor")


@pytest.fixture
def mesh(tmp_path):
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs torch.distributed and no process group of somebody else")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def model(mesh):
    layer = nn.Linear(30, 40, bias=False)
    layer.weight = nn.Parameter(tensor.distribute_tensor(gaussian(40, 30), mesh, [tensor.Shard(0)]))
    return layer


def test_a_sharded_weight_is_gathered(model):
    (whole,) = measure(gaussian(40, 30), randomize=True)
    (layer,) = measure(model, randomize=True)
    assert layer.spectrum.evals.tolist() == whole.spectrum.evals.tolist()
    assert layer.alpha == whole.alpha


@pytest.mark.filterwarnings("ignore:WWPGD projects no layer")
def test_a_sharded_weight_is_not_projected(model):
    before = model.weight.full_tensor().clone()
    opt = WWPGD(torch.optim.SGD(model.parameters(), lr=0.1), model=model, strength=1.0)
    assert opt.end_epoch() == (Skipped("weight", "sharded over processes"),)
    assert torch.equal(model.weight.full_tensor(), before)
