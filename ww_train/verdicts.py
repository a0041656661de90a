"""What the numbers of a layer mean in a word, and what to do about it.

The bounds are those of the field: alpha below 2 is over-fitted, near 2 ideal, 2 to 6 fine, above 6
hardly more than noise (Martin, Peng and Mahoney, Nature Communications 12 (2021) 4122); a correlation
trap is a sign of a learning rate that is too high (Martin and Hinrichs, SETOL, 2025). Of a layer whose
spectrum is that of a random matrix alpha says nothing: the tail of noise reads as anything above 2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

from ww_train.power_law import KS_MEDIAN, OVER_TRAINED, UNDER_TRAINED, PowerLawFit
from ww_train.trap_causes import TrapCause

Verdict: TypeAlias = Literal[
    "trapped",
    "over-trained",
    "random-like",
    "under-trained",
    "malformed",
    "well-trained",
    "critical",
]

WORST_FIRST: tuple[Verdict, ...] = (
    "trapped",
    "over-trained",
    "random-like",
    "under-trained",
    "malformed",
    "well-trained",
    "critical",
)
"""The order in which a person wants to hear of layers."""

FINE: tuple[Verdict, ...] = ("well-trained", "critical")
"""Verdicts that ask for nothing."""

CRITICAL_WIDTH = 0.1
"""Half-width of "critical" around alpha = 2: the standard error of alpha with 100 eigenvalues."""

MALFORMED = 0.1, 0.2
"""The Kolmogorov-Smirnov distance from which on a tail is none, of a long and of a short one.

A Marchenko-Pastur bulk that is taken for a tail is 0.12 to 0.16 away, as few trained layers are; see
`malformed_from`.
"""

NAMED_CAUSES = 3
"""How many causes of traps an advice names."""


def malformed_from(num_pl_spikes: int) -> float:
    """Distance above which a tail of so many eigenvalues is no power law, and alpha says nothing.

    Of samples from a power law one in a hundred comes out farther than `KS_MEDIAN / sqrt(n)` from
    its fit; kept within `MALFORMED`, because no trained spectrum is a power law that exactly, and a
    tail of a dozen is too short to tell.
    """
    low, high = MALFORMED
    return min(high, max(low, KS_MEDIAN / math.sqrt(max(num_pl_spikes, 1))))


def alpha_verdict(fit: PowerLawFit | None) -> Verdict:
    """What the tail alone says: malformed if there is no power law, else by alpha."""
    if fit is None or malformed_from(fit.num_pl_spikes) < fit.D:
        return "malformed"
    if abs(fit.alpha - OVER_TRAINED) <= CRITICAL_WIDTH:
        return "critical"
    if fit.alpha < OVER_TRAINED:
        return "over-trained"
    return "under-trained" if fit.alpha > UNDER_TRAINED else "well-trained"


def layer_verdict(
    fit: PowerLawFit | None, num_traps: int | None = None, *, random_like: bool = False
) -> Verdict:
    """One word for a layer: "trapped" if it has traps, "random-like", else what its tail says.

    A layer can be both trapped and, say, over-trained. Traps come first because they are entries that
    can be named, and because they bend the tail from which alpha is read: a layer with one giant
    entry is malformed as well. `layer_advice` speaks of both.

    Args:
        fit: Power law of the tail; None if there is none.
        num_traps: Number of correlation traps, if they were counted.
        random_like: Whether the spectrum is that of a random matrix; see `ww_train.randomness`.
    """
    return "trapped" if num_traps else _untrapped(fit, random_like)


def layer_advice(
    name: str,
    fit: PowerLawFit | None,
    num_traps: int | None = None,
    causes: Sequence[TrapCause] = (),
    *,
    random_like: bool = False,
) -> str:
    """What is wrong with a layer, if anything, and what to do, as one line that names it."""
    parts = [_about_traps(num_traps, causes)] if num_traps else []
    told = _untrapped(fit, random_like)
    # with traps the tail's own verdict is worth a word only if there is something to do
    if not parts or told in ("over-trained", "random-like", "under-trained"):
        parts.append(_about_alpha(told, fit))
    return f"layer {name}: " + "; ".join(parts)


def model_verdict(verdicts: Sequence[str]) -> str:
    """The verdicts of all layers in one line: the commonest, then the others, the worst first."""
    if not verdicts:
        return "no layer was measured"
    counts = Counter(verdicts)
    rank: dict[str, int] = {word: i for i, word in enumerate(WORST_FIRST)}
    order = sorted(counts, key=lambda word: rank.get(word, len(rank)))
    most = max(order, key=lambda word: counts[word])
    if len(counts) == 1:
        return f"{most} ({_layers(len(verdicts))})"
    others = ", ".join(f"{counts[word]} {word}" for word in order if word != most)
    share = f"{counts[most]} of {_layers(len(verdicts))}"
    if 2 * counts[most] > len(verdicts):
        return f"mostly {most} ({share}); {others}"
    return f"{share} {most}; {others}"


def _untrapped(fit: PowerLawFit | None, random_like: bool) -> Verdict:
    return "random-like" if random_like else alpha_verdict(fit)


def _layers(number: int) -> str:
    return "1 layer" if number == 1 else f"{number} layers"


def _about_traps(number: int, causes: Sequence[TrapCause]) -> str:
    traps = "1 correlation trap" if number == 1 else f"{number} correlation traps"
    if not causes:
        return f"{traps} that no single weight makes: watch whether it lasts"
    named = ", ".join(str(cause) for cause in causes[:NAMED_CAUSES])
    more = f" and {len(causes) - NAMED_CAUSES} more" if len(causes) > NAMED_CAUSES else ""
    if all(cause.kind == "mean" for cause in causes):
        todo = "its weights lean to one side, as is common under ReLU: watch whether that grows"
    else:
        todo = "lower its learning rate or clip gradients, look at these weights"
    return f"{traps} ({named}{more}): {todo}"


def _about_alpha(verdict: Verdict, fit: PowerLawFit | None) -> str:
    if verdict == "random-like":
        meaningless = f", and alpha {fit.alpha:.2f} says nothing" if fit else ""
        return (
            "random-like: it cannot be told from a random matrix, untrained, or what it learned does "
            f"not show in its spectrum{meaningless}: if it was trained, see whether gradients reach it"
        )
    if fit is None:
        return "no power law in its spectrum, so that alpha says nothing"
    alpha = f"alpha {fit.alpha:.2f}"
    if verdict == "malformed":
        return f"its tail is no power law (D {fit.D:.2f}), so that {alpha} says nothing"
    if verdict == "over-trained":
        return (
            f"{alpha} is below 2, over-fitted: lower its learning rate, raise its weight decay or "
            "dropout, or stop earlier"
        )
    if verdict == "critical":
        return f"{alpha} is critical, where it should be: leave it as it is"
    if verdict == "under-trained":
        return (
            f"{alpha} is above 6, hardly more than noise: train it longer, raise its learning rate, "
            "or make it smaller"
        )
    return f"{alpha} is between 2 and 6, fine: more training may bring it nearer to 2"
