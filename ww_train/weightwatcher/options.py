"""WeightWatcher's arguments in the terms of this library: fits, solvers and rules instead of words.

Arguments that have no meaning here, or that WeightWatcher ignores, are refused with the alternative.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ww_train.editing.rules import (
    DETX_TAIL,
    AboveBulk,
    Bottom,
    DetXTail,
    Kept,
    PowerLawTail,
    Rule,
    Top,
)
from ww_train.fingers import ClipXmax, XminPeak
from ww_train.linalg import Eigensolver, svd_eigenvalues
from ww_train.power_law import UNDER_TRAINED, PowerLaw, TailFit, fit_power_law
from ww_train.spectrum import Spectrum
from ww_train.truncated import TruncatedPowerLaw

FOLDER = "ww-img"
"""Where figures go."""

MAX_FINGERS, FINGER_THRESH, PERCENT = 10, 1.0, 0.8
"""Defaults of arguments that belong to one method only."""

REFUSED: Mapping[str, tuple[object, str]] = {
    "framework": (None, "it is found out from the model: leave it out"),
    "min_size": (None, "WeightWatcher ignores it: use min_evals="),
    "max_size": (None, "WeightWatcher ignores it: use max_evals="),
    "glorot_fix": (False, "it has no effect in WeightWatcher: leave it out"),
    "conv2d_fft": (
        False,
        "WeightWatcher keeps the real part of the transformed kernel only: leave it out, "
        "or use pool=False for one row a kernel position",
    ),
    "fft": (False, "it never worked in WeightWatcher: leave it out"),
    "intra": (
        False,
        "which layers follow each other is in the forward pass, not in the weights: "
        "analyse the product that you mean, ww_train.analyze(second.weight @ first.weight)",
    ),
    "sparsify": (True, "it belongs to intra=True, which is not offered: leave it out"),
    "stacked": (
        False,
        "the result depends on the order of hidden units: leave it out, "
        "get_summary() has the means over the layers",
    ),
    "channels": (None, "PyTorch has one layout of channels: leave it out"),
    "params": (None, "pass what you want to change to analyze()"),
    "plot": (False, "WeightWatcher draws nothing here: use analyze(plot=True) before and after"),
    "savefig": (FOLDER, "describe() draws nothing: use analyze(plot=True, savefig=...)"),
    "conv2d_norm": (True, "describe() decomposes nothing: pass it to analyze()"),
    "pool": (True, "slices of a convolution are one layer here, as in WeightWatcher: leave it out"),
}
"""Arguments without a meaning: the value that says nothing, and what to do instead of others."""


def refuse(**given: object) -> None:
    """Check that arguments of `REFUSED` say nothing.

    Raises:
        ValueError: If one says something; with the alternative.
    """
    for name, value in given.items():
        default, alternative = REFUSED[name]
        # as WeightWatcher, which asks whether they are true: zero, None and False say nothing
        if value != default and not (not default and not value):
            raise ValueError(f"{name}={value!r} is not supported: {alternative}")


def refuse_framework(framework: str | None) -> None:
    """Accept PyTorch's name, which WeightWatcher has as a constant, and nothing else."""
    if not (isinstance(framework, str) and framework.lower() == "pytorch"):
        refuse(framework=framework)


def verbose(log_level: int | str | None) -> bool:
    """Whether a level lets information pass; None does.

    Raises:
        ValueError: If there is no such level.
    """
    return log_level is None or logging.Logger("level", log_level).level <= logging.INFO


def figure_folder(plot: bool, savefig: bool | str, deltas: bool) -> str | None:
    """The folder for figures, or None if none are asked for.

    Raises:
        ValueError: If figures are asked for without a folder, or a folder or figure without `plot`.
    """
    if not isinstance(savefig, bool | str) or savefig == "":
        raise ValueError(f"savefig is the name of a folder, got {savefig!r}")
    if not plot:
        if deltas:
            raise ValueError("deltas=True draws level spacings: add plot=True")
        if savefig not in (FOLDER, True, False):
            raise ValueError(f"savefig={savefig!r} saves the figures of plot=True: add plot=True")
        return None
    if savefig is False:
        raise ValueError(
            "figures are saved and never shown: name a folder, savefig='figures', "
            "or draw with ww_train.plots from watcher.report"
        )
    return FOLDER if savefig is True else savefig


def limit(name: str, value: int | None) -> int | None:
    """A limit of `measure`: WeightWatcher's zero, and None, are no limit."""
    if value is not None and value < 0:
        raise ValueError(f"{name} is a number, or 0 for no limit, got {value}")
    return value or None


def eigensolver(svd_method: str) -> Eigensolver | None:
    """The arithmetic of "fast", which is the default here, or "accurate"."""
    if svd_method not in ("fast", "accurate"):
        raise ValueError(f'svd_method is "fast" or "accurate", got {svd_method!r}')
    return svd_eigenvalues if svd_method == "accurate" else None


