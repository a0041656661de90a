"""Measure a model: `measure` gives a `Report` of plain numbers, `analyze` a pandas DataFrame."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ww_train.erg import ErgTail, erg_tail
from ww_train.linalg import gram, gram_eigenvalues
from ww_train.matrices import Skipped, Source, WeightMatrix, weight_matrices
from ww_train.power_law import OVER_TRAINED, PowerLawFit, fit_power_law
from ww_train.spectrum import Array, Spectrum
from ww_train.traps import Traps, count_traps, shuffle

if TYPE_CHECKING:
    import pandas as pd

BATCH_BYTES = 1 << 28
"""Gram matrices that may wait for others of their size before they are decomposed."""

CRITICAL_WIDTH = 0.1
"""Half-width of "critical" around alpha = 2: the standard error of alpha with 100 eigenvalues."""


_TEXT_COLUMNS = ("name", "longname", "layer_type", "status", "warning")


@dataclass(frozen=True, eq=False)
class LayerReport:
    """Everything measured of one layer. What could not be computed is None.

    Attributes:
        layer_id: Position of the layer among all matrices of the model, skipped ones included.
        name: Dotted path of the layer.
        layer_type: See `ww_train.matrices.WeightMatrix`.
        spectrum: Eigenvalues, norms, ranks and entropy.
        fit: Power law of the tail; None if there is none.
        erg: ERG (trace-log) condition.
        traps: Correlation traps; None unless measured with `randomize=True`.
    """

    layer_id: int
    name: str
    layer_type: str
    spectrum: Spectrum
    fit: PowerLawFit | None
    erg: ErgTail
    traps: Traps | None = None

    @property
    def alpha(self) -> float | None:
        """Power-law exponent of the tail."""
        return self.fit.alpha if self.fit else None

    @property
    def ERG_gap(self) -> int | None:
        """Eigenvalues in the ERG tail minus those in the power-law tail."""
        return self.erg.ERG_gap

    @property
    def trace_log(self) -> float | None:
        """Trace-log of the power-law tail, mean-one scale; zero at criticality."""
        return self.erg.trace_log

    @property
    def num_traps(self) -> int | None:
        """Number of correlation traps."""
        return self.traps.num_traps if self.traps else None

    @property
    def warning(self) -> str:
        """WeightWatcher's "over-trained" or "under-trained", or why there is no alpha, or ""."""
        if self.fit:
            return self.fit.warning
        return f"no power law in {self.spectrum.matrix_rank} eigenvalues above rounding"

    @property
    def verdict(self) -> str:
        """One word: over-trained, critical, well-trained, under-trained or malformed (no fit)."""
        if self.alpha is None:
            return "malformed"
        if abs(self.alpha - OVER_TRAINED) <= CRITICAL_WIDTH:
            return "critical"
        return self.warning or "well-trained"

    def to_dict(self) -> dict[str, float | int | str | bool | None]:
        """The layer as one row with WeightWatcher's column names; randomised ones if measured."""
        s, fit, erg = self.spectrum, self.fit, self.erg
        row: dict[str, float | int | str | bool | None] = {
            "layer_id": self.layer_id,
            "name": self.name.rpartition(".")[2],
            "longname": self.name,
            "layer_type": self.layer_type,
            "N": s.N,
            "M": s.M,
            "Q": s.Q,
            "rf": s.rf,
            "num_evals": len(s.evals),
            "has_esd": True,
            "alpha": self.alpha,
            "D": fit.D if fit else None,
            "sigma": fit.sigma if fit else None,
            "xmin": fit.xmin if fit else None,
            "xmax": fit.xmax if fit else None,
            "num_pl_spikes": fit.num_pl_spikes if fit else None,
            "alpha_weighted": fit.alpha * s.log_spectral_norm if fit else None,
            "log_alpha_norm": s.log_alpha_norm(fit.alpha) if fit else None,
            "detX_num": erg.detX_num,
            "num_ERG_spikes": erg.detX_num,
            "detX_val": erg.detX_val,
            "ERG_gap": erg.ERG_gap,
            "trace_log": erg.trace_log,
            "norm": s.norm,
            "log_norm": s.log_norm,
            "spectral_norm": s.lambda_max,
            "log_spectral_norm": s.log_spectral_norm,
            "stable_rank": s.stable_rank,
            "matrix_rank": s.matrix_rank,
            "entropy": s.entropy,
            "lambda_max": s.lambda_max,
            "sv_max": s.sv_max,
            "sv_min": s.sv_min,
            "rank_loss": s.rank_loss,
            "weak_rank_loss": s.weak_rank_loss(),
        }
        if self.traps:
            mp = self.traps.mp
            row |= {
                "num_traps": self.traps.num_traps,
                "rand_num_spikes": self.traps.num_traps,
                "max_rand_eval": self.traps.max_rand_eval,
                "rand_bulk_min": mp.bulk_min,
                "rand_bulk_max": mp.bulk_max,
                "rand_sigma_mp": mp.sigma_mp,
                "rand_mp_softrank": mp.bulk_max / self.traps.max_rand_eval,
                "ww_softrank": self.traps.max_rand_eval / s.lambda_max,
                "ww_maxdist": s.lambda_max - self.traps.max_rand_eval,
            }
        row |= {"status": "success" if fit else "failed", "warning": self.warning}
        return row


