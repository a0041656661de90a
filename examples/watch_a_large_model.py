"""What do the spectra of a large model on my disk look like?

    python examples/watch_a_large_model.py FOLDER          # of any Hugging Face model
    python examples/watch_a_large_model.py model.safetensors

The weights are read layer by layer, so that a model larger than the memory can be measured; nothing
of it is executed. Leaves a table of the layers, figures, and report.html, a page to read and to pass
on. Without a model a small random transformer is written and read. Martin, Peng and Mahoney (Nature
Communications 2021): in well-trained models most layers have an alpha between 2 and 6.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from outcome import save

from ww_train import Report, measure, plots
from ww_train.page import write_page
from ww_train.weights.checkpoints import CheckpointError


def random_model(folder: Path) -> Path:
    """A file of random weights, for those who have no other."""
    from safetensors.torch import save_file
    from tiny_gpt import TinyGPT

    folder.mkdir(parents=True, exist_ok=True)
    save_file(TinyGPT().state_dict(), folder / "random.safetensors")
    print(f"no model given: {folder / 'random.safetensors'}, a random one, is measured instead")
    return folder / "random.safetensors"


def draw(report: Report) -> Figure:
    """Alphas of the layers, along the depth and against the distance, and the worst layer."""
    figure = Figure(figsize=(14.0, 9.5), dpi=90, layout="constrained")
    axes = figure.subplots(2, 2)
    plots.alpha_histogram(report, ax=axes[0, 0])
    plots.correlation_flow(report, ax=axes[0, 1])
    plots.alpha_vs_rand_distance(report, ax=axes[1, 0])
    plots.esd(max(report, key=lambda layer: layer.alpha or 0.0), ax=axes[1, 1])
    axes[1, 1].set_title(
        f"largest alpha: {axes[1, 1].get_title(loc='left')}", loc="left", fontsize=9
    )
    return figure


def finding(name: str, report: Report, seconds: float) -> str:
    """What the table says, in words."""
    alphas = pd.Series([layer.alpha for layer in report], dtype=float).dropna()
    traps = sum(layer.num_traps > 0 for layer in report)
    return (
        f"{name}: {alphas.between(2.0, 6.0).sum()} of {len(report)} layers have an alpha between 2 "
        f"and 6 (median {alphas.median():.2f}; {(alphas < 2.0).sum()} below, {(alphas > 6.0).sum()} "
        f"above); {traps} have correlation traps. In one line: {report.verdict}. {len(report.skipped)} "
        f"weights were skipped. Measuring took {seconds:.1f} s of processor time."
    )


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model", nargs="?", type=Path, help="folder or file")
    parser.add_argument("--layers", help="only these: a name, glob or regular expression")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffles")
    parser.add_argument("--out", type=Path, default=Path("runs/watch_a_large_model"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    path = args.model or random_model(args.out)
    began = time.process_time()
    try:
        report = measure(
            path, layers=args.layers, randomize=True, seed=args.seed, progress=True, max_N=50_000
        )
    except (CheckpointError, OSError) as error:
        raise SystemExit(f"cannot read {path}: {error}") from None
    if not report.layers:
        raise SystemExit(f"no layer of {path} could be analysed:\n{report}")
    seconds = time.process_time() - began
    frame = report.to_dataframe()
    frame["verdict"] = [layer.verdict for layer in report]
    columns = ["longname", "N", "M", "alpha", "D", "ERG_gap", "num_traps", "verdict"]
    sentence = finding(path.name, report, seconds)
    save(args.out, draw(report), frame[columns], sentence, seed=args.seed)
    write_page(report, args.out / "report.html", title=path.name)
    for layer in report.skipped:
        print(f"skipped {layer.name}: {layer.reason}")
    print(f"page: {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
