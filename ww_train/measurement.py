"""What is measured of a layer, from its eigenvalues to its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ww_train.batching import Shortage, warn_once
from ww_train.confidence import confidence
from ww_train.decomposition import decompose, work
from ww_train.divergence import jensen_shannon_distance
from ww_train.erg import erg_tail
from ww_train.linalg import Eigensolver
from ww_train.localization import vector_metrics
from ww_train.marchenko_pastur import BulkFit
from ww_train.planning import Plan
from ww_train.power_law import TailFit
from ww_train.report import LayerReport
from ww_train.spectrum import Spectrum
from ww_train.trap_causes import TrapCause, trap_causes
from ww_train.traps import average_traps, count_traps
from ww_train.weights.matrices import NOT_FINITE, Skipped, WeightMatrix, slices

FIT = 2e7
"""Cost of the fits of one layer, in operations of a decomposition; about a millisecond."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is measured, the same for every layer; the arguments are those of `ww_train.measure`."""

    fit: TailFit
    mp_fit: BulkFit | None
    randomize: int
    vectors: bool
    replicates: int
    seed: int
    inverse: bool
    eigensolver: Eigensolver
    known: Mapping[str, Spectrum]
    progress: bool

    def costs(self, plans: Sequence[Plan]) -> list[float]:
        """Operations that each layer takes, roughly."""
        return [
            FIT + self._decompositions(p) * work(p.matrix.N, p.matrix.M, p.matrix.rf) for p in plans
        ]

    def _decompositions(self, plan: Plan) -> int:
        own = plan.matrix.name not in self.known
        return self.randomize + own + 4 * self.vectors  # vectors cost about four times the values

    def take(self, plans: Sequence[Plan]) -> list[LayerReport | Skipped]:
        """The report of each layer, or why there is none."""
        shuffles = range(self.seed, self.seed + self.randomize)
        jobs = [plan.job(shuffles, own=plan.matrix.name not in self.known) for plan in plans]
        outcomes: dict[int, LayerReport | Skipped] = {}
        bar = tqdm(total=len(jobs), unit="layer", delay=1, disable=not self.progress or None)
        short = warn_once()
        with bar, torch.no_grad(), closing(decompose(jobs, self.eigensolver, short)) as solved:
            for position, evals in solved:
                plan = plans[position]
                bar.set_postfix_str(plan.matrix.name, refresh=False)
                bar.update()
                outcomes[position] = self._finished(plan, evals, short)
        return [outcomes[position] for position in range(len(plans))]

    def _finished(
        self, plan: Plan, evals: Sequence[Tensor], short: Shortage
    ) -> LayerReport | Skipped:
        """The report; where the device's memory does not suffice, what it takes is on the host."""
        try:
            return self._report(plan, evals)
        except torch.OutOfMemoryError:
            short(plan.matrix.device)
        plan.retreat()
        return self._report(plan, evals)

    def _report(self, plan: Plan, evals: Sequence[Tensor]) -> LayerReport | Skipped:
        """The report from the layer's eigenvalues, unless they are known, and of its shuffles."""
        own = self.known.get(plan.matrix.name)
        reason = plan.failure
        if reason is None and own is None:
            reason = _malformed(evals[0], plan.base)
        if reason is not None:
            return Skipped(plan.matrix.name, reason)
        if own is None:
            own, evals = plan.spectrum(evals[0]), evals[1:]
        own = own.inverse() if self.inverse else own
        report = _fitted(plan, own, self.fit)
        if self.mp_fit:
            with suppress(ValueError):  # no bulk to be found: no columns, as for any failed fit
                report = replace(report, mp=self.mp_fit(own))
        if evals:
            report = _randomized(plan, report, evals, self.seed)
        if self.vectors:
            xmin = report.fit.xmin if report.fit else math.inf
            report = replace(report, localization=vector_metrics(plan.weights(), xmin))
        if self.replicates and report.fit:
            sure = confidence(own.positive, self.fit, replicates=self.replicates, seed=self.seed)
            report = replace(report, confidence=sure)
        return report


def _fitted(plan: Plan, own: Spectrum, fit: TailFit) -> LayerReport:
    """The layer's report with what every layer has: the tails of the power law and of the ERG."""
    tail = fit(own.positive)
    if tail and (tail.alpha - 1.0) * own.resolution > 1.0:
        tail = None  # all of the tail is one eigenvalue, spread by rounding
    m = plan.matrix
    erg = erg_tail(own, tail)
    return LayerReport(plan.layer_id, m.name, m.layer_type, own, tail, erg, slice_id=m.slice_id)


def _randomized(
    plan: Plan, report: LayerReport, shuffles: Sequence[Tensor], seed: int
) -> LayerReport:
    """The report with what the layer's shuffles tell."""
    first = plan.spectrum(shuffles[0])
    return replace(
        report,
        **_traps(plan, shuffles, seed),
        shuffled=first,
        rand_distance=jensen_shannon_distance(report.spectrum.evals, first.evals),
    )


def _traps(plan: Plan, shuffles: Sequence[Tensor], seed: int) -> dict[str, Any]:
    """Traps of each shuffle, and for the first one their causes, slice by slice."""
    traps = [
        count_traps(plan.spectrum(evals), seed + i, [plan.spectrum(part[None]) for part in evals])
        for i, evals in enumerate(shuffles)
    ]
    causes: list[TrapCause] = []
    if traps[0].num_traps:
        for i, part in enumerate(slices(plan.weights())):
            causes += [replace(cause, slice_id=i) for cause in trap_causes(part)]
    return {
        "traps": traps[0],
        "trap_average": average_traps(traps) if len(traps) > 1 else None,
        "trap_causes": tuple(sorted(causes, key=lambda cause: -cause.theta)),
    }


def _malformed(evals: Tensor, base: WeightMatrix | None) -> str | None:
    top = float(evals.max())  # NaN if there is one
    if math.isnan(top) or (math.isfinite(top) and math.isinf(float(evals.sum()))):
        return NOT_FINITE
    if math.isinf(top):
        return "the eigenvalue solver failed"
    if top > 0.0:
        return None
    if base is not None:
        return "identical to the base model"
    return "all weights are zero, or so small that their squares are"
