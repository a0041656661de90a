"""weightwatcher 0.7.7, the live oracle, kept from changing the process it is tested in."""

import contextlib
import importlib.util
import io
import logging
import warnings

import pytest


@contextlib.contextmanager
def contained():
    """Undo what the peer does on import and in use: warning filters, root logger, prints."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def import_peer():
    """The module `weightwatcher`; skips the test if it is not there."""
    if importlib.util.find_spec("weightwatcher") is None:
        pytest.skip("the peer is not installed: pip install weightwatcher==0.7.7")
    with contained():
        import matplotlib

        matplotlib.use("Agg")
        import weightwatcher
    if weightwatcher.__version__ != "0.7.7":
        pytest.skip(f"the peer is {weightwatcher.__version__}, the numbers are those of 0.7.7")
    return weightwatcher