def tail_fit(
    fit: str | TailFit,
    *,
    fix_fingers: bool | str = False,
    xmin_max: float | None = None,
    max_fingers: int = MAX_FINGERS,
    finger_thresh: float = FINGER_THRESH,
    pl_package: str = "ww",
    xmax: int | str | bool | None = None,
) -> TailFit:
    """The fit that WeightWatcher's seven arguments describe.

    Args:
        fit: "PL", "TPL", "E_TPL", or a fit of this library, which excludes the others.
        fix_fingers: False, "xmin_peak" or "clip_xmax".
        xmin_max: Upper limit of xmin, of "xmin_peak" and "E_TPL".
        max_fingers: Most eigenvalues that "clip_xmax" removes.
        finger_thresh: Fall of alpha for which it does.
        pl_package: "ww"; "powerlaw" too where WeightWatcher needs that package.
        xmax: Number of top eigenvalues to leave out, of either sign.

    Raises:
        ValueError: If a word is unknown, or an argument does not belong to the others.
    """
    if callable(fit):
        if fix_fingers or xmax or xmin_max or pl_package != "ww":
            raise ValueError("a fit of your own has options of its own: pass them to it")
        return fit
    kind = {"power_law": "PL", "truncated_power_law": "TPL"}.get(fit, fit)
    if kind not in ("PL", "TPL", "E_TPL"):
        raise ValueError(
            f'fit is "PL", "TPL" or "E_TPL", or a fit such as ww_train.PowerLaw(), got {fit!r}'
        )
    if fix_fingers not in (False, None, "xmin_peak", "clip_xmax"):
        raise ValueError(f'fix_fingers is False, "xmin_peak" or "clip_xmax", got {fix_fingers!r}')
    peak = fix_fingers == "xmin_peak" or kind == "E_TPL"
    clip = fix_fingers == "clip_xmax"
    _check_package(pl_package, needed=kind != "PL" or bool(fix_fingers))
    if peak and clip:
        raise ValueError('fit="E_TPL" has fingers fixed by "xmin_peak": use fit="TPL"')
    if xmin_max is not None and not peak:
        raise ValueError('xmin_max belongs to fix_fingers="xmin_peak": add it')
    if not clip and (max_fingers != MAX_FINGERS or finger_thresh != FINGER_THRESH):
        raise ValueError('max_fingers and finger_thresh belong to fix_fingers="clip_xmax": add it')
    dropped = _dropped(xmax)
    if dropped and (peak or clip):
        raise ValueError("xmax=k and fixed fingers both leave out eigenvalues: use one of them")
    tail: TailFit = PowerLaw(drop_top=dropped) if dropped else fit_power_law
    if peak:
        tail = XminPeak(xmin_max)
    elif clip:
        tail = ClipXmax(max_fingers, finger_thresh)
    return tail if kind == "PL" else TruncatedPowerLaw(tail)


def smoothing_rule(method: str, percent: float, fit: str | TailFit) -> Rule:
    """Which singular values SVDSmoothing keeps.

    Args:
        method: "detX", "alpha_min", "rmt", "svd" or "auto".
        percent: Share that "svd" keeps; below zero, the share of the largest that it deletes.
        fit: Of "alpha_min".

    Raises:
        ValueError: If the method is unknown or an argument does not belong to it.
    """
    if method != "svd" and percent != PERCENT:
        raise ValueError(f'percent belongs to method="svd": {method!r} finds the number by itself')
    if method != "alpha_min" and fit != "PL":
        raise ValueError('fit belongs to method="alpha_min"')
    if method == "alpha_min":
        return PowerLawTail(tail_fit(fit))
    if method == "svd":
        return Top(percent) if percent > 0 else Bottom(1.0 + percent)
    rules: dict[str, Rule] = {"detX": DetXTail(), "rmt": AboveBulk(), "auto": by_alpha}
    if method not in rules:
        raise ValueError(f'method is "detX", "alpha_min", "rmt", "svd" or "auto", got {method!r}')
    return rules[method]


def by_alpha(spectrum: Spectrum, /) -> Kept:
    """Keep what lies above the random bulk where alpha is above 6, else the ERG tail ("auto")."""
    tail = fit_power_law(spectrum.positive)
    under_trained = tail is not None and tail.alpha > UNDER_TRAINED
    return AboveBulk()(spectrum) if under_trained else DETX_TAIL(spectrum)


def _check_package(pl_package: str, *, needed: bool) -> None:
    if pl_package not in ("ww", "powerlaw"):
        raise ValueError(f'pl_package is "ww" or "powerlaw", got {pl_package!r}')
    if pl_package == "powerlaw" and not needed:
        raise ValueError(
            'pl_package="powerlaw" is not supported for fit="PL": leave it out, or pass fit= a '
            "function from eigenvalues to a PowerLawFit"
        )


def _dropped(xmax: int | str | bool | None) -> int:
    """How many top eigenvalues `xmax` leaves out."""
    if xmax is None or xmax is False:
        return 0
    if xmax == "force":
        raise ValueError('xmax="force" is not supported: the tail reaches to the largest anyway')
    if isinstance(xmax, bool | str) or not xmax == int(xmax) != 0:
        raise ValueError(f"xmax is a number of top eigenvalues to leave out, got {xmax!r}")
    return abs(int(xmax))
