"""Alpha at every step: between decompositions from the last eigenvectors, with a bar for its error.

The eigenvalues are the Rayleigh quotients in the old eigenvectors; those of the tail are corrected for
what they miss to second order (`ww_train.rayleigh`). The root mean square of that correction, relative
to the eigenvalues, says how old the eigenvectors are. What remains wrong is taken to be at most
`MARGIN` times as large, and `ww_train.sensitivity` says how far that can move alpha.

The mean says little of a jump: one large entry, the cause of a correlation trap, adds one eigenvalue
and hardly moves the others. It does need large corrections of a few; where the largest exceeds
`LARGEST_CORRECTION` the second order does not hold and the bar is infinite. `benchmarks/tracking.py`
measures both limits, in training and after jumps.

Eigenvalues below the tail are not corrected, and the bar does not cover them: entropy, ranks and the
like need a decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ww_train.analysis import measure
from ww_train.linalg import has_float64
from ww_train.planning import MAX_EVALS, selected
from ww_train.power_law import PowerLawFit, fit_power_law
from ww_train.rayleigh import Basis, eigenbasis, in_basis, rayleigh_quotients, repulsion
from ww_train.selection import Layers
from ww_train.sensitivity import alpha_error
from ww_train.spectrum import Array
from ww_train.weights.matrices import Skipped, Source, WeightMatrix

ROUNDING = 1e-6
"""Relative error of the eigenvalues in a new basis: float32 vectors and products."""

MARGIN = 3.0
"""Relative errors that the bar allows for, in units of the corrections' root mean square."""

LARGEST_CORRECTION = 0.02
"""Largest correction, relative to its eigenvalue or xmin, after which the old basis says anything."""

SMALLEST = 256
"""Smaller dimension from which tracking is cheaper than a decomposition."""

WORTHWHILE = 2
"""Reads that a basis must serve after its own to have been cheaper than decompositions."""

LONGEST_PAUSE = 16
"""Reads after which a basis is tried again on a layer for which none has been worthwhile."""


@dataclass(frozen=True)
class TrackedLayer:
    """Alpha of one layer at one moment.

    Attributes:
        name: Dotted path of the layer.
        fit: Power law of the tail; None if there is none.
        error: Half the width of the bar around alpha; 0 after a decomposition in full, None without
            a fit, infinite where the eigenvectors are too old for a bar.
        refreshed: Whether the layer was decomposed now, in full or for new eigenvectors.
    """

    name: str
    fit: PowerLawFit | None
    error: float | None
    refreshed: bool

    @property
    def alpha(self) -> float | None:
        """Power-law exponent of the tail."""
        return self.fit.alpha if self.fit else None


