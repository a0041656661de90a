"""Measure a model: `measure` gives a `Report` of plain numbers, `analyze` a pandas DataFrame."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ww_train.confidence import confidence
from ww_train.decomposition import decompose
from ww_train.divergence import jensen_shannon_distance
from ww_train.erg import erg_tail
from ww_train.linalg import Eigensolver, gram_eigenvalues, svd_eigenvalues
from ww_train.localization import vector_metrics
from ww_train.marchenko_pastur import BulkFit, fit_mp
from ww_train.planning import Plan, by_name, plan_layer, selected
from ww_train.power_law import TailFit, fit_power_law
from ww_train.report import LayerReport, Report
from ww_train.selection import Layers
from ww_train.spectrum import Array, Spectrum
from ww_train.trap_causes import TrapCause, trap_causes
from ww_train.traps import average_traps, count_traps
from ww_train.weights.matrices import (
    NOT_FINITE,
    Skipped,
    Source,
    WeightMatrix,
    reasons,
    slices,
)

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
    min_evals: int = 8,
    max_evals: int | None = 15000,
    max_N: int | None = None,
    eigensolver: Eigensolver | None = None,
    spectra: Mapping[str, Spectrum] | None = None,
    progress: bool = False,
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

    Returns:
        The report; layers that cannot be analysed are in `skipped` with the reason.

    Raises:
        TypeError: If `model` is none of the accepted kinds.
        CheckpointError: If a file or folder cannot be read; a ValueError.
        ValueError: If a layer or type that was asked for does not exist, or options contradict.

    Cost: for an N x M layer `N M² + (4/3) M³` float64 operations on the layer's device, twice that
    with `randomize`; see `ww_train.decomposition.decompose` for how they are scheduled. Of a file every
    weight is read once, and the weights of one large layer and of the next are in memory. Sharded
    weights are gathered one by one; every process of their mesh must call this.
    """
    if inverse and (randomize or mp_fit or vectors):
        raise ValueError(
            "inverse=True has no random bulk, traps or vectors; measure them without it"
        )
    skipped: list[tuple[int, Skipped]] = []
    plans: list[Plan] = []
    base = None if base_model is None else by_name(base_model, pool)
    for layer_id, matrix in selected(model, layers, types):
        for part in [matrix] if pool or isinstance(matrix, Skipped) else slices(matrix):
            plan = plan_layer(layer_id, part, base, min_evals, max_evals, max_N)
            if isinstance(plan, Skipped):
                skipped.append((layer_id, plan))
            else:
                plans.append(plan)
    known = spectra or {}
    shuffles = range(seed, seed + int(randomize))
    jobs = [plan.job(shuffles, own=plan.matrix.name not in known) for plan in plans]
    solver = eigensolver or (svd_eigenvalues if inverse else gram_eigenvalues)
    measured: dict[int, LayerReport] = {}
    bar = tqdm(total=len(jobs), unit="layer", delay=1, disable=not progress or None)
    with bar, torch.no_grad(), closing(decompose(jobs, solver)) as solved:
        for position, evals in solved:
            plan = plans[position]
            bar.set_postfix_str(plan.matrix.name, refresh=False)
            bar.update()
            reason = plan.failure
            if reason is None and plan.matrix.name not in known:
                reason = _malformed(evals[0], plan.base)
            if reason is not None:
                skipped.append((plan.layer_id, Skipped(plan.matrix.name, reason)))
                continue
            own = known.get(plan.matrix.name)
            if own is None:
                own, evals = plan.spectrum(evals[0]), evals[1:]
            own = own.inverse() if inverse else own
            report = _fitted(plan, own, fit)
            if mp_fit:
                with suppress(ValueError):  # no bulk to be found: no columns, as for any failed fit
                    report = replace(report, mp=(fit_mp if mp_fit is True else mp_fit)(own))
            if evals:
                report = _randomized(plan, report, evals, seed)
            if vectors:
                xmin = report.fit.xmin if report.fit else math.inf
                report = replace(report, localization=vector_metrics(plan.weights(), xmin))
            if replicates and report.fit:
                sure = confidence(own.positive, fit, replicates=replicates, seed=seed)
                report = replace(report, confidence=sure)
            measured[position] = report
    return Report(
        tuple(measured[position] for position in sorted(measured)),
        tuple(layer for _, layer in sorted(skipped, key=lambda pair: pair[0])),
    )


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
    min_evals: int = 8,
    max_evals: int | None = 15000,
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


def _fitted(plan: Plan, own: Spectrum, fit: TailFit) -> LayerReport:
    """The layer's report with what every layer has: the tails of the power law and of the ERG."""
    tail = fit(own.positive)
    if tail and (tail.alpha - 1.0) * own.resolution > 1.0:
        tail = None  # all of the tail is one eigenvalue, spread by rounding
    m = plan.matrix
    erg = erg_tail(own, tail)
    return LayerReport(plan.layer_id, m.name, m.layer_type, own, tail, erg, slice_id=m.slice_id)


def _randomized(plan: Plan, report: LayerReport, shuffles: list[Tensor], seed: int) -> LayerReport:
    """The report with what the layer's shuffles tell."""
    first = plan.spectrum(shuffles[0])
    return replace(
        report,
        **_traps(plan, shuffles, seed),
        shuffled=first,
        rand_distance=jensen_shannon_distance(report.spectrum.evals, first.evals),
    )


def _traps(plan: Plan, shuffles: list[Tensor], seed: int) -> dict[str, Any]:
    """Traps of each shuffle, and for the first one their causes, slice by slice."""
    traps = [
        count_traps(plan.spectrum(evals), seed + i, [plan.spectrum(part[None]) for part in evals])
        for i, evals in enumerate(shuffles)
    ]
    causes: list[TrapCause] = []
    if traps[0].num_traps:
        for i, part in enumerate(slices(plan.weights())):
            causes += [replace(cause, slice_id=i) for cause in trap_causes(part)]
    return {
        "traps": traps[0],
        "trap_average": average_traps(traps) if len(traps) > 1 else None,
        "trap_causes": tuple(sorted(causes, key=lambda cause: -cause.theta)),
    }


def _malformed(evals: Tensor, base: WeightMatrix | None) -> str | None:
    top = float(evals.max())  # NaN if there is one
    if math.isnan(top) or (math.isfinite(top) and math.isinf(float(evals.sum()))):
        return NOT_FINITE
    if math.isinf(top):
        return "the eigenvalue solver failed"
    if top > 0.0:
        return None
    if base is not None:
        return "identical to the base model"
    return "all weights are zero, or so small that their squares are"
