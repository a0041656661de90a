import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ww_train import ManifoldProjection
from ww_train.steering.rounding import round_to

from .oracles import gaussian, quick

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@HALF
@pytest.mark.parametrize("seed", [0, 1])
def test_every_number_of_sixteen_bits_is_rounded_to_itself(dtype, seed):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    assert len(numbers) > 60000
    assert torch.equal(round_to(numbers.double(), dtype, seed), numbers)


@HALF
@pytest.mark.parametrize(
    "value", [1.0003, -1.0003, 0.4999, 3.14159e-3, 1.9999, -700.03, 1e-7, 3e-6]
)
def test_a_number_between_two_goes_to_either_and_keeps_its_mean(dtype, value):
    copies = 20000
    rounded = round_to(torch.full((copies,), value, dtype=torch.float64), dtype, 0).double()
    low, high = sorted(set(rounded.tolist()))
    assert low < value < high
    between = torch.tensor([(low + high) / 2], dtype=torch.float64)
    assert float(between.to(dtype)) in (low, high)  # no number of this dtype lies between them
    deviation = (high - low) / 2 / math.sqrt(copies)
    assert float(rounded.mean()) == pytest.approx(value, abs=5 * deviation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_numbers_are_rounded_to_the_nearest(dtype):
    values = gaussian(50, 50, dtype=torch.float64)
    assert torch.equal(round_to(values, dtype, 0), values.to(dtype))


@HALF
def test_rounding_depends_on_its_seed_alone(dtype):
    values, state = gaussian(50, 50, dtype=torch.float64), torch.get_rng_state()
    first = round_to(values, dtype, 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(round_to(values, dtype, 7), first)
    assert not torch.equal(round_to(values, dtype, 8), first)


def test_what_does_not_fit_becomes_infinite():
    values = torch.tensor([65519.0, 65536.0, -1e9], dtype=torch.float64)
    rounded = round_to(values, torch.float16, 0)
    assert float(rounded[0]) in (65504.0, math.inf)
    assert rounded[1:].tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_step_of_half_precision_weights_is_kept_on_average(dtype):
    start = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact, stepped = start.double(), start.clone()
    ManifoldProjection().project_(exact, 1e-4)
    ManifoldProjection().project_(stepped, 1e-4)
    step, taken = exact - start.double(), stepped.double() - start.double()
    nearest = exact.to(dtype).double() - start.double()
    whole = float(step.square().sum())
    assert float((nearest * step).sum()) < 0.5 * whole  # rounded to the nearest it is lost
    assert float((taken * step).sum()) == pytest.approx(whole, rel=0.15)
    again = start.clone()
    ManifoldProjection().project_(again, 1e-4)
    assert torch.equal(again, stepped)


@HALF
@quick
@given(st.floats(-60000, 60000), st.integers(0, 2**31))
def test_a_number_moves_by_less_than_one_place(dtype, value, seed):
    exact = torch.tensor([value], dtype=torch.float64)
    nearest = exact.to(dtype)
    neighbours = {float(nearest), float(nextafter(nearest, 1)), float(nextafter(nearest, -1))}
    assert float(round_to(exact, dtype, seed)) in neighbours


def nextafter(number, direction):
    """The next number of the same dtype; numbers of 16 bits are ordered as their codes are."""
    code = number.view(torch.int16).to(torch.int64) & 0xFFFF
    place = torch.where(code < 0x8000, code, 0x8000 - code) + direction
    code = torch.where(place >= 0, place, 0x8000 - place)
    return code.to(torch.int32).to(torch.int16).view(number.dtype)


def steps(weight, dtype, strength, number):
    """Distance to the manifold after small steps, each rounded to the nearest number of a dtype."""
    weight = weight.clone()
    for _ in range(number):
        exact = weight.double()
        ManifoldProjection().project_(exact, strength)
        weight = exact.to(dtype)
    return ManifoldProjection().project_(weight.double()).distance


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_many_small_steps_in_half_precision_arrive_where_exact_ones_do(seed):
    start = gaussian(60, 40, seed, torch.bfloat16)
    exact = steps(start.double(), torch.float64, 0.002, 200)
    nearest = steps(start, torch.bfloat16, 0.002, 200)
    stepped = start.clone()
    for _ in range(200):
        ManifoldProjection().project_(stepped, 0.002)
    whole = ManifoldProjection().project_(start.double()).distance
    assert exact < 0.75 * whole
    assert whole - nearest < 0.4 * (whole - exact)  # most of two hundred steps is lost
    left = ManifoldProjection().project_(stepped.double()).distance
    assert left == pytest.approx(exact, abs=0.03 * (whole - exact))


def test_a_tiny_step_rounded_to_the_nearest_changes_nothing():
    noise = gaussian(60, 40, dtype=torch.float64)
    start = (noise.sign() + 0.5 * noise.tanh()).bfloat16()  # numbers near zero have finer places
    exact, stepped = start.double(), start.clone()
    ManifoldProjection().project_(exact, 2e-4)
    ManifoldProjection().project_(stepped, 2e-4)
    assert torch.equal(exact.to(torch.bfloat16), start)
    assert not torch.equal(exact, start.double())
    assert not torch.equal(stepped, start)
