import json
import random

import pytest
import torch
from torch import nn

from ww_train import measure
from ww_train.callbacks import survey
from ww_train.callbacks.budget import GRANT, Budget, Candidate, plan
from ww_train.callbacks.monitor import SpectralMonitor

from .oracles import gaussian


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def spend(budget, clock, trained, cost):
    """A stretch of training and a boundary at which the cost is spent."""
    clock.now += trained
    with budget.interruption(), budget.watching():
        clock.now += cost


def test_the_account():
    clock = Clock()
    budget = Budget(0.01, clock=clock)
    clock.now += 50.0  # before the training begins
    budget.start()
    assert (budget.trained, budget.spent, budget.overhead) == (0.0, 0.0, None)
    assert budget.credit == pytest.approx(GRANT)
    spend(budget, clock, 20.0, 0.3)
    clock.now += 10.0
    with budget.interruption():
        clock.now += 7.0  # a projection: neither training nor watching
        with budget.watching() as seconds:
            clock.now += 0.2
            assert seconds() == pytest.approx(0.2)
    assert budget.trained == pytest.approx(30.0)
    assert budget.spent == pytest.approx(0.5)
    assert budget.overhead == pytest.approx(0.5 / 30.0)
    assert budget.credit == pytest.approx(GRANT + 0.15 - 0.5)


def test_a_break_between_two_trainings_does_not_count():
    clock = Clock()
    budget = Budget(0.01, clock=clock)
    budget.start()
    spend(budget, clock, 5.0, 0.1)
    clock.now += 1000.0
    budget.start()
    spend(budget, clock, 5.0, 0.1)
    assert budget.trained == pytest.approx(10.0)


def test_the_first_second_is_paid_back():
    clock = Clock()
    budget = Budget(0.01, clock=clock)
    budget.start()
    spend(budget, clock, 0.0, 0.0)
    for trained, allowed in ((0.0, 1.0), (100.0, 1.5), (100.0, 2.0), (100.0, 3.0), (700.0, 10.0)):
        spend(budget, clock, trained, 0.0)
        assert budget.credit == pytest.approx(allowed)


def test_without_a_limit_everything_can_be_afforded():
    budget = Budget(None)
    budget.spent = 1e9
    assert budget.credit == budget.affordable == float("inf")


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_a_budget_is_a_fraction(fraction):
    with pytest.raises(ValueError, match="budget is a fraction of the training time"):
        Budget(fraction)


def test_what_can_be_afforded_follows_from_what_it_took():
    clock = Clock()
    budget = Budget(0.01, clock=clock)
    assert budget.affordable == float("inf")
    budget.learn(1e9, 0.0)  # a clock too coarse to tell
    assert budget.affordable == float("inf")
    budget = Budget(0.01, clock=clock)
    budget.learn(1e9, 0.5)
    assert budget.affordable == pytest.approx(2e9 * GRANT)
    budget.learn(1e9, 1.5)
    assert budget.affordable == pytest.approx(1e9 * GRANT)
    budget.spent = 7.0
    assert budget.affordable == 0.0


def test_the_state_is_plain_json_and_goes_on():
    clock = Clock()
    budget, other = Budget(0.01, clock=clock), Budget(0.01, clock=clock)
    budget.start()
    spend(budget, clock, 20.0, 0.3)
    budget.learn(1e9, 0.5)
    other.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    assert other.state_dict() == budget.state_dict()
    assert (other.credit, other.affordable) == (budget.credit, budget.affordable)


# What to measure


def layers(number, spectrum=1.0, shuffles=1.0):
    return [Candidate(i, spectrum, shuffles) for i in range(number)]


def test_everything_if_it_fits():
    chosen = plan(layers(3), 6.0)
    assert (chosen.whole, chosen.spectra, chosen.work) == ((0, 1, 2), (), 6.0)
    assert plan([], 0.0).whole == ()
    assert plan(layers(2, 0.0, 0.0), 0.0).whole == (0, 1)  # skipped ones cost nothing


