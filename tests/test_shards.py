"""Sharded weights: on a mesh of one process, and of two that train with FSDP2."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ww_train import WWPGD, ManifoldProjection, Projected, Skipped, measure
from ww_train.ranks import NO_ROOM, gathered, shared_room
from ww_train.steering import shards

from .oracles import gaussian
from .pair import Pair, devices_at_gather, no_room
from .test_replicas import Counting, assert_equal, deep, digest, numbers
from .training import SIZE, collect, net

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


def test_a_sharded_weight_is_projected_as_if_it_were_whole(model):
    whole = nn.Linear(30, 40, bias=False)
    whole.weight.data.copy_(model.weight.full_tensor())
    before = model.weight
    for one in (whole, model):
        opt = WWPGD(torch.optim.SGD(one.parameters(), lr=0.1), model=one, strength=1.0, strict=True)
        (done,) = opt.end_epoch()
        assert isinstance(done, Projected)
    assert model.weight is before
    assert torch.equal(model.weight.full_tensor(), whole.weight)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available() or sys.platform == "win32":
        pytest.skip("needs torch.distributed with gloo")
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


def whole(model):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]


def fsdp_training(steps=6):
    from torch.distributed.fsdp import fully_shard

    model = net().double()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    counting = Counting()
    opt = WWPGD(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        model=model,
        projection=counting,
        steps_per_epoch=3,
        strength=0.8,
        strict=True,
    )
    share = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    for i in range(steps):
        opt.zero_grad()
        x = gaussian(8, SIZE, i, torch.float64)[share]
        (model(x) - x.flip(1)).square().mean().backward()
        opt.step()
    kinds = [type(p).__name__ for p in model.parameters()]
    return numbers(whole(model)), kinds, counting.names, digest(opt.projected)


def test_training_with_fsdp2_is_training_of_the_whole_model(pair):
    first, second = pair(fsdp_training)
    assert_equal(first[0], second[0])
    assert set(first[1]) == {"DTensor"}
    assert first[3] == second[3] == [("Projected", "0"), ("Projected", "2")]
    assert len(first[2]) == len(second[2]) == 2  # each rank one layer at each of two boundaries
    assert not set(first[2]) & set(second[2])
    model = net().double()
    opt = WWPGD(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        model=model,
        steps_per_epoch=3,
        strength=0.8,
    )
    for i in range(6):
        opt.zero_grad()
        x = gaussian(8, SIZE, i, torch.float64)
        (model(x) - x.flip(1)).square().mean().backward()
        opt.step()
    for p, values in zip(model.parameters(), first[0], strict=True):
        found = torch.from_numpy(values).view(torch.float64)
        torch.testing.assert_close(found, p.detach().view(-1), rtol=0, atol=1e-6)


def layers_of_all_kinds():
    from torch.distributed.fsdp import fully_shard

    model = deep()
    for layer in model.values():
        fully_shard(layer)
    opt = WWPGD(torch.optim.SGD(model.parameters(), lr=0.1), model=model, strength=1.0, strict=True)
    done = opt.end_epoch()
    return [(d.name, d.distance) for d in done if isinstance(d, Projected)], numbers(whole(model))


def test_every_kind_of_layer_is_projected_as_if_it_were_whole(pair):
    (first, weights), (second, others) = pair(layers_of_all_kinds)
    model = deep()
    opt = WWPGD(torch.optim.SGD(model.parameters(), lr=0.1), model=model, strength=1.0, strict=True)
    alone = [(d.name, d.distance) for d in opt.end_epoch() if isinstance(d, Projected)]
    assert len(alone) > 8
    assert [name for name, _ in first] == [name for name, _ in second] == [n for n, _ in alone]
    assert [d for _, d in first] == pytest.approx([d for _, d in alone], rel=1e-9)
    assert_equal(weights, others)
    for p, values in zip(model.parameters(), weights, strict=True):
        found = torch.from_numpy(values).view(torch.float64)
        torch.testing.assert_close(found, p.detach().view(-1), rtol=0, atol=1e-9)


class FailingHere(ManifoldProjection):
    """Fails on the layer that only one of the ranks projects."""

    def project_(self, matrix, strength=1.0, *, then=None):
        if matrix.name == "2":
            raise torch.linalg.LinAlgError("did not converge")
        return super().project_(matrix, strength, then=then)


def one_layer_fails():
    from torch.distributed.fsdp import fully_shard

    model = net().double()
    fully_shard(model)
    before = numbers(whole(model))
    opt = WWPGD(torch.optim.SGD(model.parameters(), lr=0.1), model=model, projection=FailingHere())
    return before, digest(opt.end_epoch()), numbers(whole(model))


def test_a_layer_that_fails_on_its_rank_is_left_alone_on_all(pair):
    first, second = pair(one_layer_fails)
    assert first[1] == second[1] == [("Projected", "0"), ("Failed", "2")]
    assert_equal(first[2], second[2])
    assert_equal(first[0][2:], first[2][2:])
    assert any((a != b).any() for a, b in zip(first[0][:2], first[2][:2], strict=True))


def test_a_sharded_matrix_without_a_view_is_skipped(mesh):
    conv = nn.Conv2d(40, 40, 3, groups=2, bias=False)
    weight = conv.weight.detach()
    conv.weight = nn.Parameter(tensor.distribute_tensor(weight, mesh, [tensor.Shard(0)]))
    opt = WWPGD(torch.optim.SGD(conv.parameters(), lr=0.1), model=conv, exclude=lambda m: True)
    assert opt.targets() == [Skipped("weight", "sharded over processes")]


# Memory


def starved(rank, number):
    from torch.distributed.fsdp import fully_shard

    model = net().double()
    fully_shard(model)
    opt = WWPGD(torch.optim.SGD(model.parameters(), lr=0.1), model=model, strength=1.0)
    with no_room(rank, number):
        messages, done = collect(opt.end_epoch)
    return digest(done), messages, numbers(whole(model))


@pytest.mark.parametrize("number", [1, 2, 3, 4])  # two to gather, two to receive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_layer_that_one_rank_has_no_memory_for_is_left_alone_on_all(pair, rank, number):
    first, second = pair(starved, rank, number)
    assert first[:2] == second[:2]
    assert_equal(first[2], second[2])
    left, moved = ("0", "2") if number % 2 else ("2", "0")
    assert dict(map(reversed, first[0])) == {left: "Failed", moved: "Projected"}
    assert first[1] == [f"layer {left} is left as it is, {NO_ROOM}"]
    model = net().double()
    opt = WWPGD(torch.optim.SGD(model.parameters(), lr=0.1), model=model, include=moved)
    opt.strength = 1.0
    opt.end_epoch()
    for p, values in zip(model.parameters(), first[2], strict=True):
        found = torch.from_numpy(values).view(torch.float64)
        torch.testing.assert_close(found, p.detach().view(-1), rtol=0, atol=1e-9)


def pieces(placements):
    """A tensor whose shards are of unequal size, gathered, and what there was room for."""
    mesh = dist.init_device_mesh("cpu", (2, 1) if len(placements) == 2 else (2,))
    values = gaussian(7, 5, 3)
    sharded = tensor.distribute_tensor(values, mesh, placements)
    room = shared_room(sharded)
    with no_room(0, 1):
        neither = shared_room(sharded), gathered(sharded)  # the second has room again
    return torch.equal(gathered(sharded), values), tuple(room.shape), room.is_contiguous(), neither


@pytest.mark.parametrize(
    "placements",
    [
        [tensor.Shard(0)],
        [tensor.Shard(1)],
        [tensor.Replicate()],
        [tensor.Shard(1), tensor.Shard(0)],
        [tensor.Replicate(), tensor.Shard(0)],
    ],
    ids=str,
)
def test_room_for_a_tensor_of_any_sharding(pair, placements):
    for same, shape, contiguous, (none, again) in pair(pieces, placements):
        assert same
        assert shape == (7, 5)
        assert contiguous
        assert none is None
        assert torch.equal(again, gaussian(7, 5, 3))


def devices():
    with devices_at_gather(shards) as seen:
        layers_of_all_kinds()
    return seen


def test_what_is_sent_goes_through_the_device_of_the_layers(pair):
    first, second = pair(devices)
    assert first == second == [{"cpu"}] * len(first)
    assert len(first) > 1
