"""The figures of `WeightWatcher`'s `plot=True`, as files under WeightWatcher's names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ww_train import exports
from ww_train.report import LayerReport, Report
from ww_train.weightwatcher.layers import NumberedLayer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[LayerReport], "Figure"]

Figures = Callable[[LayerReport], Iterator[tuple[str, Draw]]]
"""WeightWatcher's names of the figures of a layer, and what draws each."""


def check_drawing(folder: str) -> None:
    """Make the folder, and fail now rather than after the analysis.

    Raises:
        ModuleNotFoundError: If Matplotlib is missing.
        OSError: If the folder cannot be made.
    """
    from ww_train import plots  # noqa: F401

    Path(folder).mkdir(parents=True, exist_ok=True)


def save_figures(
    report: Report,
    layers: Sequence[NumberedLayer],
    folder: str,
    *,
    draw: Figures,
) -> list[Path]:
    """Draw every layer into `ww.layer<id>.<figure>.png`; nothing is shown or left open.

    After the id comes "-" and the slice for slices, and the last part of the name where several
    matrices share an id.

    Args:
        report: What was measured of these layers.
        layers: The layers, in the order in which they were measured.
        folder: Where to write; existing files of these names are replaced.
        draw: Which figures: `analysis_figures` or `shuffled_figures`.

    Returns:
        The files.
    """
    shared = Counter((layers[row.layer_id].layer_id, row.slice_id) for row in report)
    paths = []
    for row in report:
        number = layers[row.layer_id].layer_id
        plot_id = str(number) if row.slice_id is None else f"{number}-{row.slice_id}"
        if shared[number, row.slice_id] > 1:
            plot_id += f"-{row.name.rpartition('.')[2]}"
        for name, figure in draw(row):
            path = Path(folder) / f"ww.layer{plot_id}.{name}.png"
            with exports.replacing(path) as temporary:
                figure(row).savefig(temporary, format="png")
            paths.append(path)
    return paths


def analysis_figures(layer: LayerReport, *, erg: bool, deltas: bool) -> Iterator[tuple[str, Draw]]:
    """What was measured of a layer; with `erg` the ERG condition, with `deltas` level spacings."""
    from ww_train import plots

    yield "esd", plots.esd
    yield "esd2", plots.esd_linear
    yield "esd3", plots.esd_semilog
    yield "esd4", plots.xmin_scan
    if layer.mp:
        yield "mpfit2", plots.mp_fit
    if layer.shuffled:
        yield "randesd2", plots.randomized_esd
    if erg:
        yield "detX", plots.detX
    if deltas:
        yield "level-stats", plots.level_spacings
    if layer.localization:
        yield "vector_metrics", plots.vector_metrics


def shuffled_figures(layer: LayerReport) -> Iterator[tuple[str, Draw]]:
    """The random bulk of the shuffled layer; its spikes are correlation traps."""
    from ww_train import plots

    if layer.shuffled and layer.traps:
        name = f"{layer.name}, shuffled"
        shuffled = replace(layer, name=name, spectrum=layer.shuffled, mp=layer.traps.mp)
        yield "mpfit2", lambda _: plots.mp_fit(shuffled)
