"""What a person wants to read when training has ended: the layers, the verdict, the cost."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from ww_train import LayerReport, Report
from ww_train.verdicts import WORST_FIRST

from .budget import GRANT

ROWS = 20
"""Layers that are shown; of more, the worst."""

SMALL = 0.01
"""Share of the training time, that of the default budget, up to which none is explained."""

HEADER = ("layer", "alpha at start", "at end", "ERG gap", "traps", "verdict")


@dataclass(frozen=True, eq=False)
class Summary:
    """A training run in a table.

    Attributes:
        report: The latest numbers of every layer.
        first: Alpha of each layer when it was first measured.
        measured: Step at which each layer was last measured.
        step: The last step.
        seconds: How long training waited for watching.
        overhead: The same as a fraction of the training time; None if nothing was trained.
        beside: What was measured in the background meanwhile, in seconds.
    """

    report: Report
    first: Mapping[str, float | None]
    measured: Mapping[str, int]
    step: int
    seconds: float
    overhead: float | None
    beside: float = 0.0

    def rows(self) -> list[tuple[str, ...]]:
        """One row a layer: the worst verdicts first, among equal ones in model order."""
        order = {word: i for i, word in enumerate(WORST_FIRST)}
        return [self._row(x) for x in sorted(self.report, key=lambda x: order[x.verdict])]

    def footer(self) -> list[str]:
        """The lines below the table."""
        lines = [f"and {len(self.report) - ROWS} more"] if len(self.report) > ROWS else []
        if any(self.measured.get(layer.name, self.step) != self.step for layer in self.report):
            lines.append(f"* measured before the last step, {self.step}, to stay within the budget")
        share = "" if self.overhead is None else f", {100 * self.overhead:.1f} % of training time"
        if self.overhead is not None and self.overhead > SMALL and self.seconds <= GRANT:
            share += f" ({GRANT:g} s is granted to short runs)"
        beside = f"; {self.beside:.1f} s in the background" if self.beside else ""
        return [
            *lines,
            f"the model: {self.report.verdict}",
            f"watching took {self.seconds:.1f} s{share}{beside}",
        ]

    def text(self) -> str:
        """Plain text, for files and pipes."""
        table = [HEADER, *self.rows()[:ROWS]]
        widths = [max(len(row[i]) for row in table) for i in range(len(HEADER))]
        lines = [_line(row, widths) for row in table]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *self.footer()])

    def show(self, stream: TextIO | None = None) -> None:
        """Print it: a table with colours on a terminal, plain text elsewhere."""
        stream = sys.stdout if stream is None else stream
        if stream.isatty():
            self._show_rich(stream)
        else:
            print(self.text(), file=stream)

    def _row(self, layer: LayerReport) -> tuple[str, ...]:
        stale = self.measured.get(layer.name, self.step) != self.step
        return (
            layer.name,
            _number(self.first.get(layer.name)),
            _number(layer.alpha) + ("*" if stale else ""),
            _number(layer.ERG_gap),
            _number(layer.num_traps),
            layer.verdict,
        )

    def _show_rich(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(*HEADER, title="Spectra of the layers")
        for column in table.columns[1:5]:
            column.justify = "right"
        for row in self.rows()[:ROWS]:
            table.add_row(*map(escape, row), style=_STYLES.get(row[-1]))
        console = Console(file=stream)
        console.print(table)
        for line in self.footer():
            console.print(line, markup=False, highlight=False)


_STYLES = {
    "trapped": "red",
    "over-trained": "red",
    "random-like": "cyan",
    "under-trained": "yellow",
    "critical": "green",
}


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
    return "  ".join([*cells, row[-1].ljust(widths[-1])])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