def test_all_spectra_and_the_traps_that_fit():
    chosen = plan(layers(4), 6.5)
    assert (chosen.whole, chosen.spectra, chosen.work) == ((0, 1), (2, 3), 6.0)


def test_whole_layers_if_the_spectra_alone_are_too_much():
    chosen = plan(layers(4), 4.5)
    assert (chosen.whole, chosen.spectra, chosen.work) == ((0, 1), (), 4.0)


def test_nothing_if_no_layer_can_be_afforded():
    chosen = plan(layers(4), 1.9)
    assert (chosen.whole, chosen.spectra, chosen.work) == ((), (), 0.0)


def test_the_stalest_come_first():
    ages = {0: 30, 1: 10, 2: -1, 3: 20}
    chosen = plan([Candidate(i, 1.0, 1.0, age, age) for i, age in ages.items()], 4.0)
    assert chosen.whole == (1, 2)


def test_those_behind_a_large_layer_wait_for_it():
    small, large = Candidate(0, 1.0, 0.0, 5, 5), Candidate(1, 9.0, 0.0, 4, 4)
    assert plan([small, large], 8.0).whole == ()
    assert plan([small, large], 9.5).whole == (1,)


@pytest.mark.parametrize("seed", range(5))
def test_no_layer_starves_whatever_comes_in_at_a_time(seed):
    random_ = random.Random(seed)
    costs = {i: (random_.uniform(0, 5), random_.uniform(0, 5)) for i in range(12)}
    measured, counted = dict.fromkeys(costs, -1), dict.fromkeys(costs, -1)
    credit, income = 0.0, random_.uniform(0.1, 20.0)
    rounds = int(40 * sum(a + b for a, b in costs.values()) / income) + 40
    for step in range(rounds):
        credit += income
        now = [Candidate(i, *costs[i], measured[i], counted[i]) for i in costs]
        chosen = plan(now, credit)
        cost = sum(sum(costs[i]) for i in chosen.whole) + sum(costs[i][0] for i in chosen.spectra)
        assert chosen.work == pytest.approx(cost)
        assert cost <= credit + 1e-9
        credit -= cost
        measured |= dict.fromkeys((*chosen.whole, *chosen.spectra), step)
        counted |= dict.fromkeys(chosen.whole, step)
    assert min(counted.values()) > rounds / 2


# The monitor on a clock that only decompositions and training move


SECONDS = 0.4  # of a decomposition of a 24 x 24 matrix; there are two layers, each decomposed twice


@pytest.fixture
def clock(monkeypatch):
    clock, solve = Clock(), torch.linalg.eigvalsh

    def timed(grams):
        clock.now += SECONDS * len(grams)
        return solve(grams)

    monkeypatch.setattr(torch.linalg, "eigvalsh", timed)
    monkeypatch.setattr(survey, "FIT", 0.0)  # on this clock fits take no time
    return clock


def net(layers=2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(24, 24, bias=False) for _ in range(layers)])


def run(monitor, clock, model, epochs, seconds):
    """Train for some epochs of so many seconds; the tags that were logged after each."""
    logged = []
    with monitor:
        for _ in range(epochs):
            clock.now += seconds
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.001 * gaussian(*p.shape))
            logged.append(monitor.epoch_end())
    return logged


def watch(model, clock, **options):
    """Without the measurement at the end, which the budget does not bind."""
    return SpectralMonitor(model, **{"clock": clock, "summary": False, "at_end": False, **options})


def test_at_the_end_every_spectrum_is_measured_whatever_it_costs(clock):
    monitor = watch(model := net(5), clock, at_end=True)
    run(monitor, clock, model, 4, 1.0)
    assert set(monitor.timeline.measured.values()) == {4}
    assert max(monitor.timeline.shuffled.values()) < 4  # traps cannot be afforded
    assert [layer.alpha for layer in monitor.report] == [layer.alpha for layer in measure(model)]
    spent = monitor.budget.spent
    monitor.close()
    assert monitor.budget.spent == spent  # nothing is measured twice


