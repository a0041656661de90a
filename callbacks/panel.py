"""The spectra of a model as a text for TensorBoard: verdict, worst layers, advice, configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ww_train import LayerReport, Report
from ww_train.report import worst_first
from ww_train.verdicts import FINE

ROWS = 20
"""Layers that are listed; of more, the worst."""

ADVICE = 5
"""Layers for which it is said what to do."""

HEADER = ("layer", "alpha", "ERG gap", "traps", "verdict")


def panel(
    report: Report, *, epoch: int, step: int, settings: Mapping[str, Any] | None = None
) -> str:
    """Verdict, what to do, a table of the worst layers, and the options, in Markdown.

    Args:
        report: The latest numbers of every layer.
        epoch: Number of epochs finished.
        step: Step of the loggers.
        settings: Options of the monitor; left out if empty.
    """
    layers = worst_first(report)
    advice = [f"* {escaped(x.advice)}" for x in layers[:ADVICE] if x.verdict not in FINE]
    parts = [
        f"**{report.verdict}** after epoch {epoch}, step {step}",
        "\n".join(advice),
        table(HEADER, [_row(layer) for layer in layers[:ROWS]]),
    ]
    if len(layers) > ROWS:
        parts.append(f"and {len(layers) - ROWS} more layers, none worse")
    if report.skipped:
        parts.append(
            f"{len(report.skipped)} layers were not measured, the first: {_skipped(report)}"
        )
    if settings:
        rows = [(name, str(value)) for name, value in settings.items()]
        parts += ["Options of the monitor:", table(("option", "value"), rows)]
    return "\n\n".join(part for part in parts if part)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; whatever is in the cells is shown as it is."""
    lines = [header, ["---"] * len(header), *[[escaped(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Text on one line in which nothing is Markdown or HTML."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|>~])", r"\\\1", line)


def _row(layer: LayerReport) -> list[str]:
    return [
        layer.name,
        "-" if layer.alpha is None else f"{layer.alpha:.2f}",
        "-" if layer.ERG_gap is None else str(layer.ERG_gap),
        "-" if layer.num_traps is None else str(layer.num_traps),
        layer.verdict,
    ]


def _skipped(report: Report) -> str:
    first = report.skipped[0]
    return escaped(f"{first.name}, {first.reason}")
