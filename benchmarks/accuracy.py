"""How exact each eigensolver is, and what it costs, against a float64 SVD.

Layers on devices without float64 (Apple's GPUs) are computed on the CPU, as exactly as if they were
there. The alternative would be float32 products of weights split in two; its row shows what that
would cost in accuracy, and why it is not offered.

Three kinds of float32 matrices in three shapes: Gaussian noise, heavy-tailed entries (Student t with
3 degrees of freedom), and a power-law spectrum that spans eight decades. Printed are the largest
relative error of the eigenvalues in the tail, the error of alpha, of the ERG tail and of the entropy,
and how many eigenvalues were lost in rounding (below zero before clamping, or off by more than half).

    python benchmarks/accuracy.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch
from claims import verdict
from torch import Tensor

from ww_train import measure
from ww_train.linalg import (
    Eigensolver,
    float32_eigenvalues,
    gram_eigenvalues,
    svd_eigenvalues,
    symmetric_eigenvalues,
)

SPLIT_ROWS = 64
"""Rows that are summed in float32 before they are added in float64."""


def split_eigenvalues(stack: Tensor) -> Tensor:
    """From float32 products of weights split into 12 bits and the rest, summed in float64."""
    tall = stack if stack.shape[1] >= stack.shape[2] else stack.mT
    tall = tall.to(torch.float32).contiguous()
    high = (tall.view(torch.int32) & ~0xFFF).view(torch.float32)
    low = tall - high  # exact
    total = tall.new_zeros(len(tall), tall.shape[2], tall.shape[2], dtype=torch.float64)
    for a, b in zip(high.split(SPLIT_ROWS, dim=1), low.split(SPLIT_ROWS, dim=1), strict=True):
        cross = (a.mT @ b).to(torch.float64)
        total += (a.mT @ a).to(torch.float64) + cross + cross.mT + (b.mT @ b).to(torch.float64)
    return symmetric_eigenvalues(total)


SOLVERS: dict[str, Eigensolver] = {
    "float64 Gram (default)": gram_eigenvalues,
    "float32 Gram (fast)": float32_eigenvalues,
    "float32 split in two": split_eigenvalues,
    "float64 SVD (exact)": svd_eigenvalues,
}


def matrices(shapes: list[tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
    for rows, cols in shapes:
        rng = np.random.default_rng(rows + cols)
        noise = rng.standard_normal((rows, cols))
        yield f"{rows}x{cols} Gaussian", torch.from_numpy(noise).float()
        heavy = rng.standard_t(3, (rows, cols))
        yield f"{rows}x{cols} Student t", torch.from_numpy(heavy).float()
        n = min(rows, cols)
        u, v = (np.linalg.qr(rng.standard_normal((size, n)))[0] for size in (rows, cols))
        svals = np.geomspace(1.0, 1e-4, n)
        yield f"{rows}x{cols} decades", torch.from_numpy((u * svals) @ v.T).float()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true", help="also 2048x2048")
    args = parser.parse_args()
    shapes = [(384, 384), (768, 768), (3072, 768)] + ([(2048, 2048)] if args.large else [])
    columns = ("tail", "alpha", "detX_num", "entropy", "lost", "seconds")
    print(f"{'':24}{'':24}" + "".join(f"{column:>11}" for column in columns))
    worst = dict.fromkeys(SOLVERS, 0.0)
    for name, weight in matrices(shapes):
        exact = measure(weight, eigensolver=svd_eigenvalues)["W"]
        for solver, function in SOLVERS.items():
            start = time.perf_counter()
            layer = measure(weight, eigensolver=function)["W"]
            seconds = time.perf_counter() - start
            assert exact.fit is not None
            assert layer.fit is not None
            truth, evals = exact.spectrum.evals, layer.spectrum.evals
            tail = truth >= exact.fit.xmin
            error = np.abs(evals / truth - 1.0)
            alpha = abs(layer.fit.alpha / exact.fit.alpha - 1.0)
            gap = abs((layer.erg.detX_num or 0) - (exact.erg.detX_num or 0))
            entropy = abs(layer.spectrum.entropy - exact.spectrum.entropy)
            worst[solver] = max(worst[solver], alpha)
            print(
                f"{name:24}{solver:24}{error[tail].max():11.1e}{alpha:11.1e}{gap:11d}"
                f"{entropy:11.1e}{np.count_nonzero(error > 0.5):11d}{seconds:11.3f}"
            )
    print()
    default = worst["float64 Gram (default)"]
    verdict("float64 Gram: alpha within 1e-9 of the SVD", default < 1e-9, f"{default:.1e}")
    for solver in ("float32 split in two", "float32 Gram (fast)"):
        print(f"{solver}: alpha within {worst[solver]:.1e}")


if __name__ == "__main__":
    main()
