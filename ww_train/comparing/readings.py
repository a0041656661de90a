"""What a change of a model's mean metrics means, by the claims of the theory.

Martin, Peng and Mahoney, Nature Communications 12 (2021) 4122 (norms, alpha and alpha-hat); Martin
and Mahoney, JMLR 22 (2021) 165 (ranks); Martin and Hinrichs, SETOL (2025) (ERG gap and traps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ww_train.columns import Row
from ww_train.power_law import OVER_TRAINED, UNDER_TRAINED

Verdict: TypeAlias = Literal["better", "worse", "no claim"]

ROUNDING = 1e-9
"""Relative change up to which two means are the same."""


@dataclass(frozen=True)
class Reading:
    """A metric that changed from a base model to a fine-tuned one.

    Attributes:
        metric: Name of the metric, as in `Comparison.metrics_summary`.
        before: Mean over the layers of the base model.
        after: Mean over the same layers of the fine-tuned model.
        verdict: Whether the theory calls this better or worse, or says nothing.
        sentence: The change in words.
    """

    metric: str
    before: float
    after: float
    verdict: Verdict
    sentence: str

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Metric:
    """A number of a layer whose mean over the layers describes a model.

    Attributes:
        name: Its name in summaries.
        of: The number, from a layer's row.
        rose: What it means that the number rose.
        fell: What it means that it fell.
        badness: Ranks values, the smaller the better; None if the theory makes no claim.
        caution: When the claim holds.
    """

    name: str
    of: Callable[[Row], float | None]
    rose: str
    fell: str
    badness: Callable[[float], float] | None = None
    caution: str = ""

    def read(self, before: float, after: float, doubt: str = "") -> Reading | None:
        """The change from one mean to the other; None if it is rounding.

        Args:
            before: Mean of the base model.
            after: Mean of the fine-tuned model.
            doubt: Why the theory's claim does not hold of these two models, if it does not.
        """
        if math.isclose(before, after, rel_tol=ROUNDING, abs_tol=ROUNDING):
            return None
        moved, meaning = ("rose", self.rose) if after > before else ("fell", self.fell)
        verdict: Verdict = "no claim"
        if self.badness is not None and not doubt:
            verdict = "better" if self.badness(after) < self.badness(before) else "worse"
        judged = {
            "better": "an improvement, by the theory",
            "worse": "a deterioration, by the theory",
            "no claim": "the theory does not call this better or worse",
        }[verdict]
        caution = f" ({doubt or self.caution})" if doubt or self.caution else ""
        first, last = _apart(before, after)
        sentence = f"{self.name} {moved} from {first} to {last}: {meaning}; {judged}{caution}."
        return Reading(self.name, before, after, verdict, sentence)


def read_changes(
    before: Mapping[str, float], after: Mapping[str, float], doubts: Mapping[str, str] | None = None
) -> tuple[Reading, ...]:
    """Read every metric that changed between two summaries, in the order of `METRICS`.

    Args:
        before: Means by metric of the base model.
        after: Means by metric of the fine-tuned model, over the same layers.
        doubts: By metric, why its claim does not hold of these models.
    """
    doubts = doubts or {}
    found = (
        metric.read(before[metric.name], after[metric.name], doubts.get(metric.name, ""))
        for metric in METRICS
        if metric.name in before and metric.name in after
    )
    return tuple(reading for reading in found if reading is not None)


def _apart(before: float, after: float) -> tuple[str, str]:
    """Two numbers with four digits, or as many as it takes to tell them apart."""
    texts = [(f"{before:.{digits}g}", f"{after:.{digits}g}") for digits in range(4, 18)]
    return next((pair for pair in texts if pair[0] != pair[1]), texts[-1])


def _column(name: str, *, absolute: bool = False) -> Callable[[Row], float | None]:
    def of(row: Row) -> float | None:
        value = row.get(name)
        if value is None or isinstance(value, str):
            return None
        return abs(float(value)) if absolute else float(value)

    return of


def _alpha_badness(alpha: float) -> float:
    """Distance above 2; what is below 2 counts as worse than any alpha of the safe range."""
    if alpha >= OVER_TRAINED:
        return alpha - OVER_TRAINED
    return UNDER_TRAINED - OVER_TRAINED + (OVER_TRAINED - alpha)


def _less(value: float) -> float:
    return value


ONE_SERIES = "between models of one architecture"
"""Condition of the claims about norms."""

METRICS = (
    Metric("log_norm", _column("log_norm"), "the weights grew", "the weights shrank", _less,
           f"{ONE_SERIES} that are both well trained"),
    Metric("alpha", _column("alpha"), "the tails of the spectra became lighter",
           "the tails of the spectra became heavier", _alpha_badness,
           "best just above 2; below 2 a layer is over-trained"),
    Metric("alpha_weighted", _column("alpha_weighted"),
           "alpha times the log of the largest eigenvalue grew",
           "alpha times the log of the largest eigenvalue shrank", _less, ONE_SERIES),
    Metric("log_alpha_norm", _column("log_alpha_norm"),
           "the norms of the spectra that alpha weights grew",
           "the norms of the spectra that alpha weights shrank", _less, ONE_SERIES),
    Metric("log_spectral_norm", _column("log_spectral_norm"), "the largest eigenvalues grew",
           "the largest eigenvalues shrank", _less, f"{ONE_SERIES} that are both well trained"),
    Metric("stable_rank", _column("stable_rank"), "the weights are spread over more directions",
           "the weights are concentrated in fewer directions"),
    Metric("entropy", _column("entropy"), "the spectra are more even",
           "the spectra are more concentrated"),
    Metric("D", _column("D"), "the tails are less like power laws, and alpha says less",
           "the tails are more like power laws, and alpha says more"),
    Metric("abs_ERG_gap", _column("ERG_gap", absolute=True),
           "the power-law tail and the ERG tail moved apart",
           "the power-law tail and the ERG tail moved together", _less),
    Metric("mp_softrank", _column("mp_softrank"), "the spectra are closer to random ones",
           "the spectra reach farther out of the random bulk", _less),
    Metric("rand_distance", _column("rand_distance"),
           "the spectra are farther from those of the shuffled weights",
           "the spectra are closer to those of the shuffled weights"),
    Metric("num_traps", _column("num_traps"),
           "more eigenvalues come from single large weights or means",
           "fewer eigenvalues come from single large weights or means", _less),
)  # fmt: skip
"""The metrics of a comparison. `abs_ERG_gap` is the absolute gap: signs of layers would cancel."""

OF_ALPHA = ("alpha", "alpha_weighted", "log_alpha_norm")
"""Metrics that say nothing where alpha says nothing."""
