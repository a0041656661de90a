"""What a model takes on paper: against a literal count, laws of sharing, and the real thing."""

import math
import pickle

import pytest
import torch
from torch import nn

from ww_train import measure
from ww_train.batching import BATCH_BYTES
from ww_train.costs import Costs, Curve, Machine
from ww_train.ranks import deal
from ww_train.scale import (
    FIT,
    PROJECTION,
    SPECTRA,
    TRAPS,
    load,
    memory,
    scale,
    seconds,
    step_seconds,
)
from ww_train.weights.matrices import Skipped, weight_matrices

from .oracles import gaussian

SIZES = (64, 4096)


def cubic(factor):
    return Curve(SIZES, tuple(factor * n**3 for n in SIZES))


def costs(kind="cuda", threads=1, **parts):
    usual = {
        "looped": cubic(20e-12),
        "batched": cubic(10e-12),
        "host": Curve(),
        "eigh": cubic(80e-12),
        "gram32": cubic(2e-12),
        "gram16": cubic(1e-12),
        "shuffle": Curve((1, 10**9), (1e-9, 1.0), 1.0),
        "copy_rate": 1e10,
    }
    machine = Machine("Paper 1", kind, "2.99", None, threads)
    return Costs(machine=machine, **(usual | parts))


def hollow(*shapes, dtype=torch.float32):
    """Weights of any size that take no memory."""
    return {
        f"layer{i}.weight": torch.zeros((), dtype=dtype).expand(shape)
        for i, shape in enumerate(shapes)
    }


def layers(state):
    return [m for m in weight_matrices(state) if not isinstance(m, Skipped)]


# seconds


def test_one_layer_costs_what_its_operations_cost():
    (one,) = layers(hollow((1000, 200)))
    gram, values, vectors = 2e-12 * 1000 * 200**2, 20e-12 * 200**3, 80e-12 * 200**3
    shuffled = 1e-9 * 1000 * 200
    assert seconds([one], costs(), SPECTRA) == pytest.approx(gram + values + FIT)
    # the matrix and its shuffle are a batch of two
    expected = 2 * gram + 2 * values / 2 + shuffled + 2 * FIT
    assert seconds([one], costs(), TRAPS) == pytest.approx(expected)
    assert seconds([one], costs(), PROJECTION) == pytest.approx(3 * gram + vectors + FIT)


def test_layers_of_one_size_are_a_batch_and_others_are_not():
    same = layers(hollow(*[(256, 256)] * 10))
    apart = layers(hollow(*[(256 + i, 256 + i) for i in range(10)]))
    alone = seconds(same[:1], costs(), SPECTRA)
    assert seconds(same, costs(), SPECTRA) == pytest.approx(10 * alone - 100e-12 * 256**3)
    assert seconds(apart, costs(), SPECTRA) == pytest.approx(
        sum(seconds([m], costs(), SPECTRA) for m in apart)
    )


def test_every_slice_of_a_convolution_counts():
    (conv,) = layers({"conv.weight": torch.zeros(()).expand(300, 200, 3, 3)})
    assert conv.rf == 9
    expected = 9 * (2e-12 * 300 * 200**2 + 10e-12 * 200**3) + FIT
    assert seconds([conv], costs(), SPECTRA) == pytest.approx(expected)


def test_half_precision_weights_have_their_own_rate():
    single, half = (
        layers(hollow((512, 512), dtype=dtype)) for dtype in (torch.float32, torch.float16)
    )
    saved = 1e-12 * 512**3
    difference = seconds(single, costs(), SPECTRA) - seconds(half, costs(), SPECTRA)
    assert difference == pytest.approx(saved)


def test_on_the_cpu_small_layers_get_a_core_each_and_large_ones_all():
    small, large = layers(hollow((512, 512), (4096, 4096)))
    on_cpu = costs("cpu", threads=4)
    assert seconds([small], on_cpu, SPECTRA) == pytest.approx(12e-12 * 512**3 + FIT)
    assert seconds([large], on_cpu, SPECTRA) == pytest.approx(22e-12 * 4096**3 + FIT)
    shuffles = [
        seconds([m], on_cpu, TRAPS) - 2 * seconds([m], on_cpu, SPECTRA) for m in (small, large)
    ]
    assert shuffles == pytest.approx([1e-9 * 512**2 / 4, 1e-9 * 4096**2])


def test_the_host_is_used_where_it_is_faster():
    with_host = costs(host=cubic(1e-12))
    (one,) = layers(hollow((256, 256)))
    assert seconds([one], with_host, SPECTRA) == pytest.approx(3e-12 * 256**3 + FIT)


# ranks


STATE = hollow(*[(64 * i, 48 * i) for i in range(2, 14)], (5000, 700))


@pytest.mark.parametrize("work", [SPECTRA, TRAPS, PROJECTION])
def test_the_longest_rank_is_that_of_the_deal(work):
    matrices = layers(STATE)
    for ranks in (1, 2, 3, 8):
        owners = deal([seconds([m], costs(), work) for m in matrices], ranks)
        loads = [0.0] * ranks
        for m, owner in zip(matrices, owners, strict=True):
            loads[owner] += seconds([m], costs(), work)
        found = load(matrices, costs(), ranks, work)
        assert found.longest == pytest.approx(max(loads))  # every size is another: no batches
        assert found.seconds == pytest.approx(sum(loads))


