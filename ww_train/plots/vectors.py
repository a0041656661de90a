"""Figure of the eigenvectors of one layer: how spread they are, against vectors of noise."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ww_train.localization import (
    information_entropy,
    localization_ratio,
    participation_ratio,
    vector_entropy,
)
from ww_train.plots.style import (
    BLUE,
    FAINT,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    dress,
    figure_of,
    legend_below,
    message,
    new_axes,
    title_of,
    vertical,
)
from ww_train.plots.ticks import log_scale
from ww_train.report import LayerReport
from ww_train.spectrum import Array


def vector_metrics(layer: LayerReport, *, ax: Axes | None = None) -> Figure:
    """How spread the eigenvectors are, relative to Gaussian vectors, against their eigenvalues.

    One is spread like noise; below it few coordinates carry the vector. Dots are eigenvectors, lines
    their running median; the tail is right of xmin.

    Raises:
        ValueError: If the layer was not measured with `measure(..., vectors=True)`.
    """
    if layer.localization is None:
        raise ValueError(
            f"{layer.name} has no eigenvector metrics: measure it with measure(..., vectors=True)"
        )
    ax = new_axes(ax)
    if layer.spectrum.M < 2:
        return message(ax, "vectors of one coordinate", title=title_of(layer))
    found = layer.localization
    above = found.evals > layer.spectrum.floor
    evals = found.evals[above]
    vectors = torch.from_numpy(np.random.default_rng(0).standard_normal((layer.spectrum.M, 64)))
    for name, color, values, metric in (
        ("histogram entropy", GREEN, found.vec_entropy, vector_entropy),
        ("localisation ratio", BLUE, found.loc_ratio, localization_ratio),
        ("participation ratio", ORANGE, found.part_ratio, participation_ratio),
        ("information entropy", PURPLE, found.info_entropy, information_entropy),
    ):
        relative = values[above] / float(metric(vectors).mean())
        ax.plot(evals, relative, ".", color=color, markersize=2.5, alpha=0.35)
        ax.plot(evals, _running_median(relative), color=color, linewidth=1.4, label=name)
    ax.axhline(1.0, color=FAINT, linewidth=0.8)
    if layer.fit is not None:
        vertical(ax, layer.fit.xmin, "xmin", color=RED)
    log_scale(ax)
    ax.set_ylim(bottom=0.0)
    facts = f"{found.num_tail} of {len(found.evals)} eigenvectors in the tail"
    dress(ax, title=title_of(layer), facts=facts, x="eigenvalue λ", y="spread / that of noise")
    legend_below(ax)
    return figure_of(ax)


def _running_median(values: Array) -> Array:
    half = max(1, len(values) // 40)
    medians = [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    return np.array(medians, dtype=np.float64)
