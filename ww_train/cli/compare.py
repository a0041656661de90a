"""The command `ww-train compare`."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

import torch

from ww_train import exports
from ww_train.cli.output import check_outputs, exported, failed, named, show_columns, skipped_rows
from ww_train.cli.source import first_process, source
from ww_train.comparing.comparison import Comparison
from ww_train.comparing.comparison import compare as compare_models
from ww_train.tables import printable
from ww_train.weights.matrices import reasons

if TYPE_CHECKING:
    import pandas as pd

COMPARED = (
    "longname",
    "layer_type",
    "N",
    "M",
    "relative_delta",
    "alpha_base",
    "alpha_finetuned",
    "alpha_change",
    "alpha_of_delta",
    "log_norm_change",
    "stable_rank_change",
)
"""Columns of a comparison, from left to right."""

COMPARED_IMPORTANCE = (
    "alpha_base",
    "alpha_finetuned",
    "relative_delta",
    "alpha_change",
    "alpha_of_delta",
    "log_norm_change",
    "stable_rank_change",
    "layer_type",
    "N",
    "M",
)
"""Which of these stay the longest."""


def compare(args: Namespace) -> int:
    """Measure what changed between two models; print and write it."""
    check_outputs(args)
    if args.metrics_summary is not None:
        exports.check(args.metrics_summary)
    _check_conditions(args)
    both = compare_models(
        source(args.base, args.device),
        source(args.finetuned, args.device),
        layers=args.layers,
        types=tuple(args.types),
        progress=args.progress and first_process(),
    )
    frame = both.to_dataframe()
    if not len(frame):
        skipped = (*both.base.skipped, *both.finetuned.skipped)
        raise ValueError(f"no layer could be compared ({reasons(skipped)})")
    if not first_process():
        return 0
    if args.metrics_summary is not None:
        both.write_metrics_summary(args.metrics_summary)
    if not exported(args, frame, _comparison(both, frame)):
        show_columns(args, frame, COMPARED, COMPARED_IMPORTANCE)
        print(_changes(both, frame))
    return failed(args.fail_if, frame)


def _check_conditions(args: Namespace) -> None:
    """Raise ValueError for a column that no comparison has, before any time is spent."""
    if args.fail_if:
        noise = torch.Generator().manual_seed(0)
        pair = [torch.randn(32, 24, generator=noise) for _ in range(2)]
        sample = compare_models(*pair).to_dataframe()
        for condition in args.fail_if:
            condition.check(sample)


def _comparison(both: Comparison, frame: pd.DataFrame) -> dict[str, object]:
    """The comparison as an object for JSON."""
    skipped = (*both.matching.unreadable, *both.base.skipped, *both.finetuned.skipped)
    return {
        "layers": exports.rows(frame),
        "summary": both.metrics_summary()["weightwatcher"],
        "reading": [reading.sentence for reading in both.reading()],
        "missing": list(both.matching.missing),
        "extra": list(both.matching.extra),
        "reshaped": skipped_rows(both.matching.reshaped),
        "skipped": skipped_rows(skipped),
    }


def _changes(both: Comparison, frame: pd.DataFrame) -> str:
    """Below the table of a comparison: what the changes mean, and which layers have no partner."""
    lines = [reading.sentence for reading in both.reading()] or ["no mean changed"]
    matching = both.matching
    for word, names in (
        ("only in the base model", list(matching.missing)),
        ("only in the fine-tuned model", list(matching.extra)),
        ("of another shape", [layer.name for layer in matching.reshaped]),
        ("unchanged", list(frame.longname[frame.relative_delta == 0.0])),
    ):
        if names:
            lines.append(printable(f"{word}, {len(names)}: {named(names)}"))
    return "\n".join(lines)
