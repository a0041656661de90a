"""WeightWatcher's column names, and what stands under them."""

from __future__ import annotations

from typing import TypeAlias

from ww_train.erg import ErgTail
from ww_train.marchenko_pastur import MPFit
from ww_train.power_law import PowerLawFit
from ww_train.spectrum import Spectrum
from ww_train.traps import Traps

Row: TypeAlias = "dict[str, float | int | str | bool | None]"


def fit_columns(fit: PowerLawFit | None, s: Spectrum) -> Row:
    """Tail fit; all None without one."""
    if fit is None:
        names = ("alpha", "D", "sigma", "xmin", "xmax", "num_pl_spikes")
        return dict.fromkeys((*names, "alpha_weighted", "log_alpha_norm"))
    row: Row = {
        "alpha": fit.alpha,
        "D": fit.D,
        "sigma": fit.sigma,
        "xmin": fit.xmin,
        "xmax": fit.xmax,
        "num_pl_spikes": fit.num_pl_spikes,
        "alpha_weighted": fit.alpha * s.log_spectral_norm,
        "log_alpha_norm": s.log_alpha_norm(fit.alpha),
    }
    optional = {
        "Lambda": fit.Lambda,
        "num_fingers": fit.num_fingers,
        "raw_alpha": fit.raw_alpha,
    }
    return row | {name: value for name, value in optional.items() if value is not None}


def erg_columns(erg: ErgTail) -> Row:
    """ERG condition."""
    return {
        "detX_num": erg.detX_num,
        "num_ERG_spikes": erg.detX_num,
        "detX_val": erg.detX_val,
        "ERG_gap": erg.ERG_gap,
        "trace_log": erg.trace_log,
    }


def norm_columns(s: Spectrum) -> Row:
    """Norms, ranks and entropy."""
    return {
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


def mp_columns(mp: MPFit, s: Spectrum) -> Row:
    """Random bulk of the spectrum."""
    return {
        "num_spikes": mp.num_spikes,
        "sigma_mp": mp.sigma_mp,
        "mp_softrank": mp.bulk_max / s.lambda_max,
        "bulk_min": mp.bulk_min,
        "bulk_max": mp.bulk_max,
        "W_scale": (len(s.evals) / s.norm) ** 0.5,
    }


def trap_columns(traps: Traps, s: Spectrum) -> Row:
    """Shuffled matrix, against the spectrum itself."""
    mp = traps.mp
    return {
        "num_traps": traps.num_traps,
        "rand_num_spikes": traps.num_traps,
        "max_rand_eval": traps.max_rand_eval,
        "rand_bulk_min": mp.bulk_min,
        "rand_bulk_max": mp.bulk_max,
        "rand_sigma_mp": mp.sigma_mp,
        "rand_mp_softrank": mp.bulk_max / traps.max_rand_eval,
        "rand_W_scale": (len(s.evals) / s.norm) ** 0.5,
        "ww_softrank": traps.max_rand_eval / s.lambda_max,
        "ww_maxdist": s.lambda_max - traps.max_rand_eval,
    }
