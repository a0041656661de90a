"""The cores of the CPU: LAPACK gains nothing from a second one on small matrices."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


def one_core() -> None:
    """Let this thread compute on one core; other threads keep their number of cores."""
    torch.get_num_threads()  # or the first computation would set the number anew
    torch.set_num_threads(1)


@contextmanager
def one_core_each() -> Iterator[ThreadPoolExecutor]:
    """A worker for each core, whose computations use that core alone."""
    threads = torch.get_num_threads()
    # the number of threads is a property of each thread; new ones inherit the last one set
    pool = ThreadPoolExecutor(threads, initializer=one_core)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
