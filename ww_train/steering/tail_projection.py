"""`TailProjection`: the tail step of WW_PGD with its defects mended, for comparison.

WW_PGD 0.1.0 is described in a paper and shipped as code, and the two disagree. Here the paper holds
(the numbers are those of `benchmarks/ww_pgd.py`, which re-implements the code as it is):

- the tail is `floor((num_pl_spikes + detX_num) / 2)` eigenvalues; the code takes the power-law tail,
  which its midpoint rule can only shorten (P2);
- the template has trace-log zero on the scale on which the spectrum has mean one; the code keeps the
  trace-log that the tail has, on the scale of the weights, and the ERG gap stays (P3);
- a step of size zero is the identity, in the code it is the whole way (P5);
- eigenvalues outside the tail stay as they are; the code lifts singular values to 1e-8 (P13).

Where both are at fault:

- the Cayley factor `(1 - eta g) / (1 + eta g)` of the log distance g turns round at `|g| = 1 / eta`.
  It is replaced by `exp(-2 eta g)`, which agrees to second order and never turns (P5);
- the trace-log is set after the blend, which otherwise undoes it (P4). It goes as far as the step
  goes, `2 cayley blend strength²`: a tail that still is too flat would have to shrink to reach zero
  at once, below the bulk, and take a fifth to a third of the squared norm with it;
- an eigenvalue of the tail that would sink below the largest of the bulk stays at it (P4). This has
  the last word: the trace-log then ends above what was set;
- one spectrum serves the fit, the tail and the step, also for convolutions (P6); weights of 16 bits,
  tied tensors and broken layers are the business of the base class and of `WWPGD` (P8, P9, P10).

Kept from the code: q is fixed, and hardness multiplies blend and cayley alike. Kept from both: the
norm may change, because only the tail moves. What remains of the method itself: repeated steps settle
at a fitted alpha of 2.0 to 2.2, not at 2 (P12), and while the bulk is left alone the ERG gap need not
close. `ww_train.steering.manifold_projection` reaches both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ww_train.erg import erg_tail
from ww_train.power_law import SMALL_N, fit_power_law
from ww_train.spectrum import Array, Spectrum
from ww_train.steering.projection import Move, SpectralProjection


@dataclass(frozen=True, kw_only=True)
class TailProjection(SpectralProjection):
    """A step of a layer's tail towards a power law with trace-log zero; the bulk stays.

    With defaults a step of strength 1 covers a quarter of the way in `ln lambda`, to first order; with
    `blend=1, cayley=0.5` it arrives. The Frobenius norm is not kept.

    Attributes:
        q: Exponent of the template `A i^-q`, i = 1..k; alpha is about `1 + 1/q` for a long tail.
        blend: Share of the moved singular values in the new ones, 0 to 1.
        cayley: Half the share of the log distance that a step covers before the blend, 0 to 0.5.
        min_tail: A layer with a shorter tail is left alone.
        min_evals: Smaller layers are left alone: their alpha is not reliable.

    Raises:
        ValueError: If a number is outside its range.
    """

    q: float = 1.0
    blend: float = 0.5
    cayley: float = 0.25
    min_tail: int = 5
    min_evals: int = SMALL_N

    def __post_init__(self) -> None:
        if not 0.0 < self.q < math.inf:
            raise ValueError(f"q must be a finite number above 0, got {self.q}; 1 aims at alpha 2")
        if not 0.0 <= self.blend <= 1.0:
            raise ValueError(f"blend must be between 0 and 1, got {self.blend}")
        if not 0.0 <= self.cayley <= 0.5:
            raise ValueError(
                f"cayley must be between 0 and 0.5, got {self.cayley}; 0.5 is the whole way"
            )
        if self.min_tail < 2:
            raise ValueError(f"a tail has at least 2 eigenvalues, got min_tail={self.min_tail}")

    def move(self, spectrum: Spectrum, strength: float) -> Move | str:
        """Where the eigenvalues go, or that the layer has no tail or too short a one."""
        k = midpoint_tail(spectrum)
        if k is None:
            return "no power law fits the tail"
        if k < self.min_tail:
            return f"a tail of {k} eigenvalues, fewer than min_tail={self.min_tail}"
        evals = spectrum.evals[::-1]
        mean = float(evals.mean())
        edge = float(evals[k]) if k < len(evals) else 0.0
        target = np.maximum(mean * np.exp(log_template(k, self.q)), edge)
        off = np.linalg.norm(np.sqrt(target) - np.sqrt(evals[:k]))
        moved = evals.copy()
        if strength > 0.0:
            moved[:k] = np.maximum(mean * self._step(evals[:k] / mean, strength), edge)
        return Move(moved, float(off) / math.sqrt(spectrum.norm), k)

    def _step(self, tail: Array, strength: float) -> Array:
        """The tail after Cayley step, blend and retraction; mean-one scale, descending."""
        blend, rate = self.blend * strength, 2.0 * self.cayley * strength
        logs = np.log(tail)
        stepped = logs + rate * (log_template(len(tail), self.q) - logs)
        blended = (1.0 - blend) * np.exp(logs / 2.0) + blend * np.exp(stepped / 2.0)
        new = 2.0 * np.log(blended)
        trace_log = (1.0 - blend * rate) * logs.mean()
        retracted: Array = np.exp(new + trace_log - new.mean())
        return retracted


def midpoint_tail(spectrum: Spectrum) -> int | None:
    """`floor((num_pl_spikes + detX_num) / 2)`: halfway between the power-law and the ERG tail.

    None if one of the two does not exist. Never reaches eigenvalues that are zero.
    """
    fit = fit_power_law(spectrum.positive)
    detX_num = erg_tail(spectrum).detX_num
    if fit is None or detX_num is None:
        return None
    return (fit.num_pl_spikes + detX_num) // 2


def log_template(k: int, q: float) -> Array:
    """`ln(A i^-q)`, i = 1..k, with the A for which they sum to zero."""
    logs = -q * np.log(np.arange(1.0, k + 1.0))
    template: Array = logs - logs.mean()
    return template
