"""Peak memory of `measure` beyond the model itself.

Each case runs in a process of its own: a model is made, its spectra are measured, with traps and
without, and the growth of the peak resident memory is compared with the claim, three times the
largest matrix in float64 plus 0.5 GB.

    python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch
from claims import verdict

from ww_train import measure

CASES = {
    "12 layers 1024x1024": [(1024, 1024)] * 12,
    "embedding 50257x768": [(50257, 768)],
    "GPT-2 124M": [(50257, 768), (1024, 768)]
    + [shape for _ in range(12) for shape in ((2304, 768), (768, 768), (3072, 768), (768, 3072))],
    "3 layers 4096x4096": [(4096, 4096)] * 3,
}


def peak() -> float:
    """Peak resident memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def child(case: str, randomize: bool) -> None:
    state = {f"l{i}.weight": torch.randn(shape) for i, shape in enumerate(CASES[case])}
    measure(torch.randn(64, 64), randomize=True)  # load what is loaded once
    before = peak()
    report = measure(state, randomize=randomize)
    print(json.dumps({"beyond": peak() - before, "layers": len(report)}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1] == "traps")
        return
    for case, shapes in CASES.items():
        limit = 3 * 8 * max(n * m for n, m in shapes) + 0.5e9
        for mode in ("plain", "traps"):
            command = [sys.executable, __file__, "--child", case, mode]
            answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            text = f"{answer['beyond'] / 1e9:.2f} GB of {limit / 1e9:.2f} GB"
            verdict(f"{case}, {mode}", answer["beyond"] <= limit, text)


if __name__ == "__main__":
    main()