def test_a_short_run_is_measured_in_full(clock, monkeypatch):
    monkeypatch.setitem(globals(), "SECONDS", 0.01)
    monitor = watch(model := net(), clock)
    logged = run(monitor, clock, model, 10, 5.0)
    assert [scalars["ww/num_measured"] for scalars in logged] == [2.0] * 10
    assert all("ww_traps/1" in scalars for scalars in logged)


def test_without_a_budget_everything_is_measured_whatever_it_costs(clock):
    monitor = watch(model := net(), clock, budget=None)
    logged = run(monitor, clock, model, 10, 0.1)
    assert all({"ww_traps/0", "ww_traps/1"} <= scalars.keys() for scalars in logged)
    assert logged[-1]["ww/overhead"] == pytest.approx(4 * SECONDS * 11 / 1.0)


@pytest.mark.parametrize("seconds", [3.0, 20.0, 60.0, 200.0])
@pytest.mark.parametrize("fraction", [0.01, 0.05])
def test_the_budget_holds_at_every_moment(clock, seconds, fraction):
    monitor = watch(model := net(), clock, budget=fraction)
    run(monitor, clock, model, 60, seconds)
    start = 4 * SECONDS  # the first measurement is made in any case
    trained = 0.0
    for record in monitor.history[1:]:
        trained = record["epoch"] * seconds
        spent = record["ww/overhead"] * trained
        assert spent <= max(start, fraction * trained, GRANT + fraction * trained / 2) + 1e-6
    assert monitor.budget.overhead <= max(fraction, start / (60 * seconds)) + 1e-9
    assert monitor.budget.spent > 0.5 * min(fraction * 60 * seconds, 60 * start)


def test_layers_take_turns_and_nothing_stale_is_logged_as_new(clock):
    monitor = watch(model := net(5), clock)
    logged = run(monitor, clock, model, 120, 40.0)
    seen = [sorted(tag[-1] for tag in s if tag.startswith("ww_alpha/")) for s in logged]
    assert {len(names) for names in seen} <= {0, 1, 2}
    counts = [sum(name in names for names in seen) for name in "01234"]
    assert max(counts) - min(counts) <= 1
    assert min(counts) > 5
    for scalars in logged:
        assert bool(scalars) == ("ww/alpha_mean" in scalars)
        if scalars:
            assert scalars["ww/num_layers"] == 5.0  # the summaries are of the latest of all
            fresh = [tag for tag in scalars if tag.startswith("ww_alpha/")]
            assert scalars["ww/num_measured"] == len(fresh)
    steps = monitor.timeline.measured
    assert len(set(steps.values())) > 1
    for name, step in steps.items():
        record = next(r for r in reversed(monitor.history) if f"ww_alpha/{name}" in r)
        assert record["step"] == step
        assert record[f"ww_alpha/{name}"] == monitor.report[name].alpha


def test_traps_are_dropped_before_spectra(clock):
    monitor = watch(model := net(5), clock)  # 2 s for all spectra, 4 s with all traps
    logged = run(monitor, clock, model, 40, 320.0)
    later = [s for s in logged[5:] if s]
    assert len(later) == 35
    assert all(s["ww/num_measured"] == 5.0 for s in later)
    counted = [[name for name in "01234" if f"ww_traps/{name}" in s] for s in later]
    assert min(len(names) for names in counted) < 5
    assert all(layer.traps for layer in monitor.report)  # those that are known stay
    assert len(set(monitor.timeline.shuffled.values())) > 1
    assert sum(names.count("4") for names in counted) > 10


def test_a_resumed_run_goes_on_with_its_account(clock):
    first = watch(model := net(), clock)
    run(first, clock, model, 5, 3.0)
    second = watch(model, clock)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.budget.credit == first.budget.credit < 0
    clock.now += 3.0
    assert second.epoch_end() == {}  # the account is overdrawn, also now
    assert [r["epoch"] for r in second.history] == [r["epoch"] for r in first.history]
