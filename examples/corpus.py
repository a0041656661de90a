"""The texts of the examples, as characters: Shakespeare from a folder, and what ships with Python.

Python's own source text is always there, and so is the reference manual that `help()` shows, which
is English prose. They differ a little between versions of Python.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

FILE = "tinyshakespeare.txt"

CHARACTERS = 128
"""ASCII; any other character becomes a question mark."""

SOURCE_SIZE = 1_000_000
"""Characters of source text that are used."""

Text = tuple[str, Tensor]
"""A name and the characters as integers."""


def shakespeare(data_dir: str | None = None) -> Text:
    """`tinyshakespeare.txt` of a folder; without one Python's reference manual, and a line says so.

    The file is looked for in `data_dir`, else in WW_TRAIN_TEXT (either a file or a folder), which
    must have it; else in the folder WW_TRAIN_DATA or the current one, which may have other data.
    """
    place = data_dir or os.environ.get("WW_TRAIN_TEXT")
    path = _file(Path(place or os.environ.get("WW_TRAIN_DATA") or "."))
    if path.is_file():
        return "shakespeare", encode(path.read_text(encoding="utf-8"))
    if place:
        raise SystemExit(f"no text in {place}: expected the file {FILE} (about 1.1 MB)")
    print(f"no {FILE} (--data-dir or WW_TRAIN_TEXT): Python's reference manual is used instead")
    return manual()


def manual() -> Text:
    """Python's reference manual."""
    from pydoc_data.topics import topics

    return "manual", encode("\n\n".join(topics[name] for name in sorted(topics)))


def source() -> Text:
    """Python's own source text: the first modules of the standard library by name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for path in sorted(folder.glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= SOURCE_SIZE:
            break
    if not text:
        raise SystemExit(f"no text in {folder}: expected the source text of Python's own modules")
    return "source", encode(text[:SOURCE_SIZE])


def encode(text: str) -> Tensor:
    """Integers below `CHARACTERS`."""
    return torch.tensor(list(text.encode("ascii", "replace")), dtype=torch.int64)


def split(text: Tensor) -> tuple[Tensor, Tensor]:
    """The first nine tenths, to train on, and the rest."""
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def _file(place: Path) -> Path:
    return place / FILE if place.is_dir() else place
