import contextlib
import itertools
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ww_train.ranks import deal, gather, on_device

from .oracles import quick


def heaviest(costs, owners, ranks):
    loads = [0.0] * ranks
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return max(loads)


@quick
@given(st.lists(st.floats(0, 1e12), max_size=40), st.integers(1, 9))
def test_every_piece_has_one_owner(costs, ranks):
    owners = deal(costs, ranks)
    assert len(owners) == len(costs)
    assert set(owners) <= set(range(ranks))
    assert deal(costs, ranks) == owners


@quick
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_the_longest_rank_is_at_most_a_third_longer_than_it_must_be(costs, ranks):
    every_way = itertools.product(range(ranks), repeat=len(costs))
    best = min(heaviest(costs, owners, ranks) for owners in every_way)
    assert heaviest(costs, deal(costs, ranks), ranks) <= 4 / 3 * best + 1e-9


@quick
@given(st.integers(0, 30), st.integers(1, 9))
def test_equal_pieces_are_dealt_evenly(pieces, ranks):
    counts = Counter(deal([7.0] * pieces, ranks))
    each = [counts[rank] for rank in range(ranks)]
    assert max(each) - min(each) <= 1


def test_a_heavy_piece_stands_alone():
    owners = deal([1, 1, 100, 1, 1], 2)
    assert [owner == owners[2] for owner in owners] == [False, False, True, False, False]


def test_kinds_that_alternate_go_to_all_ranks():
    owners = deal(
        [2.0, 2.0] * 4, 2
    )  # equal as far as one can tell, but perhaps not as it turns out
    assert [sum(owners[i] == 0 for i in kind) for kind in (range(0, 8, 2), range(1, 8, 2))] == [
        2,
        2,
    ]


def test_nothing_to_deal():
    assert deal([], 3) == []


def test_gather_in_a_group_of_one(tmp_path):
    if dist.is_initialized():
        pytest.skip("needs that nobody else has made a process group")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert gather({"a": (1, None)}, dist.group.WORLD) == [{"a": (1, None)}]
    finally:
        dist.destroy_process_group()


CPU, THIRD, FOURTH = torch.device("cpu"), torch.device("cuda", 2), torch.device("cuda", 3)


@pytest.mark.parametrize(
    ("devices", "entered"),
    [
        ([], []),
        ([None], []),
        ([CPU, torch.device("meta")], []),
        ([None, CPU, THIRD, FOURTH], [THIRD]),
    ],
    ids=["none", "unknown", "cpu", "cuda"],
)
def test_the_first_cuda_device_is_the_current_one(monkeypatch, devices, entered):
    seen = current(monkeypatch)
    with on_device(devices):
        assert seen == entered
    assert seen == [*entered, *["left" for _ in entered]]


def current(monkeypatch):
    """Notes which CUDA device is made the current one, where there may be none."""
    seen = []

    @contextlib.contextmanager
    def device(chosen):
        seen.append(chosen)
        yield
        seen.append("left")

    monkeypatch.setattr(torch.cuda, "device", device)
    return seen