def test_more_ranks_are_never_slower_and_the_largest_layer_is_the_limit():
    matrices = layers(STATE)
    longest = [load(matrices, costs(), ranks, TRAPS).longest for ranks in (1, 2, 4, 16, 1024)]
    assert longest == sorted(longest, reverse=True)
    limit = max(seconds([m], costs(), TRAPS) for m in matrices)
    assert longest[-1] == longest[-2] == pytest.approx(limit)


def test_sharded_weights_are_gathered_once_by_each_rank():
    matrices = layers(STATE)
    total = sum(math.prod(m.shape) * 4 for m in matrices)
    assert load(matrices, costs(), 1, SPECTRA).gathered == 0
    found = load(matrices, costs(), 8, TRAPS)
    assert found.gathered == total * 7 // 8
    assert found.largest == 5000 * 700 * 4
    slow = load(matrices, costs(), 8, TRAPS, network=1e6)
    assert slow.longest - found.longest == pytest.approx((found.gathered + found.results) / 1e6)
    alone = load(matrices, costs(), 1, TRAPS)
    assert load(matrices, costs(), 1, TRAPS, network=1e6) == alone


@pytest.mark.parametrize("shuffles", [0, 1])
def test_results_are_as_large_as_a_report_that_is_sent(shuffles):
    state = {f"{i}.weight": gaussian(300, 200, seed=i).float() for i in range(4)}
    sent = len(pickle.dumps(measure(state, randomize=shuffles)))
    found = load(layers(state), costs(), 2, TRAPS if shuffles else SPECTRA).results
    assert sent == pytest.approx(found, rel=0.3)


def test_a_projection_sends_the_weights():
    (one,) = layers(hollow((3000, 1000)))
    assert load([one], costs(), 2, PROJECTION).results == pytest.approx(12e6, rel=0.01)


# memory


def test_gram_matrices_wait_up_to_the_size_of_a_batch():
    M = 2048
    gram = 8 * M * M
    few, many = layers(hollow(*[(M, M)] * 2)), layers(hollow(*[(M, M)] * 100))
    assert memory(few, costs(), SPECTRA) == 4 * 2 * gram
    assert memory(many, costs(), SPECTRA) == 4 * (BATCH_BYTES + gram)
    assert memory(many, costs(), TRAPS) == 4 * (BATCH_BYTES + 2 * gram)
    assert memory(many, costs(), PROJECTION) > memory(many, costs(), SPECTRA)
    assert memory(many + few, costs(), SPECTRA) == memory(many, costs(), SPECTRA)


def test_on_the_cpu_memory_is_that_of_the_layers_in_work():
    small = layers(hollow(*[(600, 500)] * 5))
    (large,) = layers(hollow((4096, 4096)))
    one = memory(small[:1], costs("cpu"), TRAPS)
    assert memory(small, costs("cpu"), TRAPS) == one
    assert memory(small, costs("cpu", threads=3), TRAPS) == 3 * one
    assert memory([*small, large], costs("cpu", threads=3), SPECTRA) == memory(
        [large], costs("cpu"), SPECTRA
    )
    assert memory([large], costs("cpu"), SPECTRA) >= 3 * 8 * 4096**2


# models


def test_a_model_is_what_measure_and_the_optimizer_take():
    model = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 100), nn.Linear(100, 5))
    found = scale(model, costs(), 2)
    assert found.parameters == 500 * 64 + 64 * 100 + 500
    assert [layer.name for layer in found.skipped] == ["2"]
    assert found.spectra.layers == found.traps.layers == len(measure(model).layers)
    assert found.projection.layers == 1  # no embedding, no layer without a reliable alpha


def test_layers_too_large_to_be_measured_are_named():
    state = hollow((16384, 16384), (1024, 16384))
    found = scale(state, costs())
    assert (found.spectra.layers, found.projection.layers) == (1, 2)
    assert "max_evals=15000" in found.skipped[0].reason
    assert scale(state, costs(), max_evals=None).spectra.layers == 2


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ({}, {}, "no matrix"),
        (hollow((50, 50)), {"ranks": 0}, "positive"),
        (hollow((50, 50)), {"network": 0.0}, "positive"),
        (hollow((50, 50)), {"network": math.nan}, "positive"),
    ],
)
def test_what_makes_no_sense_is_refused(model, options, says):
    with pytest.raises(ValueError, match=says):
        scale(model, costs(), **options)


def test_the_advice_keeps_the_cost_within_the_share():
    found = load(layers(STATE), costs(), 2, TRAPS)
    every = found.every(1e-3, 0.01)
    assert found.longest <= 0.01 * every * 1e-3
    assert found.longest > 0.01 * (every - 1) * 1e-3
    assert found.every(1e6, 1.0) == 1


def test_a_step_is_six_operations_a_parameter_and_token():
    expected = 6 * 7e9 * 4e6 / (512 * 1e15 * 0.4)
    assert step_seconds(7_000_000_000, 4e6, 1e15, 512) == pytest.approx(expected)
    assert step_seconds(10, 10, 600.0, efficiency=1.0) == 1.0
