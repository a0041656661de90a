import math

import pytest

from ww_train.comparing.readings import METRICS, read_changes

BY_NAME = {metric.name: metric for metric in METRICS}


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (5.0, 3.0, "better"),
        (3.0, 5.0, "worse"),
        (2.3, 1.9, "worse"),  # nearer to 2, but over-trained
        (1.5, 1.8, "better"),
        (1.8, 5.9, "better"),
        (2.0, 2.5, "worse"),
    ],
)
def test_alpha_is_best_just_above_two(before, after, verdict):
    assert BY_NAME["alpha"].read(before, after).verdict == verdict


@pytest.mark.parametrize(
    ("metric", "when_it_falls"),
    [
        ("log_norm", "better"),
        ("alpha_weighted", "better"),
        ("log_alpha_norm", "better"),
        ("log_spectral_norm", "better"),
        ("stable_rank", "no claim"),
        ("entropy", "no claim"),
        ("D", "no claim"),
        ("abs_ERG_gap", "better"),
        ("mp_softrank", "better"),
        ("rand_distance", "no claim"),
        ("num_traps", "better"),
    ],
)
def test_the_direction_of_every_metric(metric, when_it_falls):
    opposite = {"better": "worse", "worse": "better", "no claim": "no claim"}
    fell, rose = BY_NAME[metric].read(0.7, 0.2), BY_NAME[metric].read(-0.2, 0.7)
    assert fell.verdict == when_it_falls
    assert rose.verdict == opposite[when_it_falls]
    assert f"{metric} fell from 0.7 to 0.2: {BY_NAME[metric].fell}" in str(fell)
    assert f"{metric} rose from -0.2 to 0.7: {BY_NAME[metric].rose}" in str(rose)
    assert str(fell).endswith(".")


def test_a_claim_in_doubt_is_not_made():
    (plain,) = read_changes({"alpha": 5.0}, {"alpha": 3.0})
    (doubted,) = read_changes({"alpha": 5.0}, {"alpha": 3.0}, {"alpha": "it is noise", "D": "no"})
    assert (plain.verdict, doubted.verdict) == ("better", "no claim")
    assert doubted.sentence.endswith("does not call this better or worse (it is noise).")
    assert "noise" not in plain.sentence


def test_every_metric_is_read_and_in_order():
    before = {metric.name: 3.0 for metric in METRICS}
    readings = read_changes(before, dict.fromkeys(before, 4.0))
    assert [reading.metric for reading in readings] == [metric.name for metric in METRICS]
    assert {(reading.before, reading.after) for reading in readings} == {(3.0, 4.0)}


def test_rounding_and_metrics_of_one_model_only_are_no_change():
    before = {"alpha": 3.0, "D": 0.1, "entropy": 0.5}
    after = {"alpha": math.nextafter(3.0, 4.0), "log_norm": 1.0, "entropy": 0.6}
    assert [reading.metric for reading in read_changes(before, after)] == ["entropy"]


def test_columns_that_are_missing_have_no_number():
    assert all(metric.of({}) is None for metric in METRICS)
    assert BY_NAME["abs_ERG_gap"].of({"ERG_gap": -3}) == 3.0


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (10.5512, 10.5537, "from 10.551 to 10.554"),
        (2.0, 3.0, "from 2 to 3"),
        (1.0, 1.00000012, "from 1 to 1.0000001"),
    ],
)
def test_the_two_numbers_can_be_told_apart(before, after, told):
    assert told in BY_NAME["stable_rank"].read(before, after).sentence
