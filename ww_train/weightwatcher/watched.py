"""What the methods of `WeightWatcher` share: the model it holds, its layers, and what it prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ww_train.editing.edits import Edits
from ww_train.editing.smoothing import Smoothed
from ww_train.editing.trap_removal import TrapsRemoved
from ww_train.planning import MAX_EVALS, MIN_EVALS
from ww_train.report import Report
from ww_train.weights.matrices import Source
from ww_train.weightwatcher.layers import (
    NumberedLayer,
    PeerLayers,
    adapted_layers,
    chosen_layers,
    numbered_layers,
)
from ww_train.weightwatcher.options import refuse_framework, verbose
from ww_train.weightwatcher.tables import description

if TYPE_CHECKING:
    import pandas as pd

MAX_N = 50000
"""WeightWatcher's limits: smaller and larger layers are left out."""


class Watched:
    """A model, and what was found out about it; see `WeightWatcher` for the attributes."""

    def __init__(
        self,
        model: Source | None = None,
        framework: str | None = None,
        base_model: Source | None = None,
        log_level: int | str | None = None,
    ) -> None:
        refuse_framework(framework)
        self.model = model
        self.base_model = base_model
        self.details: pd.DataFrame | None = None
        self.report: Report | None = None
        self.figures: list[Path] = []
        self.edits: Edits[Smoothed] | Edits[TrapsRemoved] | None = None
        self._verbose = verbose(log_level)

    def _source(self, model: Source | None) -> Source:
        """The model to use, which later calls use too."""
        if model is not None:
            self.model = list(model) if isinstance(model, Iterator) else model
        if self.model is None:
            raise ValueError("there is no model: pass WeightWatcher(model=...) or model=...")
        return self.model

    def _layers(
        self,
        model: Source | None,
        layers: PeerLayers | None,
        start_ids: int,
        base_model: Source | None,
        peft: bool | str,
        *,
        conv2d_norm: bool = True,
    ) -> list[NumberedLayer]:
        found = numbered_layers(self._source(model), start_ids)
        if peft:
            found = adapted_layers(found, base_model, peft)
        found = chosen_layers(found, layers)
        return found if conv2d_norm else [layer.without_scale() for layer in found]

    def _layer(self, model: Source | None, layer: int | str | None) -> NumberedLayer:
        found = numbered_layers(self._source(model))
        chosen = chosen_layers(found, () if layer is None else layer)
        if not chosen:
            raise ValueError("the model holds no matrix")
        return chosen[0]

    def _say(self, text: str) -> None:
        if self._verbose:
            print(text)


def within_limits(layers: list[NumberedLayer]) -> list[NumberedLayer]:
    """The layers that `analyze` does not leave out by default."""
    table = description(layers, min_evals=MIN_EVALS, max_evals=MAX_EVALS, max_N=MAX_N)
    names = set(table["longname"])
    return [layer for layer in layers if layer.longname in names]
