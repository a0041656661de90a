import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from ww_train import Report, Skipped, measure
from ww_train.callbacks.early_stopping import alpha_below, traps_appear
from ww_train.callbacks.timeline import Timeline, alarm
from ww_train.power_law import PowerLawFit

from .oracles import dense, gaussian, heavy

WEIGHTS = {name: gaussian(40, 30, seed=i) for i, name in enumerate("abc")}


def report(names="abc", *, randomize=True, **changed):
    weights = {name: changed.get(name, WEIGHTS[name]) for name in names}
    return measure(nn.ModuleDict({n: dense(w) for n, w in weights.items()}), randomize=randomize)


def with_fit(alpha, tail=400, name="a", traps=None, causes=()):
    """A layer of which only the fit and the traps matter."""
    (layer,) = report(name, randomize=False, **{name: torch.from_numpy(heavy(40, 30))})
    fit = PowerLawFit(alpha, 1.0, 9.0, 0.01, (alpha - 1.0) / tail**0.5, tail)
    return replace(layer, fit=fit, traps=traps, trap_causes=causes)


def only(layer):
    return Report((layer,), ())


def spiked():
    weight = WEIGHTS["a"].clone()
    weight[3, 4] = 30.0
    return weight


def test_the_latest_numbers_of_every_layer_are_kept_in_model_order():
    line, first = Timeline(), report()
    assert line.update(first, 0) == []
    fresh = replace(report("b", b=2.0 * WEIGHTS["b"])["b"], layer_id=1)
    line.update(only(fresh), 5)
    assert [layer.name for layer in line.report] == ["a", "b", "c"]
    assert line.report["b"] is fresh
    assert line.report["a"] is first["a"]
    assert line.measured == {"a": 0, "b": 5, "c": 0}


def test_traps_that_were_not_counted_again_stay_known():
    line = Timeline()
    line.update(report(a=spiked()), 0)
    known = line.report["a"]
    line.update(report(a=spiked(), randomize=False), 7)
    now = line.report["a"]
    assert now is not known
    assert (now.traps, now.trap_causes) == (known.traps, known.trap_causes)
    assert now.verdict == "trapped"
    assert (line.measured["a"], line.shuffled["a"]) == (7, 0)


def test_changes_are_counted_from_the_first_measurement():
    line, first = Timeline(), report()
    line.update(first, 0)
    line.update(report("ab", a=gaussian(40, 30, seed=9)), 5)
    line.update(report("ab", a=gaussian(40, 30, seed=10)), 9)
    last = measure(gaussian(40, 30, seed=10))["W"].alpha
    expected = {"a": last - first["a"].alpha, "b": 0.0, "c": 0.0}
    assert line.changes == pytest.approx(expected)


def test_a_layer_that_cannot_be_measured_any_more_is_dropped():
    line = Timeline()
    line.update(report(), 0)
    line.update(Report((), (Skipped("b", "NaN or infinite weights"),)), 5)
    assert [layer.name for layer in line.report] == ["a", "c"]
    assert [layer.name for layer in line.report.skipped] == ["b"]
    assert line.measured["b"] == 5
    line.update(only(replace(report("b")["b"], layer_id=1)), 9)
    assert [layer.name for layer in line.report] == ["a", "b", "c"]
    assert line.report.skipped == ()


def test_a_change_of_verdict_is_told_with_the_one_before():
    line = Timeline()
    for alpha, told in ((3.0, []), (3.5, []), (1.5, ["well-trained"]), (2.0, ["over-trained"])):
        changes = line.update(only(with_fit(alpha)), 0)
        assert [change.previous for change in changes] == told
        assert all(change.layer.alpha == alpha for change in changes)


# Alarms


def alarms_of(*layers):
    """Names of alarms after each of the layers' measurements."""
    line, result = Timeline(), []
    for step, layer in enumerate(layers):
        line.update(only(layer), step)
        result.append(len(line.alarms(only(layer))))
    return result


def test_an_alarm_is_what_lasts_and_was_not_so_from_the_start():
    fine, bad = with_fit(3.0), with_fit(1.5)
    assert alarms_of(fine, bad, bad) == [0, 0, 1]
    assert alarms_of(fine, bad, fine, bad) == [0, 0, 0, 0]
    assert alarms_of(bad, bad, bad) == [0, 0, 0]  # a pretrained layer, over-trained as it came
    assert alarms_of(fine, fine, fine) == [0, 0, 0]


def test_an_alpha_that_may_be_chance_is_no_alarm():
    assert alarm(with_fit(1.5, tail=400)) == "over-trained"
    assert alarm(with_fit(1.5, tail=8)) == ""
    assert alarm(with_fit(1.88, tail=100)) == ""
    assert alarm(with_fit(9.0)) == ""


def test_traps_without_a_cause_are_no_alarm():
    trapped = report("a", a=spiked())["a"]
    assert alarm(trapped) == "trapped"
    assert alarm(replace(trapped, trap_causes=())) == ""
    mean = replace(trapped.trap_causes[0], kind="mean", row=None, column=None)
    assert alarm(replace(trapped, trap_causes=(mean,))) == ""
    clean = report("a")["a"]
    assert alarms_of(clean, trapped, trapped) == [0, 0, 1]


def test_the_state_is_plain_json_and_goes_on():
    line, other = Timeline(), Timeline()
    line.update(only(with_fit(3.0)), 0)
    line.alarms(only(with_fit(3.0)))
    bad = only(with_fit(1.5))
    line.update(bad, 1)
    line.alarms(bad)
    other.load_state_dict(json.loads(json.dumps(line.state_dict())))
    assert other.state_dict() == line.state_dict()
    other.update(bad, 2)
    assert len(other.alarms(bad)) == 1
    assert other.changes == {"a": pytest.approx(-1.5)}


# When to stop


def test_stop_when_the_mean_alpha_falls_below_a_limit():
    rule = alpha_below()
    two = Report((with_fit(1.0), with_fit(2.9, name="b")), ())
    assert rule(two)
    assert not alpha_below(1.9)(two)
    assert not rule(only(with_fit(2.0)))
    assert not rule(Report((), ()))
    assert not rule(only(replace(with_fit(1.0), fit=None)))


def test_stop_when_traps_appear_that_were_not_there_at_first():
    rule = traps_appear()
    assert not rule(report(b=spiked()))
    assert not rule(report(b=spiked()))
    assert rule(report(a=spiked(), b=spiked()))
    assert traps_appear()(report(a=spiked())) is False
    clean = report()["a"]
    other = traps_appear()
    other(only(clean))
    by_chance = replace(report("a", a=spiked())["a"], trap_causes=())
    assert not other(only(by_chance))
