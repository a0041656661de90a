"""What was measured: `LayerReport`, `Report`, and their forms as a table and as scalars."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ww_train.columns import (
    Row,
    erg_columns,
    fit_columns,
    mp_columns,
    norm_columns,
    trap_columns,
)
from ww_train.confidence import Confidence
from ww_train.erg import ErgTail
from ww_train.localization import Localization
from ww_train.marchenko_pastur import MPFit
from ww_train.power_law import OVER_TRAINED, PowerLawFit
from ww_train.randomness import random_like
from ww_train.spectrum import Spectrum
from ww_train.trap_causes import TrapCause
from ww_train.traps import TrapAverage, Traps
from ww_train.verdicts import WORST_FIRST, Verdict, layer_advice, layer_verdict, model_verdict
from ww_train.weights.matrices import Skipped

if TYPE_CHECKING:
    import pandas as pd

SHORT_TAIL = 10
"""With fewer eigenvalues in the tail, alpha is reported with a warning."""

POOR_FIT = 0.1
"""With a larger Kolmogorov-Smirnov distance a warning says that the tail is hardly a power law."""

_TEXT_COLUMNS = ("name", "longname", "layer_type", "trap_causes", "status", "warning")


@dataclass(frozen=True, eq=False)
class LayerReport:
    """Everything measured of one layer. What could not be computed, or was not asked for, is None.

    Attributes:
        layer_id: Position of the layer among all matrices of the model, skipped ones included.
        name: Dotted path of the layer, with `[i]` for a slice measured by itself.
        layer_type: See `ww_train.weights.matrices.WeightMatrix`.
        spectrum: Eigenvalues, norms, ranks and entropy.
        fit: Power law of the tail; None if there is none.
        erg: ERG (trace-log) condition.
        slice_id: Which slice of a convolution this is, if slices are not pooled.
        mp: Random bulk of the spectrum.
        traps: Correlation traps.
        trap_average: Traps over several shuffles, if more than one was asked for.
        trap_causes: The entries or means that make the traps, the strongest first.
        shuffled: Spectrum of the (first) shuffled matrix, in which the traps were counted.
        rand_distance: Jensen-Shannon distance between the spectrum and that of the shuffled matrix.
        localization: Localisation of the eigenvectors.
        confidence: How sure alpha is.
    """

    layer_id: int
    name: str
    layer_type: str
    spectrum: Spectrum
    fit: PowerLawFit | None
    erg: ErgTail
    slice_id: int | None = None
    mp: MPFit | None = None
    traps: Traps | None = None
    trap_average: TrapAverage | None = None
    trap_causes: tuple[TrapCause, ...] = ()
    shuffled: Spectrum | None = None
    rand_distance: float | None = None
    localization: Localization | None = None
    confidence: Confidence | None = None

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
        """WeightWatcher's "over-trained" or "under-trained", then what makes alpha unreliable."""
        if not self.fit:
            return f"no power law in {self.spectrum.matrix_rank} eigenvalues above rounding"
        notes = [self.fit.warning]
        if self.fit.num_pl_spikes < SHORT_TAIL:
            notes.append(f"tail of {self.fit.num_pl_spikes} eigenvalues")
        if self.fit.D > POOR_FIT:
            notes.append(f"poor fit (D {self.fit.D:.2f})")
        return "; ".join(note for note in notes if note)

    @cached_property
    def random_like(self) -> bool:
        """Whether the spectrum is that of a random matrix; see `ww_train.randomness`."""
        return random_like(self.spectrum)

    @property
    def verdict(self) -> Verdict:
        """One word, one of `ww_train.verdicts.WORST_FIRST`.

        A layer is trapped if it has correlation traps, random-like if its spectrum is that of a
        random matrix, malformed if its tail is no power law; otherwise alpha decides.
        """
        return layer_verdict(self.fit, self.num_traps, random_like=self.random_like)

    @property
    def advice(self) -> str:
        """What the verdict means and what to do, in one line that names the layer."""
        return layer_advice(
            self.name,
            self.fit,
            self.num_traps,
            self.trap_causes,
            random_like=self.random_like,
        )

    def to_dict(self) -> Row:
        """The layer as one row with WeightWatcher's column names; optional columns if measured."""
        s, fit = self.spectrum, self.fit
        longname = self.name if self.slice_id is None else self.name.rpartition("[")[0]
        row: Row = {
            "layer_id": self.layer_id,
            "name": longname.rpartition(".")[2],
            "longname": longname,
            "layer_type": self.layer_type,
        }
        if self.slice_id is not None:
            row["slice_id"] = self.slice_id
        row |= {
            "N": s.N,
            "M": s.M,
            "Q": s.Q,
            "rf": s.rf,
            "num_evals": len(s.evals),
            "has_esd": True,
        }
        row |= fit_columns(fit, s) | erg_columns(self.erg) | norm_columns(s)
        if self.mp:
            row |= mp_columns(self.mp, s)
        if self.traps:
            row |= trap_columns(self.traps, s)
            row["rand_distance"] = self.rand_distance
            row["trap_causes"] = "; ".join(str(cause) for cause in self.trap_causes)
        if self.trap_average:
            row["num_traps_mean"] = self.trap_average.num_traps_mean
            row["num_traps_std"] = self.trap_average.num_traps_std
        if self.localization:
            row |= self.localization.to_dict()
        if self.confidence:
            row |= {
                "alpha_low": self.confidence.low,
                "alpha_high": self.confidence.high,
                "p_value": self.confidence.p_value,
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

    @property
    def verdict(self) -> str:
        """The verdicts of all layers in one line: "mostly critical (7 of 9 layers); 2 trapped"."""
        return model_verdict([layer.verdict for layer in self.layers])

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

    def summary(self) -> dict[str, float]:
        """WeightWatcher's `get_summary`: means over the layers that have the number."""
        metrics = ("log_norm", "alpha", "alpha_weighted", "log_alpha_norm", "log_spectral_norm")
        rows = [layer.to_dict() for layer in self.layers]
        columns = {
            name: [float(value) for row in rows if (value := row.get(name)) is not None]
            for name in (*metrics, "stable_rank", "mp_softrank")
        }
        return {name: statistics.fmean(values) for name, values in columns.items() if values}

    def to_dataframe(self) -> pd.DataFrame:
        """One row a layer, WeightWatcher's column names, NaN for None.

        `frame.attrs["skipped"]` maps the layers that were not analysed to the reasons.
        """
        import pandas as pd

        rows = [layer.to_dict() for layer in self.layers]
        frame = pd.DataFrame(rows) if rows else pd.DataFrame(columns=["layer_id", "longname"])
        for column in frame.columns:
            if frame[column].dtype == object and column not in _TEXT_COLUMNS:
                frame[column] = frame[column].astype(float)  # None becomes NaN
        frame.attrs["skipped"] = {layer.name: layer.reason for layer in self.skipped}
        return frame


def worst_first(layers: Iterable[LayerReport]) -> list[LayerReport]:
    """The layers by verdict; among equal ones the most traps, then alpha farthest from 2."""

    def badness(layer: LayerReport) -> tuple[int, int, float]:
        alpha = OVER_TRAINED if layer.alpha is None else layer.alpha
        return WORST_FIRST.index(layer.verdict), -(layer.num_traps or 0), -abs(alpha - OVER_TRAINED)

    return sorted(layers, key=badness)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
