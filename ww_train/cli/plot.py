"""The command `ww-train plot`."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from tqdm.auto import tqdm

from ww_train import exports
from ww_train.cli.source import first_process, measured
from ww_train.report import LayerReport, Report
from ww_train.tables import printable

FIGURES: Mapping[str, str] = {
    "alpha_histogram": "alpha of all layers, with the safe zone",
    "correlation_flow": "alpha against depth",
    "alpha_vs_rand_distance": "alpha against the distance to random",
    "esd": "each layer: eigenvalues on two logarithmic axes, with the power law",
    "esd_linear": "each layer: eigenvalues on linear axes",
    "esd_semilog": "each layer: eigenvalues on a logarithmic axis",
    "xmin_scan": "each layer: D and alpha against the start of the tail",
    "mp_fit": "each layer: the random bulk",
    "randomized_esd": "each layer: against its shuffled weights",
    "detX": "each layer: where the trace-log condition and the power law put the tail",
    "level_spacings": "each layer: distances between neighbouring eigenvalues",
}
"""What `plot` can draw: names of `ww_train.plots`, and what they show."""

MODEL_FIGURES = ("alpha_histogram", "correlation_flow", "alpha_vs_rand_distance")
"""Figures of the whole model; the others are drawn of each layer."""


def plot(args: Namespace) -> int:
    """Draw figures of a model and of its layers into a folder."""
    from ww_train import plots

    folder = Path(args.output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} exists and is no folder; name another")
    figures = args.figure or ["alpha_histogram", "correlation_flow", "esd"]
    args.mp_fit |= "mp_fit" in figures
    args.randomize |= not {"randomized_esd", "alpha_vs_rand_distance"}.isdisjoint(figures)
    report = measured(args)
    if not first_process():
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    drawings: list[tuple[str, Report | LayerReport, str]]
    drawings = [(name, report, name) for name in figures if name in MODEL_FIGURES]
    for layer in report:
        stem = f"{layer.layer_id:04d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', layer.name)[:100]}"
        drawings += [
            (name, layer, f"{stem}-{name}") for name in figures if name not in MODEL_FIGURES
        ]
    for name, drawn, stem in tqdm(drawings, "drawing", disable=not args.progress or None):
        with exports.replacing(folder / f"{stem}.{args.format}") as path:
            getattr(plots, name)(drawn).savefig(path, format=args.format)
    print(f"{len(drawings)} figures in {printable(str(folder))}")
    return 0
