"""Measure a model: `measure` gives a `Report` of plain numbers, `analyze` a pandas DataFrame."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from ww_train.dealing import read_dealt
from ww_train.linalg import Eigensolver, gram_eigenvalues, svd_eigenvalues
from ww_train.marchenko_pastur import BulkFit, fit_mp
from ww_train.measurement import Measurement
from ww_train.planning import MAX_EVALS, MIN_EVALS, Plan, by_name, plan_layer, selected
from ww_train.power_law import TailFit, fit_power_law
from ww_train.ranks import on_device, together
from ww_train.report import LayerReport, Report
from ww_train.selection import Layers
from ww_train.spectrum import Array, Spectrum
from ww_train.weights.matrices import Skipped, Source, WeightMatrix, reasons, slices

if TYPE_CHECKING:
    import pandas as pd


def measure(
    model: Source,
    *,
    layers: Layers = None,
    types: str | tuple[str, ...] = (),
    base_model: Source | None = None,
    pool: bool = True,
    inverse: bool = False,
    fit: TailFit = fit_power_law,
    mp_fit: bool | BulkFit = False,
    randomize: int = False,
    vectors: bool = False,
    replicates: int = 0,
    seed: int = 0,
    min_evals: int = MIN_EVALS,
    max_evals: int | None = MAX_EVALS,
    max_N: int | None = None,
    eigensolver: Eigensolver | None = None,
    spectra: Mapping[str, Spectrum] | None = None,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Report:
    """Measure the spectrum of every layer of a model. Changes nothing, uses no global generator.

    Args:
        model: A module, a state dict or a single matrix (Tensor or ndarray), on any device; a file or
            folder of weights, read layer by layer; or a list of what `weight_matrices` gives, such as
            `merge(base, adapter)`.
        layers: Which layers, by name, glob, regular expression or position (`ww_train.selection`).
        types: Which types of layers, such as "dense" or "conv2d".
        base_model: Measure the difference to this model's layers of the same names instead.
        pool: Pool the slices of a convolution into one spectrum; otherwise each is a layer.
        inverse: Measure the spectrum of the inverse, 1/lambda, of the positive eigenvalues.
        fit: How to fit the tail: `fit_power_law`, `PowerLaw(...)`, `ClipXmax(...)`, `XminPeak(...)`,
            `TruncatedPowerLaw()` or a function of your own.
        mp_fit: Also fit the random bulk: True for `fit_mp`, or `KernelMP()` and the like.
        randomize: Also shuffle each matrix and count its correlation traps, and name their causes;
            about doubles the cost. A number of shuffles above one adds the average over them.
        vectors: Also measure the localisation of the eigenvectors; about quadruples the cost.
        replicates: Also give alpha a bootstrap interval and a p-value from this many replicates.
        seed: Seed of the shuffles and the bootstrap.
        min_evals: Layers with fewer eigenvalues are skipped.
        max_evals: Layers with more are skipped; None for no limit.
        max_N: Layers whose larger dimension is above are skipped; None for no limit.
        eigensolver: Arithmetic: `ww_train.linalg.gram_eigenvalues`, `svd_eigenvalues` (exact for tiny
            eigenvalues) or `float32_eigenvalues` (fast, rough). By default the first, and for the
            inverse, where the smallest eigenvalues become the largest, the second.
        spectra: Spectra that are known already, by layer name, such as those of a projection
            (`Projected.after`): these layers are not decomposed again.
        progress: Show a progress bar with the layer's name on standard error if it is a terminal.
        group: Processes that share the work, dealt by cost: each calls this with the same model and
            arguments, and all get the same report.

    Returns:
        The report; layers that cannot be analysed are in `skipped` with the reason.

    Raises:
        TypeError: If `model` is none of the accepted kinds, or `fit` or `mp_fit` no function.
        CheckpointError: If a file or folder cannot be read; a ValueError.
        ValueError: If a layer or type that was asked for does not exist, or options contradict.
        RuntimeError: On every process of the group, if one of them failed.

    Cost: for an N x M layer `N M² + (4/3) M³` float64 operations on the layer's device, twice that
    with `randomize`; see `ww_train.decomposition.decompose` for how they are scheduled. Of a file every
    weight is read once, and the weights of one large layer and of the next are in memory. Sharded
    weights are gathered one by one; every process of their mesh must call this.
    """
    if inverse and (randomize or mp_fit or vectors):
        raise ValueError(
            "inverse=True has no random bulk, traps or vectors; measure them without it"
        )
    bounds = (min_evals, max_evals, max_N)
    _check_tail_fit(fit)
    bulk_fit = _bulk_fit(mp_fit)
    tensors = model.parameters() if isinstance(model, nn.Module) else ()
    with on_device(tensor.device for tensor in tensors):
        plans, skipped = together(
            lambda: _planned(model, layers, types, base_model, pool, bounds), group
        )
    measurement = Measurement(
        fit=fit,
        mp_fit=bulk_fit,
        randomize=int(randomize),
        vectors=vectors,
        replicates=replicates,
        seed=seed,
        inverse=inverse,
        eigensolver=eigensolver or (svd_eigenvalues if inverse else gram_eigenvalues),
        known=spectra or {},
        progress=progress,
    )
    outcomes = read_dealt(plans, measurement.costs(plans), measurement.take, group)
    for plan, outcome in zip(plans, outcomes, strict=True):
        if isinstance(outcome, Skipped):
            skipped.append((plan.layer_id, outcome))
    return Report(
        tuple(outcome for outcome in outcomes if isinstance(outcome, LayerReport)),
        tuple(layer for _, layer in sorted(skipped, key=lambda pair: pair[0])),
    )


def _check_tail_fit(fit: object) -> None:
    # a class can be called with a spectrum too, and would take it for an option
    if not callable(fit) or isinstance(fit, type):
        raise TypeError(
            "fit= is a function of the eigenvalues, such as fit_power_law, PowerLaw() or "
            f"TruncatedPowerLaw() of ww_train, got {fit!r}"
        )


def _bulk_fit(mp_fit: bool | BulkFit | None) -> BulkFit | None:
    if mp_fit in (True, False, None):
        return fit_mp if mp_fit else None
    if not callable(mp_fit) or isinstance(mp_fit, type):
        raise TypeError(
            "mp_fit= is True or False, or a function of the spectrum, such as EnergyMP() or "
            f"KernelMP() of ww_train, got {mp_fit!r}"
        )
    return mp_fit


def _planned(
    model: Source,
    layers: Layers,
    types: str | tuple[str, ...],
    base_model: Source | None,
    pool: bool,
    bounds: tuple[int, int | None, int | None],
) -> tuple[list[Plan], list[tuple[int, Skipped]]]:
    """What is to be measured, and what is not and why, with its position."""
    plans: list[Plan] = []
    skipped: list[tuple[int, Skipped]] = []
    base = None if base_model is None else by_name(base_model, pool)
    for layer_id, matrix in selected(model, layers, types):
        for part in [matrix] if pool or isinstance(matrix, Skipped) else slices(matrix):
            plan = plan_layer(layer_id, part, base, *bounds)
            if isinstance(plan, Skipped):
                skipped.append((layer_id, plan))
            else:
                plans.append(plan)
    return plans, skipped


def analyze(model: Source, *, progress: bool = True, **options: Any) -> pd.DataFrame:
    """Measure a model and return a pandas DataFrame with WeightWatcher's column names.

    Takes all the arguments of `measure`. The ERG columns are always there. Skipped layers and the
    reasons are in `frame.attrs["skipped"]`; if nothing could be analysed a warning lists them.
    """
    report = measure(model, progress=progress, **options)
    if not report.layers:
        warnings.warn(f"no layer could be analysed ({reasons(report.skipped)})", stacklevel=2)
    return report.to_dataframe()


def describe(
    model: Source,
    *,
    layers: Layers = None,
    types: str | tuple[str, ...] = (),
    min_evals: int = MIN_EVALS,
    max_evals: int | None = MAX_EVALS,
    max_N: int | None = None,
) -> pd.DataFrame:
    """What `analyze` would analyse, without decomposing anything; of a file only headers are read.

    Takes the arguments of `measure` that choose layers.

    Returns:
        One row for each matrix: layer_id, longname, layer_type, N, M, Q, rf, num_evals, and `skipped`,
        the reason why it would not be analysed or "".
    """
    import pandas as pd

    rows = []
    for layer_id, matrix in selected(model, layers, types):
        plan = plan_layer(layer_id, matrix, None, min_evals, max_evals, max_N)
        row = {"layer_id": layer_id, "longname": matrix.name}
        if isinstance(matrix, WeightMatrix):
            row |= {
                "layer_type": matrix.layer_type,
                "N": matrix.N,
                "M": matrix.M,
                "Q": matrix.N / matrix.M,
                "rf": matrix.rf,
                "num_evals": matrix.num_evals,
            }
        rows.append(row | {"skipped": plan.reason if isinstance(plan, Skipped) else ""})
    return pd.DataFrame(rows)


def esd(model: Source, layer: str | int) -> Array:
    """The eigenvalues of one layer, ascending: WeightWatcher's `get_ESD`.

    Args:
        model: As in `measure`.
        layer: Name or position; layers below `min_evals` can be had too.

    Raises:
        ValueError: If there is no such layer or it cannot be decomposed; says why.
    """
    report = measure(model, layers=layer, min_evals=1, max_evals=None)
    if not report.layers:
        raise ValueError(f"layer {layer!r}: {report.skipped[0].reason}")
    return report.layers[0].spectrum.evals
