"""What the words of the command line mean: each reads one, or says what it should have been.

Each raises argparse.ArgumentTypeError.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from ww_train.cli.conditions import Condition, condition
from ww_train.editing.rules import Bottom, Top


def condition_of(text: str) -> Condition:
    """A condition of `--fail-if`."""
    try:
        return condition(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def named(text: str) -> str:
    """A path, which must say something: the empty one would be the folder one is in."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def weights(text: str) -> str:
    """A path of weights, not of their configuration."""
    path = Path(named(text))
    if path.name.endswith("config.json") and path.is_file():
        raise argparse.ArgumentTypeError(
            f"{text} is a configuration: name the folder, or use ww-train plan"
        )
    return text


def layer_type(text: str) -> str:
    """A type of layers."""
    if text in ("", "skipped"):  # stands for the type of what is no matrix
        raise argparse.ArgumentTypeError(f"{text!r} is no type of layers; describe lists them")
    return text


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number above 0, not {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"a number above 0, not {text!r}")
    return number


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    number = positive(text)
    if number > 1.0:
        raise argparse.ArgumentTypeError(f"a share above 0 and up to 1, not {text!r}")
    return number


def rule_of(kind: type[Top] | type[Bottom]) -> Callable[[str], Top | Bottom]:
    """Reads the share of a rule of `smooth`."""

    def read(text: str) -> Top | Bottom:
        try:
            return kind(float(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"a share between 0 and 1, not {text!r}") from error

    return read


def device_name(text: str) -> torch.device:
    """A device that computes in float64 and is there."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; try cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text}: 64-bit arithmetic is needed; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise argparse.ArgumentTypeError(f"no {text}: PyTorch finds {found} CUDA devices here")
    return device