@dataclass(frozen=True, eq=False)
class Report:
    """The layers of a model as measured at one moment, in model order.

    Attributes:
        layers: One report for each analysed layer.
        skipped: The matrices that were not analysed, with reasons.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]

    @cached_property
    def _by_name(self) -> dict[str, LayerReport]:
        return {layer.name: layer for layer in self.layers}

    def __getitem__(self, name: str) -> LayerReport:
        if name not in self._by_name:
            raise KeyError(f"no layer {name!r} was analysed; analysed: {', '.join(self._by_name)}")
        return self._by_name[name]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        rows = [
            f"  {layer.name}: alpha {_number(layer.alpha)}, ERG gap {_number(layer.ERG_gap)}, "
            f"traps {_number(layer.num_traps)}, {layer.verdict}"
            for layer in self.layers
        ]
        rows += [f"  {layer.name}: skipped, {layer.reason}" for layer in self.skipped]
        return "\n".join([f"Report of {len(self)} layers", *rows])

    def scalars(self) -> dict[str, float]:
        """The report as tags and numbers for any logger; values that are None are left out.

        Summaries are `ww/alpha_mean`, `ww/alpha_min`, `ww/alpha_max`, `ww/erg_gap_mean` (of the
        absolute gap), `ww/trace_log_mean` (absolute), `ww/traps_total` and `ww/num_layers`. Layers
        are `ww_alpha/<layer>`, `ww_erg_gap/<layer>`, `ww_trace_log/<layer>` and `ww_traps/<layer>`,
        one group a metric.
        """
        alphas = [x.alpha for x in self.layers if x.alpha is not None]
        gaps = [abs(x.ERG_gap) for x in self.layers if x.ERG_gap is not None]
        logs = [abs(x.trace_log) for x in self.layers if x.trace_log is not None]
        traps = [x.num_traps for x in self.layers if x.num_traps is not None]
        tags: dict[str, float] = {"ww/num_layers": float(len(self))}
        if alphas:
            tags["ww/alpha_mean"] = statistics.fmean(alphas)
            tags["ww/alpha_min"] = min(alphas)
            tags["ww/alpha_max"] = max(alphas)
        if gaps:
            tags["ww/erg_gap_mean"] = statistics.fmean(gaps)
        if logs:
            tags["ww/trace_log_mean"] = statistics.fmean(logs)
        if traps:
            tags["ww/traps_total"] = float(sum(traps))
        for layer in self.layers:
            for metric, value in (
                ("alpha", layer.alpha),
                ("erg_gap", layer.ERG_gap),
                ("trace_log", layer.trace_log),
                ("traps", layer.num_traps),
            ):
                if value is not None:
                    tags[f"ww_{metric}/{layer.name}"] = float(value)
        return tags

    def to_dataframe(self) -> pd.DataFrame:
        """One row a layer, WeightWatcher's column names, NaN for None.

        `frame.attrs["skipped"]` maps the layers that were not analysed to the reasons.
        """
        import pandas as pd

        rows = [layer.to_dict() for layer in self.layers]
        frame = pd.DataFrame(rows, columns=list(rows[0]) if rows else ["layer_id", "longname"])
        for column in frame.columns:
            if frame[column].dtype == object and column not in _TEXT_COLUMNS:
                frame[column] = frame[column].astype(float)  # None becomes NaN
        frame.attrs["skipped"] = {layer.name: layer.reason for layer in self.skipped}
        return frame


def measure(
    model: Source,
    *,
    randomize: bool = False,
    seed: int = 0,
    min_evals: int = 8,
    max_evals: int | None = 15000,
    progress: bool = False,
) -> Report:
    """Measure the spectrum of every layer of a model. Changes nothing, uses no global generator.

    Args:
        model: A module, a state dict or a single matrix (Tensor or ndarray), on any device.
        randomize: Also shuffle each matrix and count its correlation traps; about doubles the cost.
        seed: Seed of the shuffles.
        min_evals: Layers with fewer eigenvalues are skipped.
        max_evals: Layers with more are skipped; None for no limit.
        progress: Show a progress bar on standard error if it is a terminal.

    Returns:
        The report; layers that cannot be analysed are in `skipped` with the reason.

    Raises:
        TypeError: If `model` is none of the accepted kinds.

    Cost: for an N x M layer `N M² + (4/3) M³` float64 operations on the layer's device, twice that
    with `randomize`; one copy of all eigenvalues to the host.
    """
    skipped: list[tuple[int, Skipped]] = []
    spectra = _Spectra()
    found = list(enumerate(weight_matrices(model)))
    with torch.no_grad(), tqdm(found, unit="layer", delay=1, disable=not progress or None) as bar:
        for layer_id, matrix in bar:
            bar.set_postfix_str(matrix.name, refresh=False)
            if isinstance(matrix, WeightMatrix):
                matrix = _within(matrix, min_evals, max_evals)
            if isinstance(matrix, Skipped):
                skipped.append((layer_id, matrix))
            else:
                spectra.add(layer_id, matrix, seed if randomize else None)
    layers: list[LayerReport] = []
    for pending, evals, shuffled in spectra.collect():
        reason = _malformed(evals)
        if reason is not None:
            skipped.append((pending.layer_id, Skipped(pending.name, reason)))
        else:
            layers.append(_report(pending, evals, shuffled, seed))
    return Report(
        tuple(sorted(layers, key=lambda layer: layer.layer_id)),
        tuple(layer for _, layer in sorted(skipped, key=lambda pair: pair[0])),
    )


def analyze(
    model: Source,
    *,
    randomize: bool = False,
    seed: int = 0,
    min_evals: int = 8,
    max_evals: int | None = 15000,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure a model and return a pandas DataFrame with WeightWatcher's column names.

    Takes the arguments of `measure`; the ERG columns are always there. Skipped layers and the
    reasons are in `frame.attrs["skipped"]`; if nothing could be analysed a warning lists them.
    """
    report = measure(
        model,
        randomize=randomize,
        seed=seed,
        min_evals=min_evals,
        max_evals=max_evals,
        progress=progress,
    )
    if not report.layers:
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in report.skipped)
        warnings.warn(
            f"no layer could be analysed ({reasons or 'the model holds no matrix'})", stacklevel=2
        )
    return report.to_dataframe()


