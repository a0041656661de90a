"""Dragon Kings: what do a few eigenvalues off the power law do to alpha, and do the fixes help?

    python examples/dragon_kings.py --data-dir FOLDER     # with tinyshakespeare.txt; or without

Outliers ("kings") are planted far above spectra whose exponent is known, and the same fits are made of
the layers of a small trained transformer. WeightWatcher's `fix_fingers` takes such eigenvalues for
the reason of a large alpha and clips them (`ClipXmax`), or looks for xmin near the peak of the density
only (`XminPeak`). Also to be checked: the smaller alpha is, the farther a layer's spectrum lies from
that of the shuffled weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from outcome import save
from tiny_gpt import LAYERS, arguments, pretrained
from torch import Tensor
from tqdm import tqdm

from ww_train import ClipXmax, LayerReport, PowerLaw, Report, XminPeak, measure, plots

FIXES = {"clip_xmax": ClipXmax(), "xmin_peak": XminPeak(), "drop_top_3": PowerLaw(drop_top=3)}
KINGS = 3


def power_law(seed: int) -> Tensor:
    """A matrix whose 200 eigenvalues are a sample of the density x^-3."""
    uniform = np.random.default_rng(seed).random(200)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(200, 200, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise).Q * torch.from_numpy((1.0 - uniform) ** -0.25)


def random(seed: int) -> Tensor:
    """Independent normal entries: no tail at all."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(256, 128, generator=generator, dtype=torch.float64)


def crowned(make: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """The same with its three largest singular values five times as large."""

    def with_kings(seed: int) -> Tensor:
        u, s, v = torch.linalg.svd(make(seed), full_matrices=False)
        s[:KINGS] *= 5.0
        return u * s @ v

    return with_kings


PLANTED = {
    "power law, exponent 3": power_law,
    "power law with 3 kings": crowned(power_law),
    "random": random,
    "random with 3 kings": crowned(random),
}


def row(name: str, layer: LayerReport) -> dict[str, object]:
    """Alpha of one layer, raw and fixed."""
    fits = {fix: fit(layer.spectrum.positive) for fix, fit in FIXES.items()}
    alphas = {fix: np.nan if fit is None else fit.alpha for fix, fit in fits.items()}
    clipped = fits["clip_xmax"]
    fingers = np.nan if clipped is None else float(clipped.num_fingers or 0)
    raw = np.nan if layer.alpha is None else layer.alpha
    distance = {"rand_distance": layer.rand_distance}
    return {"spectrum": name, "raw": raw, **alphas, "fingers_clipped": fingers, **distance}


def finding(planted: pd.DataFrame, real: pd.DataFrame, text: str) -> str:
    """What the numbers say, in words."""
    clean, king, noise, noise_king = (planted.loc[name] for name in PLANTED)
    fingers = real[real.fingers_clipped > 0]
    ranks = {
        fix: real[[fix, "rand_distance"]].corr("spearman").iloc[0, 1] for fix in ("raw", *FIXES)
    }
    said = ", ".join(f"{fix} {rank:.2f}" for fix, rank in ranks.items())
    planted_said = "; ".join(
        f"{fix}: {clean[fix]:.2f} to {king[fix]:.2f} and {noise[fix]:.2f} to {noise_king[fix]:.2f}"
        for fix in ranks
    )
    clipped = f" with raw alphas from {fingers.raw.min():.1f} to {fingers.raw.max():.1f}"
    return (
        f"What three kings do to alpha of a power law and of random weights: {planted_said}. In the "
        f"transformer trained on {text} clip_xmax clips {len(fingers)} of {len(real)} layers"
        f"{clipped if len(fingers) else ''}, and the median alpha goes from {real.raw.median():.2f} to "
        f"{real.clip_xmax.median():.2f}. Rank correlation of rand_distance with alpha: {said}."
    )


def draw(examples: Mapping[str, LayerReport], report: Report, real: pd.DataFrame) -> Figure:
    """Planted kings, raw against fixed alpha of the real layers, and alpha against distance."""
    figure = Figure(figsize=(12.0, 9.0), dpi=90, layout="constrained")
    axes = figure.subplots(2, 2)
    for ax, (name, layer) in zip(axes[0], examples.items(), strict=True):
        plots.esd(layer, ax=ax)
        ax.set_title(f"{name}: raw alpha {layer.alpha:.2f} in this draw", loc="left", fontsize=9)
    ends = [1.0, 1.05 * float(real[["raw", *FIXES]].max(axis=None))]
    for marker, fix in zip("o^s", FIXES, strict=True):
        axes[1, 0].plot(real.raw, real[fix], marker, label=fix, alpha=0.7)
    axes[1, 0].plot(ends, ends, "--", color="0.6", linewidth=0.8, label="no change")
    axes[1, 0].set(xlabel="raw alpha", ylabel="fixed alpha")
    axes[1, 0].set_title("layers of the transformer, raw and fixed", loc="left", fontsize=9)
    axes[1, 0].legend(frameon=False)
    plots.alpha_vs_rand_distance(report, ax=axes[1, 1])
    axes[1, 1].plot(real.rand_distance, real.clip_xmax, "kx")
    axes[1, 1].get_legend().remove()
    title = "layers of the transformer: alpha raw (dots) and after clip_xmax (crosses)"
    axes[1, 1].set_title(title, loc="left", fontsize=9)
    return figure


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--draws", type=int, default=20, help="of each planted spectrum (20)")
    args = parser.parse_args()
    drawn, examples = [], {}
    for name, make in tqdm(PLANTED.items(), unit="spectrum"):
        for seed in range(args.seed, args.seed + args.draws):
            (layer,) = measure(make(seed), randomize=True)
            drawn.append(row(name, layer))
        if make not in (power_law, random):
            examples[name] = layer
    planted = pd.DataFrame(drawn).groupby("spectrum").median().loc[list(PLANTED)]
    model, (text, _) = pretrained(args)
    report = measure(model, layers=LAYERS, randomize=True)
    real = pd.DataFrame([row(layer.name, layer) for layer in report])
    table = pd.concat([planted.reset_index(), real], ignore_index=True)
    out, sentence = args.out or Path("runs/dragon_kings"), finding(planted, real, text)
    save(out, draw(examples, report, real), table, sentence, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
