"""The class `WeightWatcher`: its methods that measure, in terms of `ww_train`."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ww_train.analysis import measure
from ww_train.marchenko_pastur import BulkFit
from ww_train.planning import MAX_EVALS, MIN_EVALS
from ww_train.power_law import TailFit
from ww_train.spectrum import Array
from ww_train.weights.matrices import Source, WeightMatrix, reasons, slices
from ww_train.weightwatcher.distances import distance_table
from ww_train.weightwatcher.editing import Editing
from ww_train.weightwatcher.figures import analysis_figures, check_drawing, save_figures
from ww_train.weightwatcher.layers import PeerLayers, chosen_layers, numbered_layers
from ww_train.weightwatcher.options import (
    FINGER_THRESH,
    FOLDER,
    MAX_FINGERS,
    eigensolver,
    figure_folder,
    limit,
    refuse,
    tail_fit,
)
from ww_train.weightwatcher.tables import description, details_table
from ww_train.weightwatcher.watched import MAX_N, within_limits

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 1e-6
"""Below this share of the largest, eigenvalues count in `weak_rank_loss`."""

SUMMARY = (
    *("log_norm", "alpha", "alpha_weighted", "log_alpha_norm", "log_spectral_norm"),
    *("stable_rank", "mp_softrank"),
)
"""Columns whose means `get_summary` gives."""


class WeightWatcher(Editing):
    """WeightWatcher's interface.

    Layers are chosen by `layers=`: ids as in the column `layer_id`, names as in `name` or `longname`,
    globs, types such as "conv2d"; ids below zero and "-names" leave out. `start_ids` is the first id.

    Args:
        model: What to analyse: a module, a state dict, a matrix, or a file or folder of weights.
        framework: Of no use: None or "pytorch".
        base_model: Analyse the difference to this model.
        log_level: As in `logging`; above INFO there is no progress bar and no message.

    Attributes:
        model: The model of the last call, which calls without a model use.
        base_model: The base model of the constructor, which calls without a base model use.
        details: The table of the last `analyze`, or None.
        report: The same as plain numbers, `ww_train.Report`, for `ww_train.plots` and others.
        figures: The files that the last call with `plot=True` wrote.
        edits: What the last `SVDSmoothing` or `SVDSharpness` did to each layer.
    """

    def analyze(
        self,
        model: Source | None = None,
        layers: PeerLayers | None = (),
        min_evals: int | None = MIN_EVALS,
        max_evals: int | None = MAX_EVALS,
        *,
        min_size: None = None,
        max_size: None = None,
        max_N: int | None = MAX_N,
        glorot_fix: bool = False,
        plot: bool = False,
        randomize: int = False,
        savefig: bool | str = FOLDER,
        mp_fit: bool | BulkFit = False,
        conv2d_norm: bool = True,
        ww2x: bool = False,
        pool: bool = True,
        conv2d_fft: bool = False,
        fft: bool = False,
        deltas: bool = False,
        intra: bool = False,
        vectors: bool = False,
        channels: None = None,
        stacked: bool = False,
        fix_fingers: bool | str = False,
        xmin_max: float | None = None,
        max_fingers: int = MAX_FINGERS,
        finger_thresh: float = FINGER_THRESH,
        fit: str | TailFit = "PL",
        sparsify: bool = True,
        detX: bool = False,
        ERG: bool = False,
        svd_method: str = "fast",
        tolerance: float = TOLERANCE,
        start_ids: int = 0,
        pl_package: str = "ww",
        xmax: int | str | None = None,
        base_model: Source | None = None,
        peft: bool | str = False,
        inverse: bool = False,
    ) -> pd.DataFrame:
        """Measure every layer; one row each.

        Args:
            model: The model, if it is not that of the constructor.
            layers: Which layers; see the class.
            min_evals: Layers with fewer eigenvalues are left out; 0 for no limit.
            max_evals: Layers with more are left out; 0 for no limit.
            min_size: Not supported, as all arguments that this list calls so.
            max_size: Not supported.
            max_N: Layers whose larger dimension is above are left out; 0 for no limit.
            glorot_fix: Not supported.
            plot: Draw figures of every layer into the folder `savefig`; nothing is shown.
            randomize: Also shuffle each matrix and count its correlation traps; a number above one
                is that of the shuffles.
            savefig: The folder; True for "ww-img".
            mp_fit: Also fit the random bulk: True, or a fit such as `ww_train.KernelMP()`.
            conv2d_norm: Multiply the weights of convolutions by `sqrt(1/2)`.
            ww2x: The same as `pool=False`.
            pool: Pool the slices of a convolution; otherwise each has a row.
            conv2d_fft: Not supported.
            fft: Not supported.
            deltas: Also draw the level spacings.
            intra: Not supported.
            vectors: Also measure the localisation of the eigenvectors.
            channels: Not supported.
            stacked: Not supported.
            fix_fingers: "clip_xmax" or "xmin_peak".
            xmin_max: Upper limit of xmin, of "xmin_peak".
            max_fingers: Most eigenvalues that "clip_xmax" removes.
            finger_thresh: Fall of alpha for which it does.
            fit: "PL", "TPL" or "E_TPL", or a fit such as `ww_train.PowerLaw()`.
            sparsify: Not supported.
            detX: Also give the columns of the ERG condition.
            ERG: The same.
            svd_method: "fast", or "accurate" for the smallest eigenvalues.
            tolerance: Of `weak_rank_loss`, relative to the largest eigenvalue; 0 for the default.
            start_ids: The first id.
            pl_package: "ww"; "powerlaw" is accepted where WeightWatcher needs it.
            xmax: Number of top eigenvalues to leave out of the fit.
            base_model: Measure the difference to this model's layers of the same names.
            peft: True for the LoRA updates only; "with_base" for weights, updates and sums.
            inverse: Measure the spectrum of the inverse.

        Returns:
            WeightWatcher's columns; NaN where it has -1. Layers without a row are in
            `attrs["skipped"]` with the reason.

        Raises:
            ValueError: If an argument is not supported or there is no such layer; says what to do.
            OSError: If the folder cannot be written.

        Cost: see `ww_train.measure`.
        """
        refuse(min_size=min_size, max_size=max_size, glorot_fix=glorot_fix, fft=fft, intra=intra)
        refuse(conv2d_fft=conv2d_fft, channels=channels, stacked=stacked, sparsify=sparsify)
        folder = figure_folder(plot, savefig, deltas)
        solver = eigensolver(svd_method)
        tail = tail_fit(
            fit,
            fix_fingers=fix_fingers,
            xmin_max=xmin_max,
            max_fingers=max_fingers,
            finger_thresh=finger_thresh,
            pl_package=pl_package,
            xmax=xmax,
        )
        pool, erg = pool and not ww2x, detX or ERG
        base = self.base_model if base_model is None else base_model
        found = self._layers(model, layers, start_ids, base, peft, conv2d_norm=conv2d_norm)
        if folder is not None:
            check_drawing(folder)
        report = measure(
            [layer.matrix for layer in found],
            base_model=None if peft else base,
            pool=pool,
            inverse=inverse,
            fit=tail,
            mp_fit=mp_fit,
            randomize=randomize,
            vectors=vectors,
            min_evals=limit("min_evals", min_evals) or 0,
            max_evals=limit("max_evals", max_evals),
            max_N=limit("max_N", max_N),
            eigensolver=solver,
            progress=self._verbose,
        )
        if not report.layers:
            warnings.warn(f"no layer could be analysed ({reasons(report.skipped)})", stacklevel=2)
        self.figures = []
        if folder is not None:
            figures = partial(analysis_figures, erg=erg, deltas=deltas)
            self.figures = save_figures(report, found, folder, draw=figures)
            self._say(f"{len(self.figures)} figures in {folder}")
        self.report = report
        self.details = details_table(
            report, found, erg=erg, pool=pool, peft=bool(peft), tolerance=tolerance or TOLERANCE
        )
        return self.details

    def get_details(self) -> pd.DataFrame:
        """The table of the last `analyze`.

        Raises:
            ValueError: If there was none.
        """
        if self.details is None:
            raise ValueError("nothing was analysed yet: call analyze() first")
        return self.details

    def get_summary(self, details: pd.DataFrame | None = None) -> dict[str, float]:
        """Means over the layers of the columns `SUMMARY`, as far as they were measured.

        Args:
            details: Some rows of a table of `analyze`; the last one by default. Layers without a
                number are left out of its mean.

        Raises:
            ValueError: If nothing was analysed.
        """
        table = self.get_details() if details is None else details
        return {name: float(table[name].mean()) for name in SUMMARY if name in table.columns}

    def describe(
        self,
        model: Source | None = None,
        layers: PeerLayers | None = (),
        min_evals: int | None = MIN_EVALS,
        max_evals: int | None = MAX_EVALS,
        *,
        min_size: None = None,
        max_size: None = None,
        max_N: int | None = MAX_N,
        glorot_fix: bool = False,
        savefig: str = FOLDER,
        ww2x: bool = False,
        pool: bool = True,
        conv2d_fft: bool = False,
        fft: bool = False,
        conv2d_norm: bool = True,
        intra: bool = False,
        channels: None = None,
        stacked: bool = False,
        start_ids: int = 0,
        base_model: Source | None = None,
        peft: bool | str = False,
    ) -> pd.DataFrame:
        """What `analyze` would analyse, from shapes alone.

        Takes the arguments of `analyze` that choose layers.

        Returns:
            layer_id, name, M, N, Q, layer_type, longname, num_evals, rf and, if not pooled, slice_id;
            the layers that would be left out are in `attrs["skipped"]` with the reason.
        """
        refuse(min_size=min_size, max_size=max_size, glorot_fix=glorot_fix, fft=fft, intra=intra)
        refuse(conv2d_fft=conv2d_fft, channels=channels, stacked=stacked)
        refuse(savefig=savefig, conv2d_norm=conv2d_norm)
        base = self.base_model if base_model is None else base_model
        return description(
            self._layers(model, layers, start_ids, base, peft),
            base_model=None if peft else base,
            pool=pool and not ww2x,
            min_evals=limit("min_evals", min_evals) or 0,
            max_evals=limit("max_evals", max_evals),
            max_N=limit("max_N", max_N),
        )

    def get_ESD(
        self,
        model: Source | None = None,
        layer: int | str | None = None,
        random: bool = False,
        params: None = None,
    ) -> Array:
        """The eigenvalues of one layer, ascending, in the units of the column `xmin`.

        Args:
            model: The model, if it is not that of the constructor.
            layer: Id or name; by default the first layer.
            random: Those of the shuffled matrix instead, in which `analyze(randomize=True)` counts
                traps.
            params: Not supported.

        Raises:
            ValueError: If there is no such layer or it cannot be decomposed; says why.
        """
        refuse(params=params)
        first = self._layer(model, layer)
        report = measure([first.matrix], min_evals=0, max_evals=None, randomize=random)
        if not report.layers:
            raise ValueError(f"layer {first.longname}: {report.skipped[0].reason}")
        (measured,) = report
        return (measured.shuffled or measured.spectrum).evals

    def get_Weights(
        self,
        model: Source | None = None,
        layer: int | str | None = None,
        params: None = None,
    ) -> list[Array]:
        """The weights of one layer as a list of `(rows, cols)` float64 arrays, one for each slice.

        Takes the arguments of `get_ESD`.
        """
        refuse(params=params)
        matrix = self._layer(model, layer).matrix
        if not isinstance(matrix, WeightMatrix):
            raise ValueError(f"layer {matrix.name}: {matrix.reason}")
        loaded = matrix.loaded()
        return [
            np.asarray(part.stack[0].detach().double().cpu().numpy()) for part in slices(loaded)
        ]

    def distances(
        self,
        model_1: Source,
        model_2: Source,
        method: str = "raw",
        layers: PeerLayers | None = (),
        *,
        start_ids: int = 0,
        pool: bool = True,
        channels: None = None,
    ) -> tuple[float, float, pd.DataFrame]:
        """How far the layers of two models are apart.

        Args:
            model_1: The first model.
            model_2: The second; layers are matched by name.
            method: "raw", the Frobenius norm of the difference; "euclidean", its mean over the slices
                of a convolution; or "cka", a similarity, 1 for equal layers.
            layers: Which layers of the first model.
            start_ids: The first id.
            pool: Otherwise one row for each slice.
            channels: Not supported.

        Returns:
            The means of `delta_W` and `delta_b`, and the table; see
            `ww_train.weightwatcher.distances.distance_table`.

        Raises:
            ValueError: If the models have no layer in common.
        """
        refuse(channels=channels)
        found = within_limits(chosen_layers(numbered_layers(model_1, start_ids), layers))
        table = distance_table(model_1, found, model_2, method=method, pool=pool)
        return float(table["delta_W"].mean()), float(table["delta_b"].mean()), table
