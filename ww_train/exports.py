"""Tables as JSON, CSV and Parquet, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

STDOUT = "-"
"""The file name that means standard output."""


def check(path: str | os.PathLike[str]) -> None:
    """Raise OSError if `path` is a folder, or there is no folder to write it into."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; give the name of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} into")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, which it becomes if the block succeeds and is removed if not.

    What exists and is no regular file, such as a device or a pipe, is written to directly.

    Raises:
        OSError: If `path` is a folder, or there is no folder to write it into.
    """
    check(path)
    target = Path(path)
    if target.exists() and not target.is_file():
        yield target
        return
    temporary = target.with_name(f".{uuid.uuid4().hex[:8]}-{target.name}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(content: bytes, path: str | os.PathLike[str]) -> None:
    """Write to a file, whole or not at all; to standard output if `path` is "-"."""
    if os.fspath(path) == STDOUT:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def to_json(document: Mapping[str, Any]) -> bytes:
    """Strict JSON in UTF-8: what is NaN or infinite becomes null."""
    text = json.dumps(plain(document), indent=2, allow_nan=False)
    return f"{text}\n".encode()


def to_csv(frame: pd.DataFrame) -> bytes:
    """Comma-separated, with a header; empty where a number is missing."""
    return frame.to_csv(index=False, lineterminator="\n").encode("utf-8", "backslashreplace")


def to_parquet(frame: pd.DataFrame) -> bytes:
    """Apache Parquet.

    Raises:
        ImportError: If there is no library to write it with.
    """
    try:
        return bytes(frame.to_parquet(index=False))
    except ImportError as error:
        raise ImportError("Parquet needs a library: pip install pyarrow") from error


def rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """One dict a row, with Python's own numbers and None where one is missing."""
    return [plain(row) for row in frame.to_dict(orient="records")]


def plain(value: Any) -> Any:
    """Python's own dicts, lists and numbers; None for what is NaN or infinite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
