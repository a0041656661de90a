"""The figures of a training run for a logger: which there are, and their pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ww_train import Report
from ww_train.report import worst_first

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WORST = 3
"""How many layers have their spectrum drawn if none are named."""

WIDTH, HEIGHT, DPI = 4.6, 3.4, 140
"""In inches: small, so that text can be read on TensorBoard's cards, which are 350 pixels wide."""

MAP_HEIGHT = 0.012
"""Inches that a layer adds to the height of a heat map, up to twice the height."""


def figures(
    report: Report, history: Sequence[Mapping[str, float]], layers: Sequence[str] = ()
) -> dict[str, Callable[[], Figure]]:
    """Functions that draw the figures of a report, by tag; each takes 0.1 to 0.3 s.

    Args:
        report: The latest numbers of every layer.
        history: Records of all boundaries so far, with "epoch".
        layers: Layers whose spectra are drawn; the worst if there are none.
    """
    return {
        "ww_figures/alpha_histogram": lambda: _plots().alpha_histogram(report, ax=_axes()),
        "ww_figures/correlation_flow": lambda: _plots().correlation_flow(report, ax=_axes()),
        "ww_figures/heat_map": lambda: _heat_map(report, history),
        **(_named(report, layers) if layers else _worst(report)),
    }


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """A figure as `(height, width, 3)`; `SummaryWriter.add_figure` would import pyplot."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _plots() -> ModuleType:
    from ww_train import plots

    return plots


def _axes(height: float = HEIGHT) -> Axes:
    """Axes of a figure that pyplot does not know."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _heat_map(report: Report, history: Sequence[Mapping[str, float]]) -> Figure:
    height = HEIGHT * min(1.0 + MAP_HEIGHT * len(report), 2.0)
    figure: Figure = _plots().heat_map(history, ax=_axes(height))
    return figure


def _named(report: Report, names: Sequence[str]) -> dict[str, Callable[[], Figure]]:
    return {f"ww_spectra/{name}": partial(_spectrum, report, name) for name in names}


def _worst(report: Report) -> dict[str, Callable[[], Figure]]:
    """Tags by rank: from epoch to epoch other layers are the worst."""
    return {
        f"ww_spectra/worst_{i}": partial(_spectrum, report, layer.name)
        for i, layer in enumerate(worst_first(report)[:WORST], start=1)
    }


def _spectrum(report: Report, name: str) -> Figure:
    figure: Figure = _plots().esd(report[name], ax=_axes())
    return figure
