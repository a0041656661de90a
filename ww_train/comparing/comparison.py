"""A fine-tuned model against its base: which layers changed, how, and what that means."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ww_train.analysis import measure
from ww_train.columns import Row
from ww_train.comparing.matching import Matching, matched_pairs
from ww_train.comparing.readings import METRICS, OF_ALPHA, Reading, read_changes
from ww_train.exports import to_json, write_bytes
from ww_train.report import LayerReport, Report
from ww_train.selection import Layers
from ww_train.spectrum import Spectrum
from ww_train.weights.matrices import Source, weight_matrices

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two models and their difference, measured layer by layer.

    All three reports hold matched layers only. Means are over the layers of which both models have
    the number, so that a layer that one model lacks, or whose fit fails in one, changes no mean.

    Attributes:
        base: The matched layers of the base model.
        finetuned: The same layers of the fine-tuned model.
        delta: The matrices fine-tuned minus base; layers that did not change are in its `skipped`.
        matching: Which layers matched, and which are missing, extra or reshaped.
    """

    base: Report
    finetuned: Report
    delta: Report
    matching: Matching

    def __repr__(self) -> str:
        m = self.matching
        counts = f"{len(m.missing)} missing, {len(m.extra)} extra, {len(m.reshaped)} reshaped"
        lines = [
            f"Comparison of {len(self.finetuned)} layers ({counts})",
            *map(str, self.reading()),
        ]
        return "\n  ".join(lines)

    def metrics_summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean metrics of both models and their changes, fine-tuned minus base.

        Returns:
            `{"weightwatcher": {"baseline": ..., "finetuned": ..., "changes": ...}}`, each with the
            means of `ww_train.comparing.readings.METRICS` that were measured.
        """
        baseline, finetuned = self._means()
        changes = {name: finetuned[name] - value for name, value in baseline.items()}
        return {"weightwatcher": {"baseline": baseline, "finetuned": finetuned, "changes": changes}}

    def reading(self) -> tuple[Reading, ...]:
        """What each change means; metrics that did not change are left out."""
        return read_changes(*self._means(), self._doubts())

    def _doubts(self) -> dict[str, str]:
        """Of what is made of alpha, if that is read from noise: in most layers of one model."""
        pairs = list(self._pairs())
        models = {"base": [b for b, _ in pairs], "fine-tuned model": [a for _, a in pairs]}
        noisy = [
            name
            for name, layers in models.items()
            if 2 * sum(layer.random_like for layer in layers) > len(layers)
        ]
        if not noisy:
            return {}
        whose = " and of the ".join(noisy)
        doubt = f"most layers of the {whose} are random-like: alpha says nothing of them"
        return dict.fromkeys(OF_ALPHA, doubt)

    def write_metrics_summary(self, path: str | os.PathLike[str]) -> None:
        """Write `metrics_summary` as JSON; the file is replaced whole or not at all."""
        write_bytes(to_json(self.metrics_summary()), path)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a layer that was measured in both models; NaN where there is no number.

        Columns are the name, type and shape, `relative_delta` (Frobenius norm of the difference over
        that of the base, in `c * W`), and for each metric `<metric>_base`, `<metric>_finetuned`,
        `<metric>_change` and `<metric>_of_delta`, that of the difference as a matrix of its own.
        """
        import pandas as pd

        differences = {layer.name: layer for layer in self.delta}
        rows = [_row(*pair, differences.get(pair[0].name)) for pair in self._pairs()]
        frame = pd.DataFrame(rows)
        m = self.matching
        frame.attrs |= {"missing": list(m.missing), "extra": list(m.extra)}
        frame.attrs["reshaped"] = {layer.name: layer.reason for layer in m.reshaped}
        skipped = (*m.unreadable, *self.base.skipped, *self.finetuned.skipped)
        frame.attrs["skipped"] = {layer.name: layer.reason for layer in skipped}
        numbers = frame.columns.difference(["longname", "layer_type"])
        return frame.astype(dict.fromkeys(numbers, float)) if rows else frame

    def _pairs(self) -> Iterator[tuple[LayerReport, LayerReport]]:
        """Layers that were measured in both models."""
        before = {layer.name: layer for layer in self.base}
        for layer in self.finetuned:
            if layer.name in before:
                yield before[layer.name], layer

    def _means(self) -> tuple[dict[str, float], dict[str, float]]:
        rows = [(before.to_dict(), after.to_dict()) for before, after in self._pairs()]
        baseline, finetuned = {}, {}
        for metric in METRICS:
            pairs = [(metric.of(before), metric.of(after)) for before, after in rows]
            both = [(b, a) for b, a in pairs if b is not None and a is not None]
            if both:
                baseline[metric.name] = statistics.fmean(b for b, _ in both)
                finetuned[metric.name] = statistics.fmean(a for _, a in both)
        return baseline, finetuned


def compare(
    base: Source,
    finetuned: Source,
    *,
    layers: Layers = None,
    types: str | tuple[str, ...] = (),
    **options: Any,
) -> Comparison:
    """Measure a base model, a model that was trained from it, and the difference of the two.

    Layers are matched by name; those without a partner of the same shape are named in the result
    and not measured.

    Args:
        base: The base model; any source that `measure` takes.
        finetuned: The fine-tuned model. For a LoRA adapter, `ww_train.merge(base, adapter)`.
        layers: Which of the fine-tuned model's layers, as in `measure`.
        types: Which types of layers.
        **options: Of `measure`, the same for all three: `mp_fit=True`, `randomize=True`, ...

    Raises:
        ValueError: If the models have no layer in common, or none of those asked for.
        TypeError: If an option is given that belongs to one model, or is none of `measure`.

    Cost: three times that of `measure`; a source on disk is read twice for its own spectrum and for
    the difference.
    """
    for name in ("base_model", "spectra"):
        if name in options:
            raise TypeError(f"{name}= belongs to one model: call measure with it instead")
    before, after = list(weight_matrices(base)), list(weight_matrices(finetuned))
    matching, pairs = matched_pairs(before, after, layers, types)
    names = [layer.name for _, layer in pairs]
    return Comparison(
        base=measure(before, layers=names, **options),
        finetuned=measure(after, layers=names, **options),
        delta=measure(after, layers=names, base_model=before, **options),
        matching=matching,
    )


def _row(before: LayerReport, after: LayerReport, delta: LayerReport | None) -> Row:
    row: Row = {"longname": after.name, "layer_type": after.layer_type}
    row |= {"N": after.spectrum.N, "M": after.spectrum.M, "rf": after.spectrum.rf}
    row["relative_delta"] = _relative(before.spectrum, after.spectrum, delta)
    old, new = before.to_dict(), after.to_dict()
    own = delta.to_dict() if delta else {}
    for metric in METRICS:
        b, a = metric.of(old), metric.of(new)
        if b is None and a is None:
            continue
        row[f"{metric.name}_base"], row[f"{metric.name}_finetuned"] = b, a
        row[f"{metric.name}_change"] = a - b if a is not None and b is not None else None
        row[f"{metric.name}_of_delta"] = metric.of(own)
    return row


def _relative(before: Spectrum, after: Spectrum, delta: LayerReport | None) -> float | None:
    """Norm of the difference over that of the base; None if the difference could not be measured."""
    if delta is not None:
        return math.sqrt(delta.spectrum.norm / before.norm)
    return 0.0 if np.array_equal(before.evals, after.evals) else None