@dataclass(frozen=True, eq=False)
class _Pending:
    """What is kept of a layer while its eigenvalues are computed: not the weights."""

    layer_id: int
    name: str
    layer_type: str
    N: int
    M: int
    rf: int
    eps: float


class _Spectra:
    """Gram matrices waiting for others of their size, and the eigenvalues computed so far."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, torch.device], list[tuple[_Pending, list[Tensor]]]] = {}
        self._bytes = 0
        self._done: list[tuple[_Pending, list[Tensor]]] = []

    def add(self, layer_id: int, matrix: WeightMatrix, seed: int | None) -> None:
        stack, name = matrix.stack, matrix.name
        eps = torch.finfo(stack.dtype).eps
        N, M, rf = matrix.N, matrix.M, matrix.rf
        pending = _Pending(layer_id, name, matrix.layer_type, N, M, rf, eps)
        grams = [gram(stack, matrix.scale)]
        if seed is not None:
            grams.append(gram(shuffle(stack, seed, name), matrix.scale))
        self._waiting.setdefault((M, stack.device), []).append((pending, grams))
        self._bytes += sum(g.nbytes for g in grams)
        if self._bytes > BATCH_BYTES:
            self._decompose()

    def _decompose(self) -> None:
        for bucket in self._waiting.values():
            flat = iter(gram_eigenvalues([g for _, grams in bucket for g in grams]))
            self._done += [(pending, [next(flat) for _ in grams]) for pending, grams in bucket]
        self._waiting.clear()
        self._bytes = 0

    def collect(self) -> Iterator[tuple[_Pending, Array, Array | None]]:
        """Eigenvalues of every layer and of its shuffle, after one copy to the host a device."""
        self._decompose()
        by_device: dict[torch.device, list[tuple[_Pending, list[Tensor]]]] = {}
        for pending, evals in self._done:
            by_device.setdefault(evals[0].device, []).append((pending, evals))
        for entries in by_device.values():
            flat = [e for _, evals in entries for e in evals]
            host = iter(torch.split(torch.cat(flat).cpu(), [len(e) for e in flat]))
            for pending, evals in entries:
                arrays = [next(host).numpy() for _ in evals]
                yield pending, arrays[0], arrays[1] if len(arrays) > 1 else None


def _within(matrix: WeightMatrix, low: int, high: int | None) -> WeightMatrix | Skipped:
    num = matrix.num_evals
    if num < low:
        return Skipped(matrix.name, f"{num} eigenvalues, fewer than min_evals={low}")
    if high is not None and num > high:
        return Skipped(matrix.name, f"{num} eigenvalues, more than max_evals={high}")
    return matrix


def _malformed(evals: Array) -> str | None:
    top = float(evals[-1])  # NaN sorts last
    if math.isnan(top):
        return "NaN or infinite weights, or squares that overflow"
    if math.isinf(top):
        return "the eigenvalue solver failed"
    return "all weights are zero" if top == 0.0 else None


def _report(pending: _Pending, evals: Array, shuffled: Array | None, seed: int) -> LayerReport:
    N, M, rf, eps = pending.N, pending.M, pending.rf, pending.eps
    spectrum = Spectrum(evals, N, M, rf, eps)
    fit = fit_power_law(spectrum.positive)
    traps = None
    if shuffled is not None:
        traps = count_traps(Spectrum(shuffled, N, M, rf, eps), seed)
    return LayerReport(
        pending.layer_id,
        pending.name,
        pending.layer_type,
        spectrum,
        fit,
        erg_tail(spectrum, fit),
        traps,
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
