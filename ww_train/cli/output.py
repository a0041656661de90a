"""Where the results of `ww-train` go: files, and the conditions that decide on the exit code."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ww_train import exports
from ww_train.cli.conditions import Condition
from ww_train.tables import printable, show
from ww_train.weights.matrices import Skipped

if TYPE_CHECKING:
    import pandas as pd

NAMED = 5
"""So many layers are named in one line before it says how many more there are."""


def check_outputs(args: Namespace) -> None:
    """Raise OSError for an output that cannot be written, before any time is spent."""
    paths = [path for path in (args.json, args.csv, args.parquet) if path is not None]
    if paths.count(exports.STDOUT) > 1:
        raise ValueError("only one of --json, --csv and --parquet can go to standard output")
    for path in paths:
        exports.check(path)


def exported(args: Namespace, frame: pd.DataFrame, document: Mapping[str, Any]) -> bool:
    """Write the files that were asked for; whether one of them is standard output."""
    contents: Sequence[tuple[str | None, Callable[[], bytes]]] = (
        (args.json, lambda: exports.to_json(document)),
        (args.csv, lambda: exports.to_csv(frame)),
        (args.parquet, lambda: exports.to_parquet(frame)),
    )
    for path, content in contents:
        if path is not None:
            exports.write_bytes(content(), path)
    return exports.STDOUT in (args.json, args.csv, args.parquet)


def show_columns(
    args: Namespace, frame: pd.DataFrame, columns: Sequence[str], importance: Sequence[str]
) -> None:
    """Print the columns that fit, or with --wide all that there are, the usual ones first."""
    if args.wide:
        rest = [str(name) for name in frame.columns if name not in columns]
        show(frame, [*columns, *rest])
    else:
        show(frame, columns, importance)


def failed(conditions: Iterable[Condition], frame: pd.DataFrame, skipped: Iterable[Skipped]) -> int:
    """1 if a condition is met, after saying on standard error by what; else 0."""
    code = 0
    unmeasured = list({layer.name: f"{layer.name} ({layer.reason})" for layer in skipped}.values())
    for condition in conditions:
        of_skipped = condition.of_skipped
        met = condition.met_by_skipped(unmeasured) if of_skipped else condition.met_by(frame)
        if met:
            code = 1
            print(f"ww-train: {condition}: {printable(named(met))}", file=sys.stderr)
    return code


def named(things: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(things) - NAMED} more" if len(things) > NAMED else ""
    return ", ".join(things[:NAMED]) + more


def skipped_rows(skipped: Iterable[Skipped]) -> list[dict[str, str]]:
    """Layers that were left out, for JSON."""
    return [{"name": layer.name, "reason": layer.reason} for layer in skipped]
