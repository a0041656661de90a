"""The methods of `WeightWatcher` that change the weights of a model in place."""

from __future__ import annotations

from typing import cast

from ww_train.analysis import measure
from ww_train.editing.edits import Editable, Edits
from ww_train.editing.smoothing import svd_smoothing_
from ww_train.editing.trap_removal import remove_traps_
from ww_train.power_law import TailFit
from ww_train.weights.matrices import Source
from ww_train.weightwatcher.figures import check_drawing, save_figures, shuffled_figures
from ww_train.weightwatcher.layers import NumberedLayer, PeerLayers, chosen_layers, numbered_layers
from ww_train.weightwatcher.options import FOLDER, PERCENT, eigensolver, refuse, smoothing_rule
from ww_train.weightwatcher.watched import Watched, within_limits


class Editing(Watched):
    """`SVDSmoothing` and `SVDSharpness`."""

    def SVDSmoothing(
        self,
        model: Source | None = None,
        percent: float = PERCENT,
        *,
        pool: bool = True,
        layers: PeerLayers | None = (),
        method: str = "detX",
        fit: str | TailFit = "PL",
        plot: bool = False,
        start_ids: int = 0,
        svd_method: str = "fast",
    ) -> Source:
        """Delete singular values of every layer, in place, as WeightWatcher does.

        To keep the model use `ww_train.editing.smoothing.smoothed`, which changes a copy; for files
        `ww_train.editing.smoothing.smooth_checkpoint`.

        Args:
            model: A module, a state dict or a tensor, if it is not that of the constructor.
            percent: Share of the singular values that method "svd" keeps; below zero, the share of
                the largest that it deletes.
            pool: Not supported.
            layers: Which layers; see the class.
            method: What to keep: "detX", the ERG tail; "alpha_min", the power-law tail; "rmt", what
                lies above the random bulk; "svd", `percent`; "auto", "rmt" if alpha is above 6, else
                "detX".
            fit: Of "alpha_min".
            plot: Not supported.
            start_ids: The first id.
            svd_method: "fast" or "accurate"; both are done in float64.

        Returns:
            The model itself; what was done to each layer is in `edits`.

        Raises:
            TypeError: If the model cannot be changed in place.
            ValueError: If an argument is not supported or there is no such layer.
        """
        refuse(pool=pool, plot=plot)
        eigensolver(svd_method)
        rule = smoothing_rule(method, percent, fit)
        target, found = self._editable(model, layers, start_ids)
        names = [layer.longname for layer in found]
        self.edits = svd_smoothing_(target, rule=rule, layers=names) if names else Edits((), ())
        return target

    def SVDSharpness(
        self,
        model: Source | None = None,
        *,
        pool: bool = True,
        layers: PeerLayers | None = (),
        plot: bool = False,
        start_ids: int = 0,
    ) -> Source:
        """Take the correlation traps out of every layer, in place.

        WeightWatcher deletes the layer's largest singular values instead, which is what the layer has
        learned. Here the entries and means that make the traps go, and the rest stays.

        Args:
            model: A module, a state dict or a tensor, if it is not that of the constructor.
            pool: Not supported.
            layers: Which layers; see the class.
            plot: Draw the random bulk of every shuffled layer, whose spikes are the traps, as it was
                before, into the folder "ww-img"; nothing is shown. Their paths are in `figures`.
            start_ids: The first id.

        Returns:
            The model itself; what was done to each layer is in `edits`.

        Raises:
            TypeError: If the model cannot be changed in place.
            ValueError: If an argument is not supported or there is no such layer.
            OSError: If the folder cannot be written.
        """
        refuse(pool=pool)
        target, found = self._editable(model, layers, start_ids)
        if plot:
            self._draw_traps(found)
        names = [layer.longname for layer in found]
        self.edits = remove_traps_(target, layers=names) if names else Edits((), ())
        return target

    def _editable(
        self, model: Source | None, layers: PeerLayers | None, start_ids: int
    ) -> tuple[Editable, list[NumberedLayer]]:
        """The model, and those of its layers that `analyze` would analyse."""
        target = self._source(model)
        chosen = chosen_layers(numbered_layers(target, start_ids), layers)
        return cast("Editable", target), within_limits(chosen)

    def _draw_traps(self, found: list[NumberedLayer]) -> None:
        """The figures of `SVDSharpness(plot=True)`, of layers within the limits."""
        check_drawing(FOLDER)
        report = measure(
            [layer.matrix for layer in found],
            randomize=True,
            min_evals=0,
            max_evals=None,
            progress=self._verbose,
        )
        self.figures = save_figures(report, found, FOLDER, draw=shuffled_figures)
        self._say(f"{len(self.figures)} figures in {FOLDER}")
