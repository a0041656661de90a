import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ww_train import Ramp
from ww_train.steering.schedules import Cosine, check_strength

from .oracles import quick

KINDS = pytest.mark.parametrize("kind", [Ramp, Cosine])


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (Ramp(), [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 1.0]),
        (Ramp(2), [0.5, 1.0, 1.0]),
        (Ramp(1), [1.0, 1.0]),
        (Ramp(4, top=0.2), [0.05, 0.1, 0.15, 0.2, 0.2]),
        (Ramp(3, top=0.0), [0.0, 0.0, 0.0, 0.0]),
        (Cosine(1), [1.0, 1.0]),
        (Cosine(2), [0.5, 1.0, 1.0]),
        (Cosine(4, top=0.5), [0.0732233, 0.25, 0.4267767, 0.5, 0.5]),
    ],
)
def test_strengths(ramp, expected):
    assert [ramp(epoch) for epoch in range(len(expected))] == pytest.approx(expected, abs=1e-7)
    assert ramp(10**6) == ramp.top


@KINDS
@quick
@given(st.integers(1, 50), st.floats(0.0, 1.0))
def test_a_ramp_rises_to_its_top_and_stays(kind, epochs, top):
    ramp = kind(epochs, top)
    strengths = [ramp(epoch) for epoch in range(2 * epochs)]
    assert strengths == sorted(strengths)
    assert strengths[epochs - 1 :] == [top] * (epochs + 1)
    for strength in strengths:
        check_strength(strength)


@quick
@given(st.integers(2, 50), st.data())
def test_a_cosine_is_slow_fast_slow(epochs, data):
    ramp = Cosine(epochs, 0.8)
    i = data.draw(st.integers(0, epochs - 2))
    assert ramp(i) + ramp(epochs - 2 - i) == pytest.approx(0.8)
    assert (ramp(i) <= Ramp(epochs, 0.8)(i) + 1e-12) == (2 * (i + 1) <= epochs)


@KINDS
@pytest.mark.parametrize("epochs", [0, -3])
def test_a_ramp_needs_an_epoch(kind, epochs):
    with pytest.raises(ValueError, match="at least one epoch"):
        kind(epochs)


@KINDS
@pytest.mark.parametrize("top", [-0.1, 1.5, math.nan, math.inf])
def test_the_top_is_a_strength(kind, top):
    with pytest.raises(ValueError, match="strength must be between 0 and 1, got"):
        kind(6, top)


@KINDS
def test_ramps_are_values(kind):
    assert pickle.loads(pickle.dumps(kind(3, 0.5))) == kind(3, 0.5) != kind(3)
    assert repr(kind(3, 0.5)) == f"{kind.__name__}(epochs=3, top=0.5)"


@pytest.mark.parametrize("strength", [0, 0.0, 1e-300, 0.5, 1, 1.0])
def test_a_strength_between_zero_and_one(strength):
    assert check_strength(strength) is None


@pytest.mark.parametrize("strength", [-1e-9, 1.0000001, 2, math.nan, math.inf, -math.inf])
def test_a_strength_outside(strength):
    with pytest.raises(ValueError, match="strength must be between 0 and 1, got"):
        check_strength(strength)