@dataclass(frozen=True, eq=False)
class Tracking:
    """The layers of a model as tracked at one moment, in model order.

    Attributes:
        layers: The layers that have a spectrum.
        skipped: The matrices that have none, with reasons, as in `Report`.
    """

    layers: tuple[TrackedLayer, ...]
    skipped: tuple[Skipped, ...]

    @cached_property
    def _by_name(self) -> dict[str, TrackedLayer]:
        return {layer.name: layer for layer in self.layers}

    def __getitem__(self, name: str) -> TrackedLayer:
        if name not in self._by_name:
            raise KeyError(f"no layer {name!r} was tracked; tracked: {', '.join(self._by_name)}")
        return self._by_name[name]

    def __iter__(self) -> Iterator[TrackedLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def scalars(self) -> dict[str, float]:
        """Tags and numbers for any logger: `ww_alpha/<layer>` and `ww_alpha_error/<layer>`."""
        tags: dict[str, float] = {}
        for layer in self.layers:
            if layer.fit and layer.error is not None:
                tags[f"ww_alpha/{layer.name}"] = layer.fit.alpha
                tags[f"ww_alpha_error/{layer.name}"] = layer.error
        return tags


def tracked(matrix: WeightMatrix, basis: Basis) -> TrackedLayer | None:
    """Alpha of a layer from an earlier basis; None if there is no spectrum or fit in it.

    Cost: one product W V, `2 N M²` operations, and `2 N M k` for a tail of k, in the precision of the
    basis; memory for the product; three synchronisations.
    """
    product = in_basis(matrix.stack, basis)
    levels = rayleigh_quotients(product)
    quotients = levels.cpu().numpy()
    if not np.isfinite(quotients).all():
        return None
    rough = fit_power_law(matrix.spectrum(quotients).positive)
    if rough is None:
        return None
    missing = _missing(product, levels, _rows(rough.num_pl_spikes, quotients.size))
    unit = (matrix.scale / basis.scale) ** 2
    evals = np.maximum(quotients + missing, 0.0)
    spectrum = matrix.spectrum(evals * unit)
    fit = fit_power_law(spectrum.positive)
    if fit is None:
        return None
    shift = _shift(missing, evals, fit.num_pl_spikes)
    error = alpha_error(spectrum.positive, fit, shift) if shift < math.inf else math.inf
    return TrackedLayer(matrix.name, fit, error, False)


def _missing(product: Tensor, levels: Tensor, rows: int) -> Array:
    """Corrections `(rf, M)` of the largest quotients of a layer; 0 for the others."""
    quotients = levels.cpu().numpy()
    lowest = np.sort(quotients, axis=None)[-rows]
    missing = np.zeros_like(quotients)
    for i, own in enumerate(quotients):
        chosen = np.flatnonzero(own >= lowest)
        positions = torch.from_numpy(chosen).to(product.device)
        missing[i, chosen] = repulsion(product[i], levels[i], positions).cpu().numpy()
    return missing


def _shift(missing: Array, evals: Array, tail: int) -> float:
    """Relative error of the eigenvalues to allow for; infinity where corrections are too large.

    Those just below the tail count too: an eigenvalue that enters the tail does so past them.
    """
    lowest = np.sort(evals, axis=None)[-tail]
    relative = np.abs(missing) / np.maximum(evals, lowest)
    if relative.max() > LARGEST_CORRECTION:
        return math.inf
    return ROUNDING + MARGIN * float(np.sqrt(np.square(relative[evals >= lowest]).mean()))


def _rows(tail: int, number: int) -> int:
    """How many of the largest eigenvalues are corrected: the tail and some below it."""
    return min(tail + tail // 4 + 16, number)


class AlphaTracker:
    """Follows alpha of every layer through training at a fraction of the cost of `measure`.

    A read takes one product a layer, as long as the bar for alpha's error is within the tolerance.
    When it is not, the eigenvectors are computed anew; where they would not last for two more reads
    (young layers with a large learning rate), where the layer is small or not in memory, it is
    decomposed in full, as by `measure`. Changes no weights, uses no global generator.

    Args:
        model: As in `measure`; usually a module.
        layers: Which layers, as in `measure`.
        tolerance: Largest bar for alpha's error that is read from an old basis, absolute.

    Raises:
        ValueError: If a layer that was asked for does not exist, or the tolerance is not positive.

    Memory: a float32 M x M matrix for each tracked slice of the smaller dimension M, and during a read
    the product of one layer with it. Sharded weights are gathered and decomposed in full; every process
    of their mesh must read.
    """

    def __init__(self, model: Source, *, layers: Layers = None, tolerance: float = 0.02) -> None:
        if not 0.0 < tolerance < math.inf:
            raise ValueError(f"tolerance is a positive error of alpha, got {tolerance}")
        self._model = model
        self._layers = layers
        self._tolerance = tolerance
        self._tracks: dict[str, _Track] = {}
        list(selected(model, layers, ()))  # wrong names fail here and not in the middle of training

    @torch.no_grad()
    def read(self) -> Tracking:
        """Alpha of every layer now.

        Cost: for a layer of N x M with a tail of k, within the tolerance, `2 N M (M + k)` float32
        operations (float64 on an accelerator). A decomposition takes `N M² + (4/3) M³` in float64, most
        of them slow: 3 to 5 times as long on one core. Up to twice a decomposition where new
        eigenvectors are due. `benchmarks/tracking.py` measures. Under `torch.autocast` it reads the
        same as without.
        """
        with _uncast():
            return self._read()

    def _read(self) -> Tracking:
        found = [matrix for _, matrix in selected(self._model, self._layers, ())]
        names = [matrix.name for matrix in found]
        self._tracks = {name: self._tracks.get(name) or _Track() for name in names}
        layers: dict[str, TrackedLayer] = {}
        for matrix in found:
            if isinstance(matrix, WeightMatrix) and _trackable(matrix):
                layer = self._tracks[matrix.name].read(matrix, self._tolerance)
                if layer is not None:
                    layers[matrix.name] = layer
        report = measure([matrix for matrix in found if matrix.name not in layers])
        for full in report:
            error = 0.0 if full.fit else None
            layers[full.name] = TrackedLayer(full.name, full.fit, error, refreshed=True)
        return Tracking(tuple(layers[name] for name in names if name in layers), report.skipped)


@contextmanager
def _uncast() -> Iterator[None]:
    """No automatic casting, which would round the products, on the CPU and the accelerator."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", enabled=False))
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            stack.enter_context(torch.autocast(accelerator.type, enabled=False))
        yield


def _trackable(matrix: WeightMatrix) -> bool:
    if matrix.deferred or matrix.M < SMALLEST or matrix.num_evals > MAX_EVALS:
        return False
    return has_float64(matrix.device)


class _Track:
    """What is known of one layer: its basis, how it served, and how long to do without."""

    def __init__(self) -> None:
        self.basis: Basis | None = None
        self.served = 0
        self.pause = 0
        self.next_pause = 1

    def read(self, matrix: WeightMatrix, tolerance: float) -> TrackedLayer | None:
        """The layer within the tolerance; None if it is to be decomposed in full."""
        if self.pause:
            self.pause -= 1
            return None
        try:
            layer = self._in_old_or_new_basis(matrix, tolerance)
        except torch.OutOfMemoryError:  # `measure` goes on in less memory
            layer = None
        if layer is None:
            self.basis = None
            self.pause, self.next_pause = self.next_pause, min(2 * self.next_pause, LONGEST_PAUSE)
        return layer

    def _in_old_or_new_basis(self, matrix: WeightMatrix, tolerance: float) -> TrackedLayer | None:
        if self.basis is not None and not self.basis.fits(matrix.stack):
            self.basis = None
        layer = self._within(matrix, tolerance)
        if layer is not None:
            self.served += 1
            if self.served == WORTHWHILE:
                self.next_pause = 1
            return layer
        if self.basis is not None and self.served < WORTHWHILE:
            return None
        self.basis, self.served = eigenbasis(matrix.stack), 0
        layer = self._within(matrix, tolerance)
        return None if layer is None else replace(layer, refreshed=True)

    def _within(self, matrix: WeightMatrix, tolerance: float) -> TrackedLayer | None:
        if self.basis is None:
            return None
        layer = tracked(matrix, self.basis)
        if layer is None or layer.error is None or layer.error > tolerance:
            return None
        return layer
