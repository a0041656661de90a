"""Two gloo processes read one model; see `tests/pair.py`."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ww_train import dealing, decomposition, measure, measurement
from ww_train.planning import Plan
from ww_train.ranks import NO_ROOM

from .pair import Pair, devices_at_gather, no_room

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)

SIZES = [24, 40, 16, 40, 24, 12, 33]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    both = Pair(tmp_path_factory.mktemp("pair"))
    yield both
    both.close()


def network(shards):
    """Layers of several sizes; `shards` of them are sharded over both processes."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(n, 2 * n) for n in SIZES], nn.Conv2d(12, 16, 3))
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in list(model)[:shards]:
        fully_shard(layer, mesh=mesh)
    return model


def numbers(report):
    layers = [(x.name, x.alpha, x.num_traps, x.spectrum.evals.tolist()) for x in report]
    return layers, [(x.name, x.reason) for x in report.skipped]


def decomposed(call):
    """What a call gives, and the sizes of the layers that this process read in it."""
    sizes, report = [], measurement.Measurement._report

    def counting(self, plan, evals):
        sizes.append(plan.matrix.M)
        return report(self, plan, evals)

    measurement.Measurement._report = counting
    try:
        return call(), sizes
    finally:
        measurement.Measurement._report = report


def read(shards, large=1024):
    model, decomposition.LARGE = network(shards), large
    try:
        report, sizes = decomposed(
            lambda: measure(model, randomize=True, min_evals=13, group=dist.group.WORLD)
        )
    finally:
        decomposition.LARGE = 1024
    return numbers(report), numbers(measure(model, randomize=True, min_evals=13)), sizes


@pytest.mark.parametrize("large", [1, 20, 1024])
@pytest.mark.parametrize("shards", [0, 1, 3, len(SIZES) + 1])
def test_all_know_what_one_would_have_measured_and_each_reads_a_part(pair, shards, large):
    (zero, alone, first), (one, _, second) = pair(read, shards, large)
    assert zero == one == alone
    assert [name for name, _ in zero[1]] == ["5"]
    layers = len(SIZES) - 1 + 1
    assert layers <= len(first) + len(second) <= layers + shards  # short turns are read twice
    assert max(len(first), len(second)) < layers


def difference(shards):
    model, base = network(shards), network(shards)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.ones_like(parameter))
    shared = measure(model, base_model=base, group=dist.group.WORLD)
    return numbers(shared), numbers(measure(model, base_model=base))


@pytest.mark.parametrize("shards", [0, 4])
def test_a_difference_to_a_base_model_is_dealt_as_well(pair, shards):
    (zero, alone), (one, _) = pair(difference, shards)
    assert zero == one == alone


def unlucky(shards, number):
    """Rank 1 fails at a layer in the middle."""
    model, report, seen = network(shards), measurement.Measurement._report, []

    def failing(self, plan, evals):
        seen.append(plan.matrix.name)
        if dist.get_rank() == 1 and len(seen) > number:
            raise KeyError("no luck")
        return report(self, plan, evals)

    measurement.Measurement._report = failing
    try:
        measure(model, group=dist.group.WORLD)
    except RuntimeError as error:
        return str(error)
    finally:
        measurement.Measurement._report = report
    return "nothing was raised"


@pytest.mark.parametrize("shards", [0, 2, len(SIZES) + 1])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_process_that_fails_leaves_none_waiting(pair, shards, number):
    assert pair(unlucky, shards, number) == ["KeyError: 'no luck'"] * 2


def strangers():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(24, 24) for _ in range(2 + dist.get_rank())])
    try:
        measure(model, group=dist.group.WORLD)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def test_processes_with_different_models_are_refused(pair):
    assert (
        pair(strangers)
        == [
            "the processes that are to share the layers hold different ones",
        ]
        * 2
    )


def refused():
    try:
        measure(network(0), layers="nowhere" if dist.get_rank() else None, group=dist.group.WORLD)
    except (RuntimeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "nothing was raised"


def test_arguments_that_one_process_refuses_are_refused_by_all(pair):
    (kind, message), (other, reason) = pair(refused)
    assert (kind, other) == ("RuntimeError", "ValueError")
    assert message == f"rank 1: {reason}"


def load_fails():
    """Rank 1 has no memory for a layer that it has gathered."""
    model, bring, tries = network(len(SIZES) + 1), Plan._bring, []

    def failing(self):
        bring(self)
        tries.append(self)
        if dist.get_rank() == 1 and len(tries) == 3:
            raise MemoryError("no room")

    Plan._bring = failing
    try:
        measure(model, group=dist.group.WORLD)
    except RuntimeError as error:
        return str(error)
    finally:
        Plan._bring = bring
    return "nothing was raised"


def test_a_process_that_cannot_keep_what_it_gathered_leaves_none_waiting(pair):
    assert pair(load_fails) == ["MemoryError: no room"] * 2


def starved(rank, number, against_base):
    model = network(len(SIZES) + 1)
    base = network(len(SIZES) + 1) if against_base else None
    if base is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.ones_like(parameter))
    with no_room(rank, number):
        shared = numbers(measure(model, base_model=base, group=dist.group.WORLD))
    return shared, numbers(measure(model, base_model=base))


@pytest.mark.parametrize("against_base", [False, True])
@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_layer_that_one_process_cannot_gather_is_skipped_by_all(pair, rank, number, against_base):
    (zero, alone), (one, _) = pair(starved, rank, number, against_base)
    assert zero == one
    ((name, reason),) = zero[1]
    assert reason == NO_ROOM
    assert zero[0] == [layer for layer in alone[0] if layer[0] != name]
    assert len(zero[0]) == len(SIZES)


def devices():
    with devices_at_gather(dealing) as seen:
        measure(network(2), group=dist.group.WORLD)
    return seen


def test_what_is_sent_goes_through_the_device_of_the_layers(pair):
    assert pair(devices) == [[{"cpu"}] * 2] * 2
