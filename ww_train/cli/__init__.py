"""The command line `ww-train`: runs a command and turns what happens into an exit code."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TextIO

import torch

from ww_train.cli.parser import parse
from ww_train.tables import printable

BAD_INPUT, DEFECT, INTERRUPTED, BROKEN_PIPE = 2, 3, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of `ww-train`.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit code: 0 fine, 1 a condition of `--fail-if` is true, 2 bad input, 3 a defect of
        ww-train, 130 interrupted, 141 the reader of the output is gone.

    Raises:
        SystemExit: For `--help`, `--version` (code 0) and arguments that make no sense (code 2).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may not exist in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _one_line
            code = int(args.command(args))
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return _said("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # what is still buffered would raise again when the interpreter closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (OSError, ValueError, ImportError, torch.OutOfMemoryError, MemoryError) as error:
        return _said(_reason(error), BAD_INPUT)
    except Exception:  # its code must not be that of a condition that is true
        traceback.print_exc()
        return _said("this is a defect of ww-train; please report it with the above", DEFECT)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _said(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")  # of torchrun; each process may have its own reason
    name = "ww-train" if rank == "0" else f"ww-train (process {rank})"
    print(f"{name}: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning without the line of the program that gave it."""
    _said(f"warning: {message}", 0)
