import io
from dataclasses import replace

import torch
from torch import nn

from ww_train import Report, measure
from ww_train.callbacks.summary import ROWS, Summary
from ww_train.power_law import PowerLawFit

from .oracles import dense, heavy


def layer(name, alpha, layer_id=0):
    (measured,) = measure(nn.ModuleDict({name: dense(torch.from_numpy(heavy(40, 30)))}))
    fit = PowerLawFit(alpha, 1.0, 9.0, 0.01, 0.1, 100)
    return replace(measured, fit=fit, layer_id=layer_id)


def summary(*layers, measured=None, first=None, overhead=0.0123):
    steps = {x.name: 60 for x in layers} if measured is None else measured
    start = {x.name: 5.0 for x in layers} if first is None else first
    return Summary(Report(layers, ()), start, steps, 60, 1.25, overhead)


def test_a_table_of_what_a_person_wants_to_know():
    text = summary(layer("fc1", 3.25), layer("head", 1.5)).text()
    header, _, worst, best, *below = text.splitlines()
    assert header.split("  ")[0].strip() == "layer"
    assert worst.split()[:3] == ["head", "5.00", "1.50"]
    assert worst.split()[-1] == "over-trained"
    assert best.split()[:3] == ["fc1", "5.00", "3.25"]
    assert best.split()[-1] == "well-trained"
    assert below == [
        "the model: 1 of 2 layers over-trained; 1 well-trained",
        "watching took 1.2 s, 1.2 % of training time",
    ]


def test_a_short_run_may_spend_what_it_has_not_earned():
    brief = replace(summary(layer("fc1", 3.25)), seconds=0.4, overhead=1.912)
    told = "watching took 0.4 s, 191.2 % of training time (1 s is granted to short runs)"
    assert brief.footer()[-1] == told
    for other in (replace(brief, seconds=4.0), replace(brief, overhead=0.009)):
        assert "granted" not in other.footer()[-1]
    assert "granted" not in replace(brief, overhead=None).footer()[-1]


def test_the_background_is_told_apart():
    told = replace(summary(layer("fc1", 3.25)), beside=12.34).footer()
    assert told[-1] == "watching took 1.2 s, 1.2 % of training time; 12.3 s in the background"


def test_the_worst_come_first_and_the_rest_is_counted():
    layers = [layer(f"l{i}", 3.0, i) for i in range(300)]
    layers[170] = layer("bad", 1.2, 170)
    lines = summary(*layers).text().splitlines()
    assert lines[2].startswith("bad")
    assert len(lines) == 2 + ROWS + 3
    assert lines[2 + ROWS] == "and 280 more"
    assert len({len(line) for line in lines[: 2 + ROWS]}) == 1


def test_stale_numbers_are_marked():
    a, b = layer("a", 3.0), layer("b", 4.0)
    text = summary(a, b, measured={"a": 60, "b": 20}).text()
    assert "4.00*" in text
    assert "3.00*" not in text
    assert "* measured before the last step, 60" in text
    assert "*" not in summary(a, b).text()


def test_what_is_not_known_is_a_dash():
    unfit = replace(layer("a", 3.0), fit=None)
    row = summary(unfit, first={}).text().splitlines()[2].split()
    assert row[:3] == ["a", "-", "-"]
    assert row[-2:] == ["-", "malformed"]
    assert "%" not in summary(unfit, overhead=None).text()


def test_a_report_of_nothing():
    assert "no layer was measured" in summary().text()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_drawn_table_with_the_same_cells():
    plain, drawn = io.StringIO(), Terminal()
    table = summary(layer("block[0]", 1.2))  # no markup of rich's
    table.show(plain)
    table.show(drawn)
    assert plain.getvalue() == table.text() + "\n"
    for text in ("block[0]", "1.20", "over-trained", "watching took 1.2 s"):
        assert text in drawn.getvalue()
    assert drawn.getvalue() != plain.getvalue()
