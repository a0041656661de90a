"""weightwatcher, imported without its side effects and called without its noise.

Its import switches all warnings off and gives the root logger a handler at level INFO, and on a
machine with CUDA it decides to round every weight to float16. Here it runs as on a machine without
CUDA: in float64 on the CPU, the arithmetic that ww_train claims to reproduce; or, in a process of its
own, as it decides itself.
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from types import ModuleType
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor, nn

VERSION = "0.7.7"


@cache
def peer(cuda: bool = False) -> ModuleType:
    """The module `weightwatcher`.

    Args:
        cuda: Let it use CUDA if there is any; of the two only the first in a process has an effect.

    Raises:
        ModuleNotFoundError: If it is not installed, or not the version that the claims are about.
    """
    try:
        installed = importlib.metadata.version("weightwatcher")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed != VERSION:
        raise ModuleNotFoundError(
            f"the peer is missing: pip install weightwatcher=={VERSION} (found: {installed})"
        )
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    found = torch.cuda.is_available()
    with quiet(), patch("torch.cuda.is_available", return_value=found and cuda):
        import weightwatcher
    root.handlers[:] = handlers
    root.setLevel(level)
    return weightwatcher


def peer_analyze(
    model: nn.Module | dict[str, Tensor], *, cuda: bool = False, **options: bool
) -> pd.DataFrame:
    """`weightwatcher.WeightWatcher(model).analyze(**options)`, silently."""
    with quiet():
        return peer(cuda).WeightWatcher(model=model).analyze(**options)


@contextmanager
def quiet() -> Iterator[None]:
    """Swallow prints, log records and warnings, and put everything back."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
