"""What an example leaves behind: a figure, and a table with the command and versions that made it."""

from __future__ import annotations

import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

import ww_train

FOLDERS = ("WW_TRAIN_TEXT", "WW_TRAIN_DATA")
"""Variables that say where data are."""


def save(
    out: Path, figure: Figure, frame: pd.DataFrame, finding: str, *, seed: int, device: str = "cpu"
) -> None:
    """Print the table and the finding; write `<script>.png` and `<script>.md` into a folder."""
    name = Path(sys.argv[0]).stem
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"{name}.png")
    report = f"# {name}\n\n{finding}\n\n{markdown(frame)}\n\n{origin(seed, device)}\n"
    (out / f"{name}.md").write_text(report, encoding="utf-8")
    print(f"\n{frame.to_string(index=False, float_format='%.3g')}\n\n{finding}")
    print(f"\nfigure and table: {out / name}.png and .md")


def markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown; a dash where there is no number."""
    rows = [list(frame.columns), ["---"] * len(frame.columns)]
    rows += [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def origin(seed: int, device: str) -> str:
    """How to get the same again, and what it took."""
    data = " and ".join(name for name in FOLDERS if os.environ.get(name))
    command = shlex.join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    machine = f"{os.cpu_count()} CPU cores" if device == "cpu" else device
    versions = f"Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}"
    versions += f", ww_train {ww_train.__version__}"
    return (
        f"`{command}` (seed {seed}): {versions}, {machine}, "
        f"{time.process_time() / 60:.1f} minutes of processor time"
        f"{f', {data} set' if data else ''}."
    )


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return "–" if math.isnan(value) else f"{value:.4g}"
