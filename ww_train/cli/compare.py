"""The command `ww-train compare`."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

import torch

from ww_train import exports
from ww_train.cli.output import check_outputs, exported, failed, named, show_columns, skipped_rows
from ww_train.cli.source import first_process, is_adapter, source
from ww_train.comparing.comparison import Comparison
from ww_train.comparing.comparison import compare as compare_models
from ww_train.comparing.distances import distances
from ww_train.tables import printable
from ww_train.weights.matrices import Skipped, Source, reasons

if TYPE_CHECKING:
    import pandas as pd

DISTANCES = ("frobenius", "spectral", "cka", "left_overlap", "right_overlap")
"""Columns that --distances adds; with --wide and in files also `MORE_DISTANCES`."""

MORE_DISTANCES = ("cosine", "cka_centred", "num_tail", "esd_distance")

COMPARED = (
    "longname",
    "layer_type",
    "N",
    "M",
    "relative_delta",
    *DISTANCES,
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
    *DISTANCES,
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
    base = source(args.base, args.device)
    adapted = is_adapter(args.finetuned)
    if adapted:
        finetuned = source(args.base, args.device, args.finetuned)
    else:
        finetuned = source(args.finetuned, args.device)
    both = compare_models(
        base,
        finetuned,
        layers=args.layers,
        types=tuple(args.types),
        progress=args.progress and first_process(),
    )
    frame = both.to_dataframe()
    if not len(frame):
        skipped = (*both.base.skipped, *both.finetuned.skipped)
        raise ValueError(f"no layer could be compared ({reasons(skipped)})")
    if args.distances:
        frame = _with_distances(frame, base, finetuned)
    if not first_process():
        return 0
    if args.metrics_summary is not None:
        both.write_metrics_summary(args.metrics_summary)
    if not exported(args, frame, _comparison(both, frame)):
        show_columns(args, frame, COMPARED, COMPARED_IMPORTANCE)
        print(_changes(both, frame))
        if adapted:
            print(printable(f"{args.finetuned} is a LoRA adapter: it was merged into the base"))
    return failed(args.fail_if, frame, _skipped(both))


def _check_conditions(args: Namespace) -> None:
    """Raise ValueError for a column that this comparison lacks, before any time is spent."""
    if args.fail_if:
        noise = torch.Generator().manual_seed(0)
        pair = [torch.randn(32, 24, generator=noise) for _ in range(2)]
        sample = compare_models(*pair).to_dataframe()
        if args.distances:
            sample = _with_distances(sample, *pair)
        for condition in args.fail_if:
            if not args.distances and condition.column in (*DISTANCES, *MORE_DISTANCES):
                raise ValueError(f"condition {condition}: {condition.column} needs --distances")
            condition.check(sample)


def _with_distances(frame: pd.DataFrame, base: Source, finetuned: Source) -> pd.DataFrame:
    """The table of a comparison with the distances of its layers."""
    found = distances(base, finetuned, layers=list(frame.longname)).to_dataframe()
    columns = [*DISTANCES, *MORE_DISTANCES]
    joined = frame.join(found.set_index("name")[columns], on="longname")
    return joined.astype(dict.fromkeys(columns, float))


def _comparison(both: Comparison, frame: pd.DataFrame) -> dict[str, object]:
    """The comparison as an object for JSON."""
    return {
        "layers": exports.rows(frame),
        "summary": both.metrics_summary()["weightwatcher"],
        "reading": [reading.sentence for reading in both.reading()],
        "missing": list(both.matching.missing),
        "extra": list(both.matching.extra),
        "reshaped": skipped_rows(both.matching.reshaped),
        "skipped": skipped_rows(_skipped(both)),
    }


def _skipped(both: Comparison) -> list[Skipped]:
    """The layers of both models that could not be measured in one of them."""
    return [*both.matching.unreadable, *both.base.skipped, *both.finetuned.skipped]


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
