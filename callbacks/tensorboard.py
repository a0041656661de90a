"""`Board`: the spectra of a model on one TensorBoard page, readable with 3 layers and with 300."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ww_train import Report
from ww_train.power_law import UNDER_TRAINED

from .figures import figures, pixels
from .layouts import FEW, alphas, bands, chosen, layout
from .panel import panel

FIRST_FIGURES = 2.0
"""Seconds that the first figures are expected to take: Matplotlib is imported for them."""

EDGES = np.arange(0.0, 2.0 * UNDER_TRAINED + 0.1, 0.25)
"""Bins of the histogram of alpha; layers beyond count in the last."""


def power_of_two(count: int) -> bool:
    """Whether figures are due at this boundary: 1, 2, 4, 8... TensorBoard keeps ten images a tag."""
    return count > 0 and count & (count - 1) == 0


class Board:
    """Writes spectra to one `SummaryWriter`: numbers, and what can be seen of a `Report`.

    * `ww/`: the summaries, at most 12.
    * `ww_alpha/<layer>`, `ww_erg_gap/<layer>` and so on: a group a metric, up to 64 layers; with more
      layers only alpha, with more than 1024 none.
    * `ww_bands/`, `ww_hist/alpha`: quantiles and a histogram over more than 12 layers.
    * The page "Custom scalars": the bands, all layers in one chart, layers of one kind in one chart.
    * `ww_figures/`: spectra with their fits, correlation flow, histogram of alpha, heat map of layers
      and epochs; drawn when due, if they cost at most half of what may be spent, and at the end.
    * `ww/summary` under "Text": verdict, worst layers, advice, configuration; when figures are due.

    If figures cannot be drawn, as without Matplotlib, there is one warning and all else is written.

    Args:
        writer: A `SummaryWriter` of PyTorch or tensorboardX; or a folder, in which one is made at the
            first numbers.
        layers: Names of layers whose spectra are drawn; by default the worst.
        due: Tells from the number of records in the history whether figures are due.
        clock: Seconds that only increase.
    """

    def __init__(
        self,
        writer: Any,
        *,
        layers: Sequence[str] = (),
        due: Callable[[int], bool] = power_of_two,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._folder = os.fspath(writer) if isinstance(writer, str | os.PathLike) else None
        self.writer = None if self._folder is not None else writer
        self.layers = tuple(layers)
        self.due = due
        self.clock = clock
        self._count = 0  # layers of the model
        self._metrics: set[str] = set()
        self._laid_out = False
        self._cost = FIRST_FIGURES
        self._owed = False  # figures were due, and too expensive
        self._seen = self._told = self._drawn = 0  # records at the last overview, text, figures
        self._warned = False

    def __call__(self, scalars: Mapping[str, float], step: int) -> None:
        """Add scalars at this step: those that TensorBoard can show of so many layers."""
        tags = [tag.partition("/") for tag in scalars if not tag.startswith("ww/")]
        self._metrics |= {group.removeprefix("ww_") for group, _, _ in tags}
        layers = len({name for _, _, name in tags})
        self._count = max(self._count, int(scalars.get("ww/num_layers", 0)), layers)
        self._add_scalars(chosen(scalars, self._count), step)
        self._open().flush()

    def log_report(
        self,
        report: Report,
        history: Sequence[Mapping[str, float]],
        epoch: int,
        step: int,
        *,
        settings: Mapping[str, Any] | None = None,
        seconds: float = float("inf"),
        last: bool = False,
    ) -> None:
        """Add what is seen of a report: bands, histogram, and if they are due text and figures.

        Args:
            report: The latest numbers of every layer.
            history: Records of all boundaries so far, with "epoch". Nothing is written twice for the
                same number of them.
            epoch: Number of epochs finished.
            step: Step of the scalars.
            settings: Options of the monitor, for the text.
            seconds: What may be spent now. Figures that are due and too expensive are drawn later.
            last: Whether training has ended: everything is drawn, whatever it costs.
        """
        if not report.layers:
            return
        writer = self._open()
        if not self._laid_out and (epoch or last or len(history) > 1):  # all metrics were seen
            writer.add_custom_scalars(layout([layer.name for layer in report], self._metrics))
            self._laid_out = True
        records = len(history)
        due = last or self.due(records)
        if records != self._seen:
            self._seen = records
            self._overview(report, step)
        if due and records != self._told:
            self._told = records
            text = panel(report, epoch=epoch, step=step, settings=settings)
            writer.add_text("ww/summary", text, step)
        self._owed = (self._owed or due) and records != self._drawn
        if self._owed and (last or self._cost <= seconds / 2):
            self._owed, self._drawn = False, records
            self._draw(report, history, step)
        writer.flush()

    def close(self) -> None:
        """Close the writer if it was made here."""
        if self._folder is not None and self.writer is not None:
            writer, self.writer = self.writer, None
            writer.close()

    def _open(self) -> Any:
        if self.writer is None:
            assert self._folder is not None
            self.writer = _summary_writer(self._folder)
        return self.writer

    def _add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        writer = self._open()
        for tag, value in scalars.items():
            writer.add_scalar(tag, float(value), step)

    def _overview(self, report: Report, step: int) -> None:
        self._add_scalars(bands(report), step)
        values = np.clip(alphas(report), EDGES[0], EDGES[-1])
        if len(report) > FEW and len(values):
            self._open().add_histogram("ww_hist/alpha", values, step, bins=EDGES)

    def _draw(self, report: Report, history: Sequence[Mapping[str, float]], step: int) -> None:
        """Draw and add the figures; one that cannot be drawn is left out."""
        started = self.clock()
        for tag, make in figures(report, history, self.layers).items():
            try:
                image = pixels(make())
            except Exception as error:
                self._warn(f"no figure {tag} for TensorBoard: {error}")
                continue
            self._open().add_image(tag, image, step, dataformats="HWC")
        self._cost = self.clock() - started

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=2)


def _summary_writer(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "TensorBoard is not installed: pip install tensorboard, or log to a .csv file"
        ) from error
    return SummaryWriter(folder)
