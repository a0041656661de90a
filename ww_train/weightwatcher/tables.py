"""WeightWatcher's tables: the columns of `analyze`, `describe` and `distances` in its order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ww_train.analysis import describe
from ww_train.columns import erg_columns
from ww_train.comparing.matching import match_layers
from ww_train.report import LayerReport, Report
from ww_train.weights.adapters import SUFFIX
from ww_train.weights.matrices import Skipped, Source, WeightMatrix, slices, weight_matrices
from ww_train.weightwatcher.layers import MERGED, NumberedLayer

if TYPE_CHECKING:
    import pandas as pd


def details_table(
    report: Report,
    layers: Sequence[NumberedLayer],
    *,
    erg: bool,
    pool: bool,
    peft: bool,
    tolerance: float,
) -> pd.DataFrame:
    """A report with WeightWatcher's columns, numbers and names; NaN where it has -1.

    `warning` is WeightWatcher's word alone; what else there is to say is in `notes`.

    Args:
        report: What was measured of these layers.
        layers: The layers, in the order in which they were measured.
        erg: Keep the columns of the ERG condition.
        pool: Whether slices were pooled; otherwise `rf` is that of the layer and `slice_id` is zero
            where there are none.
        peft: Add the column of that name: whether a row is that of an update, or of a sum with one.
        tolerance: Of `weak_rank_loss`, relative to the largest eigenvalue.
    """
    frame = report.to_dataframe()
    skipped = frame.attrs["skipped"]
    own = [layers[row.layer_id] for row in report]
    frame["layer_id"] = [layer.layer_id for layer in own]
    frame["name"] = [layer.name for layer in own]
    frame["weak_rank_loss"] = [row.spectrum.weak_rank_loss(tolerance) for row in report]
    frame["warning"], frame["notes"] = (
        [_word(row) for row in report],
        [_notes(row) for row in report],
    )
    if not pool:
        frame["rf"] = [layer.matrix.rf for layer in own if isinstance(layer.matrix, WeightMatrix)]
        frame["slice_id"] = [row.slice_id or 0 for row in report]
    if peft:
        frame["peft"] = [layer.longname.endswith((SUFFIX, MERGED)) for layer in own]
    if report.layers and not erg:
        frame = frame.drop(columns=list(erg_columns(report.layers[0].erg)))
    return ordered(frame, skipped)


def description(
    layers: Sequence[NumberedLayer],
    *,
    min_evals: int,
    max_evals: int | None,
    max_N: int | None,
    pool: bool = True,
    base_model: Source | None = None,
) -> pd.DataFrame:
    """WeightWatcher's `describe`: the layers that would be analysed; the others are in `attrs`.

    Args:
        layers: The layers.
        min_evals: As in `measure`, and so are the other two limits.
        max_evals: As in `measure`.
        max_N: As in `measure`.
        pool: Otherwise one row for each slice of a convolution.
        base_model: Those without a partner in this model are left out too.
    """
    if base_model is not None:
        layers = _with_partner(layers, base_model)
    parts = [(layer, part) for layer in layers for part in _parts(layer, pool)]
    frame = describe(
        [part for _, part in parts], min_evals=min_evals, max_evals=max_evals, max_N=max_N
    )
    if not parts:
        return ordered(frame.reindex(columns=["layer_id", "name", "longname"]), {})
    frame["layer_id"] = [layer.layer_id for layer, _ in parts]
    frame["name"] = [layer.name for layer, _ in parts]
    left_out = frame["skipped"] != ""
    skipped = dict(zip(frame["longname"][left_out], frame["skipped"][left_out], strict=True))
    frame["longname"] = [layer.longname for layer, _ in parts]
    if not pool:
        frame["rf"] = [getattr(layer.matrix, "rf", 0) for layer, _ in parts]
        frame["slice_id"] = [getattr(part, "slice_id", None) or 0 for _, part in parts]
    frame = frame[~left_out].drop(columns="skipped").reset_index(drop=True)
    counts = frame.columns.intersection(["N", "M", "rf", "num_evals"])
    return ordered(frame.astype(dict.fromkeys(counts, int)), skipped)


def ordered(frame: pd.DataFrame, skipped: Mapping[str, str]) -> pd.DataFrame:
    """WeightWatcher's order of columns, and the reasons for missing rows in `attrs`."""
    first = ["layer_id", "name"]
    frame = frame[first + sorted(set(frame.columns) - set(first))]
    frame.attrs["skipped"] = dict(skipped)
    return frame


def _with_partner(layers: Sequence[NumberedLayer], base_model: Source) -> list[NumberedLayer]:
    """The layers; instead of those that a base model has not, or in another shape, the reason."""
    found = match_layers(list(weight_matrices(base_model)), [layer.matrix for layer in layers])
    reasons = dict.fromkeys(found.extra, "no such layer in the base model")
    reasons |= {layer.name: layer.reason for layer in (*found.reshaped, *found.unreadable)}
    return [
        replace(layer, matrix=Skipped(layer.longname, reasons[layer.longname]))
        if layer.longname in reasons
        else layer
        for layer in layers
    ]


def _parts(layer: NumberedLayer, pool: bool) -> list[WeightMatrix] | list[Skipped]:
    matrix = layer.matrix
    if isinstance(matrix, Skipped):
        return [matrix]
    return [matrix] if pool else slices(matrix)


def _word(layer: LayerReport) -> str:
    return layer.fit.warning if layer.fit else ""


def _notes(layer: LayerReport) -> str:
    return layer.warning.removeprefix(_word(layer)).removeprefix("; ")
