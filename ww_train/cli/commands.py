"""Commands of `ww-train`: each takes the parsed arguments and gives the exit code."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from ww_train import exports
from ww_train.analysis import describe as describe_layers
from ww_train.cli.output import check_outputs, exported, failed, show_columns, skipped_rows
from ww_train.cli.source import check_conditions, first_process, measured, source
from ww_train.editing.smoothing import smooth_checkpoint
from ww_train.page import write_page
from ww_train.report import Report
from ww_train.tables import printable, show, text
from ww_train.weights.matrices import reasons

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "longname",
    "layer_type",
    "N",
    "M",
    "alpha",
    "D",
    "num_pl_spikes",
    "ERG_gap",
    "num_traps",
    "verdict",
    "alpha_weighted",
    "log_norm",
    "stable_rank",
    "rand_distance",
)
"""Columns of the table, from left to right."""

IMPORTANCE = (
    "alpha",
    "verdict",
    "D",
    "num_traps",
    "ERG_gap",
    "num_pl_spikes",
    "layer_type",
    "N",
    "M",
    "alpha_weighted",
    "log_norm",
    "stable_rank",
    "rand_distance",
)
"""Which columns stay the longest where there is little room."""


def analyze(args: Namespace) -> int:
    """Measure a model; print and write its layers."""
    check_outputs(args)
    check_conditions(args)
    report = measured(args)
    if not first_process():
        return 0
    frame = _table(report)
    document = {
        "layers": exports.rows(frame),
        "skipped": skipped_rows(report.skipped),
        "summary": report.summary(),
    }
    if not exported(args, frame, document):
        show_columns(args, frame, COLUMNS, IMPORTANCE)
        print(_summary(report))
    return failed(args.fail_if, frame, report.skipped)


def describe(args: Namespace) -> int:
    """List the layers of a model."""
    check_outputs(args)
    if not first_process():
        return 0
    model = source(args.path, None, args.adapter)
    frame = describe_layers(model, layers=args.layers, types=tuple(args.types))
    if not len(frame):
        raise ValueError(f"{args.path}: there is no matrix in it")
    if not exported(args, frame, {"layers": exports.rows(frame)}):
        shown = ("longname", "layer_type", "N", "M", "num_evals", "skipped")
        show_columns(args, frame, shown, ("layer_type", "num_evals", "N", "M"))
    return 0


def report(args: Namespace) -> int:
    """Write the report page of a model."""
    if args.output != exports.STDOUT:
        exports.check(args.output)
    check_conditions(args)
    found = measured(args)
    if not first_process():
        return 0
    title = args.title or Path(args.path).resolve().name
    write_page(found, args.output, title=title, date=args.date, options=args.invocation)
    if args.output != exports.STDOUT:
        print(f"{found.verdict}\n{printable(args.output)} is the page")
    return failed(args.fail_if, _table(found), found.skipped)


def smooth(args: Namespace) -> int:
    """Write a copy of a model with smoothed weights."""
    if not first_process():
        return 0
    edits = smooth_checkpoint(
        args.path, args.output, rule=args.rule, layers=args.layers, types=tuple(args.types)
    )
    frame = edits.to_dataframe()
    if len(frame):
        show(frame, list(frame.columns), ("rank_after", "energy_kept", "distance", "rank_before"))
    if edits.skipped:
        print(f"left alone {len(edits.skipped)}: {printable(reasons(edits.skipped))}")
    print(f"{printable(args.output)} is the copy, with {len(frame)} smoothed layers")
    return 0


def _table(report: Report) -> pd.DataFrame:
    """The columns of the report, and the verdicts."""
    frame = report.to_dataframe()
    frame["verdict"] = [layer.verdict for layer in report]
    return frame


def _summary(report: Report) -> str:
    """Below the table: the verdict on the model, the means, and what was skipped."""
    means = [f"{name} {text(value, name)}" for name, value in report.summary().items()]
    lines = [report.verdict, f"means: {', '.join(means)}"]
    if report.skipped:
        lines.append(f"skipped {len(report.skipped)}: {printable(reasons(report.skipped))}")
    return "\n".join(lines)
