"""What the scripts about training share: an MLP, data in memory, the loop, the errors, the spectra."""

from __future__ import annotations

import argparse
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from images import NAMES, load
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import trange

from ww_train import measure

HIDDEN = ("fc1", "fc2")
"""The layers whose spectra are read; the head has only ten eigenvalues."""

METRICS = ("alpha", "D", "ERG_gap", "traps")
"""What `spectra` gives for each layer, as columns such as `alpha_fc1`."""

CRITICAL = {"alpha": 2.0, "ERG_gap": 0.0}
"""Where SETOL expects an ideal layer."""

STYLES = {
    "fc1": ("fc1", "C0"),
    "fc2": ("fc2", "C1"),
    "test_error": ("test", "C3"),
    "train_error": ("training", "0.6"),
}
"""Label and colour of a column, by the end of its name."""


@dataclass(frozen=True)
class Data:
    """Flat images and integer labels."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def with_noise(self, share: float, seed: int) -> Data:
        """This share of the training labels drawn anew, so that a tenth of them stay right."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.y), generator=generator)[: round(share * len(self.y))]
        drawn = torch.randint(10, (len(chosen),), generator=generator)
        y = self.y.clone()
        y[chosen.to(y.device)] = drawn.to(y.device)
        return replace(self, y=y)


def read(args: argparse.Namespace) -> Data:
    """The data that the arguments ask for: the first `samples` training images, and all test images."""
    train, test = (part.tensors for part in load(args.dataset, args.data_dir))
    if args.samples is not None and not 0 < args.samples <= len(train[0]):
        raise SystemExit(f"--samples {args.samples}: {args.dataset} has 1 to {len(train[0])}")
    tensors = (*(t[: args.samples] for t in train), *test)
    return Data(*(t.to(args.device) for t in tensors))


def mlp(data: Data, widths: tuple[int, int], seed: int) -> nn.Sequential:
    """Two hidden layers named fc1 and fc2, and a head of ten classes."""
    torch.manual_seed(seed)
    first, second = widths
    layers = OrderedDict(
        fc1=nn.Linear(data.x.shape[1], first),
        relu1=nn.ReLU(),
        fc2=nn.Linear(first, second),
        relu2=nn.ReLU(),
        head=nn.Linear(second, 10),
    )
    return nn.Sequential(layers).to(data.x.device)


def train(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    data: Data,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    title: str,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Iterator[int]:
    """Train; gives the number of epochs done after each of them. Stops where the loss diverges."""
    torch.set_flush_denormal(True)  # averages of the gradients of dead units are slow denormals
    generator = torch.Generator().manual_seed(seed)
    for epoch in (bar := trange(1, epochs + 1, desc=title, unit="epoch")):
        for batch in torch.randperm(len(data.y), generator=generator).split(batch_size):
            batch = batch.to(data.y.device)
            value = loss(model(data.x[batch]), data.y[batch])
            for optimizer in optimizers:
                optimizer.zero_grad()
            value.backward()
            for optimizer in optimizers:
                optimizer.step()
        last = value.item()
        bar.set_postfix(loss=f"{last:.2g}", refresh=False)
        if not math.isfinite(last):
            return
        yield epoch


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Wrong answers in percent."""
    return 100.0 * float((model(x).argmax(1) != y).float().mean())


def errors(model: nn.Module, data: Data) -> dict[str, float]:
    """Training and test error."""
    return {
        "train_error": error(model, data.x, data.y),
        "test_error": error(model, data.test_x, data.test_y),
    }


def state(model: nn.Module, data: Data) -> dict[str, float]:
    """Errors and spectra: one row of a table."""
    return errors(model, data) | spectra(model)


def spectra(model: nn.Module) -> dict[str, float]:
    """`METRICS` of the hidden layers; NaN where there is no power law. One shuffle for the traps."""
    row = {f"{metric}_{name}": math.nan for name in HIDDEN for metric in METRICS}
    for layer in measure(model, layers=list(HIDDEN), randomize=True):
        found = (layer.alpha, layer.fit and layer.fit.D, layer.ERG_gap, layer.num_traps)
        for metric, value in zip(METRICS, found, strict=True):
            row[f"{metric}_{layer.name}"] = math.nan if value is None else float(value)
    return row


def due(step: int, last: int, per_decade: int = 10) -> bool:
    """Whether to measure at this step: evenly on a logarithmic axis, and at the last step."""
    grid = {round(10 ** (i / per_decade)) for i in range(int(per_decade * math.log10(last)) + 1)}
    return step == last or step in grid


def rank_correlation(one: pd.Series, other: pd.Series) -> str:
    """Spearman's, in words: there is none with a constant."""
    if one.nunique() < 2 or other.nunique() < 2:
        return "no rank correlation"
    return f"rank correlation {one.rank().corr(other.rank()):+.2f}"


def draw(ax: Axes, rows: pd.DataFrame, x: str, columns: Iterable[str]) -> None:
    """Columns against x: a dot for each seed, and a line through the means of the seeds."""
    for column in columns:
        label, color = STYLES[next(end for end in STYLES if column.endswith(end))]
        ax.plot(rows[x], rows[column], ".", color=color, alpha=0.5, markersize=4)
        ax.plot(rows.groupby(x)[column].mean(), color=color, label=label)
    ax.legend(frameon=False, fontsize=8)


def draw_layers(ax: Axes, rows: pd.DataFrame, x: str, metric: str, label: str) -> None:
    """One of `METRICS` of both hidden layers; alpha on a logarithmic axis, traps from 1 on."""
    draw(ax, rows, x, [f"{metric}_{name}" for name in HIDDEN])
    ax.set_ylabel(label)
    if metric == "alpha":
        ax.set_yscale("log")
        plain(ax.yaxis, minor=True)
    if metric == "traps":
        ax.set_yscale("symlog", linthresh=1.0)
        ax.axhline(1.0, color="none")  # the axis goes to one trap at least
        plain(ax.yaxis)
    else:
        ax.axhline(CRITICAL[metric], color="0.5", linestyle="--", linewidth=1.0)


def draw_errors(ax: Axes, rows: pd.DataFrame, x: str) -> None:
    """Test and training error."""
    draw(ax, rows, x, ["test_error", "train_error"])
    ax.set_ylabel("error, %")


def plain(axis: Axis, *, minor: bool = False) -> None:
    """Ordinary numbers along a logarithmic axis."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}" if minor else NullFormatter())


def count(seeds: int) -> str:
    """So many seeds, in words."""
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def arguments(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The arguments that all these scripts have."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    parser.add_argument("--dataset", choices=NAMES, default="digits")
    parser.add_argument("--data-dir", help="folder with the IDX files of (fashion-)mnist")
    parser.add_argument("--samples", type=int, help="train on the first so many images only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=3, help="repeats")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument(
        "--out", type=Path, default=Path("runs", name), help="folder of the results"
    )
    return parser
