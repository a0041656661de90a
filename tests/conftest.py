"""One BLAS thread, and the same random models on every run."""

import os

# on shared cores the many small matrices of the tests take 25 times as long with more
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from .accelerator import gpu  # noqa: E402, F401

torch.manual_seed(0)  # layers that are built as parameters of tests


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
