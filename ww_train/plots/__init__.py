"""All figures: of one layer, of a model, and of training. Needs Matplotlib.

    from ww_train import measure, plots

    report = measure(model, randomize=True)
    plots.correlation_flow(report).savefig("flow.png")
    plots.esd(report["fc1"]).savefig("fc1.png")

Figures are neither shown nor registered with pyplot; a notebook shows what a cell returns.
"""

from __future__ import annotations

try:
    from ww_train.plots.model import (
        alpha_histogram,
        alpha_vs_alpha,
        alpha_vs_rand_distance,
        compare_models,
        correlation_flow,
    )
    from ww_train.plots.noise import level_spacings, mp_fit, randomized_esd
    from ww_train.plots.spectrum import detX, esd, esd_linear, esd_semilog, xmin_scan
    from ww_train.plots.training import heat_map, training_curves
    from ww_train.plots.vectors import vector_metrics
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "matplotlib":
        raise
    raise ModuleNotFoundError(
        "ww_train.plots needs Matplotlib: pip install 'ww-train[plots]'", name=error.name
    ) from error

__all__ = [
    "alpha_histogram",
    "alpha_vs_alpha",
    "alpha_vs_rand_distance",
    "compare_models",
    "correlation_flow",
    "detX",
    "esd",
    "esd_linear",
    "esd_semilog",
    "heat_map",
    "level_spacings",
    "mp_fit",
    "randomized_esd",
    "training_curves",
    "vector_metrics",
    "xmin_scan",
]
