"""Draw every figure of `ww_train.plots` into PNG files; `figures.md` explains them.

    python examples/figures.py                         # a network trained on embedded digits
    python examples/figures.py model.safetensors       # the figures of weights that you have

The network is trained with AdamW first and then as long with WWPGD, so that there is a model before
and after "fine-tuning". One of its weights is made too large for the figure of correlation traps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from images import load
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ww_train import WWPGD, Report, measure, plots
from ww_train.callbacks.monitor import SpectralMonitor

WIDTH, BLOCKS = 128, 8
LAYER = "blocks.4"

Figures = dict[str, Figure]


class ResidualMLP(nn.Module):
    """Ten layers, eight of them square with a connection around each."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        for block in self.blocks:
            x = x + block(x.relu()) / BLOCKS**0.5
        return self.head(x.relu())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: TensorDataset,
    monitor: SpectralMonitor,
    epochs: range,
) -> None:
    """Train, and measure after each epoch; if the optimizer is a WWPGD the monitor projects too."""
    for epoch in epochs:
        for x, y in DataLoader(data, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        monitor.boundary(model, optimizer, epoch=epoch, step=epoch)


def layer_figures(report: Report, name: str) -> Figures:
    layer = report[name]
    return {
        "esd": plots.esd(layer),
        "esd_linear": plots.esd_linear(layer),
        "esd_semilog": plots.esd_semilog(layer),
        "xmin_scan": plots.xmin_scan(layer),
        "mp_fit": plots.mp_fit(layer),
        "randomized_esd": plots.randomized_esd(layer),
        "detX": plots.detX(layer),
        "level_spacings": plots.level_spacings(layer),
        "vector_metrics": plots.vector_metrics(layer),
    }


def model_figures(report: Report) -> Figures:
    return {
        "alpha_histogram": plots.alpha_histogram(report),
        "correlation_flow": plots.correlation_flow(report),
        "alpha_vs_rand_distance": plots.alpha_vs_rand_distance(report),
    }


def digits_figures(epochs: int) -> Figures:
    """Train the network and draw everything."""
    torch.manual_seed(0)
    data, _ = load("digits")
    model, monitor = ResidualMLP(), SpectralMonitor(budget=None, summary=False)
    start = measure(model, randomize=True)
    monitor.boundary(model, epoch=0, step=0)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, adamw, data, monitor, range(1, epochs + 1))
    base = measure(model, randomize=True, vectors=True)
    train(model, WWPGD(adamw, model=model), data, monitor, range(epochs + 1, 2 * epochs + 1))
    tuned = measure(model, randomize=True)
    with torch.no_grad():
        model.blocks[4].weight[17, 42] = 3.0
    planted = measure(model, layers=LAYER, randomize=True)
    models = {"at the start": start, "AdamW": base, "AdamW, then WWPGD": tuned}
    return {
        **layer_figures(base, LAYER),
        **model_figures(base),
        "randomized_esd": plots.randomized_esd(planted[LAYER]),
        "alpha_vs_alpha": plots.alpha_vs_alpha(base, tuned),
        "compare_models": plots.compare_models(models),
        "heat_map": plots.heat_map(monitor.history),
        "training_curves": plots.training_curves(monitor.history),
    }


def file_figures(path: str, layer: str | None) -> Figures:
    """Figures of a safetensors file: the model's, and those of one layer."""
    from safetensors.torch import load_file

    report = measure(load_file(path), randomize=True, vectors=True, progress=True)
    if not report.layers:
        raise SystemExit(f"no layer of {path} could be analysed:\n{report}")
    return {**model_figures(report), **layer_figures(report, layer or report.layers[0].name)}


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("weights", nargs="?", help="a safetensors file instead of the network")
    parser.add_argument("--layer", help="whose figures to draw, of the file; by default the first")
    parser.add_argument("--epochs", type=int, default=15, help="with each optimizer")
    parser.add_argument("--out", type=Path, default=Path("runs/figures"))
    args = parser.parse_args()
    path: str | None = args.weights
    figures = file_figures(path, args.layer) if path else digits_figures(args.epochs)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.png")
    print(f"{len(figures)} figures in {args.out}")


if __name__ == "__main__":
    main()
