"""What is known of each layer in the course of training: first, latest, and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ww_train import LayerReport, Report
from ww_train.power_law import OVER_TRAINED

_TRAPS = ("traps", "trap_average", "trap_causes", "shuffled", "rand_distance")
"""What a measurement without shuffles leaves as it was."""


@dataclass(frozen=True, eq=False)
class Change:
    """A layer whose verdict is another than at its last measurement.

    Attributes:
        layer: The layer now.
        previous: Its verdict before.
    """

    layer: LayerReport
    previous: str


class Timeline:
    """The latest numbers of every layer, which need not have been measured together.

    Attributes:
        report: The latest numbers of every layer that can be measured; None before the first.
        first: Alpha of each layer when it was first measured.
        measured: Step at which each layer was last measured.
        shuffled: Step at which its traps were last counted.
        verdicts: Its latest verdict.
    """

    def __init__(self) -> None:
        self.report: Report | None = None
        self.first: dict[str, float | None] = {}
        self.measured: dict[str, int] = {}
        self.shuffled: dict[str, int] = {}
        self.verdicts: dict[str, str] = {}
        self._alarms: dict[str, list[str]] = {}  # at the first measurement, and at the last one

    @property
    def changes(self) -> dict[str, float]:
        """Alpha of each layer now minus alpha when it was first measured."""
        now = {layer.name: layer.alpha for layer in self.report or ()}
        first = self.first
        return {
            name: alpha - start
            for name, alpha in now.items()
            if alpha is not None and (start := first.get(name)) is not None
        }

    def update(self, fresh: Report, step: int) -> list[Change]:
        """Take over what was measured at a step; tells which verdicts changed."""
        known = {layer.name: layer for layer in self.report or ()}
        latest = {layer.name: _with_traps_of(known.get(layer.name), layer) for layer in fresh}
        gone = {layer.name for layer in fresh.skipped}
        layers = {**{n: x for n, x in known.items() if n not in gone}, **latest}
        skipped = {x.name: x for x in (self.report.skipped if self.report else ())}
        skipped = {n: x for n, x in skipped.items() if n not in latest}
        skipped |= {x.name: x for x in fresh.skipped}
        order = sorted(layers.values(), key=lambda layer: layer.layer_id)
        self.report = Report(tuple(order), tuple(skipped.values()))
        for layer in fresh:
            self.measured[layer.name] = step
            if layer.traps:
                self.shuffled[layer.name] = step
            self.first.setdefault(layer.name, layer.alpha)
        for lost in fresh.skipped:  # looked at, too
            self.measured[lost.name] = self.shuffled[lost.name] = step
        before = dict(self.verdicts)
        self.verdicts.update({name: layer.verdict for name, layer in latest.items()})
        return [
            Change(layer, before[name])
            for name, layer in latest.items()
            if before.get(name, layer.verdict) != layer.verdict
        ]

    def alarms(self, fresh: Report) -> list[LayerReport]:
        """The layers of a new report that became over-trained or trapped, for certain.

        Certain is what is so at two measurements in a row, was not at the first one, and is not
        chance: see `alarm`. Call it once after each `update`.
        """
        certain = []
        for name in (layer.name for layer in fresh):
            assert self.report is not None
            layer = self.report[name]
            now = alarm(layer)
            first, last = self._alarms.get(name, [now, now])
            if now and now == last and now != first:
                certain.append(layer)
            self._alarms[name] = [first, now]
        return certain

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON for a checkpoint; the spectra are measured anew."""
        return {
            "first": dict(self.first),
            "measured": dict(self.measured),
            "shuffled": dict(self.shuffled),
            "verdicts": dict(self.verdicts),
            "alarms": {name: list(pair) for name, pair in self._alarms.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue that of a checkpoint."""
        self.first = dict(state["first"])
        self.measured, self.shuffled = dict(state["measured"]), dict(state["shuffled"])
        self.verdicts = dict(state["verdicts"])
        self._alarms = {name: list(pair) for name, pair in state["alarms"].items()}


def alarm(layer: LayerReport) -> Literal["trapped", "over-trained", ""]:
    """What of a layer calls for action beyond chance, or "".

    Traps must have an entry as their cause: one shuffle in a hundred shows one without any, and a
    mean that is not quite zero belongs to ordinary training. Alpha must be below 2 by three of its
    standard errors, which ignore the choice of xmin: that of a small layer scatters.
    """
    if layer.num_traps and any(cause.kind == "entry" for cause in layer.trap_causes):
        return "trapped"
    fit = layer.fit
    if fit and layer.verdict == "over-trained" and fit.alpha + 3.0 * fit.sigma < OVER_TRAINED:
        return "over-trained"
    return ""


def _with_traps_of(known: LayerReport | None, fresh: LayerReport) -> LayerReport:
    """A layer that was measured without its traps, with those that are known of it."""
    if known is None or fresh.traps is not None:
        return fresh
    return replace(fresh, **{name: getattr(known, name) for name in _TRAPS})
