"""Claim: EnergyMP tells signals from noise where weightwatcher's fit of the random bulk does not.

Planted signals in Gaussian noise, and noise alone of several distributions. Three fits count spikes:
EnergyMP (the default of ww_train), the median of the eigenvalues below the spikes (the usual robust
alternative), and KernelMP, weightwatcher 0.7.7's method at several hundred times its speed; rows of
the live peer show that it is. Strengths are in units of the detection limit, theta = (N M)^¼ sigma.

    python benchmarks/random_bulk.py [--repeats 200] [--large]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from time import perf_counter

import numpy as np
import torch
from claims import verdict
from parity import minilm
from peer import VERSION, peer, quiet
from torch import Tensor

from ww_train.kernel_mp import KernelMP
from ww_train.linalg import gram
from ww_train.marchenko_pastur import (
    FALSE_ALARM,
    BulkFit,
    EnergyMP,
    MPFit,
    mp_density,
    mp_edges,
    tracy_widom_edge,
)
from ww_train.spectrum import Array, Spectrum

Noise = Callable[[np.random.Generator, tuple[int, int]], Array]

NOISES: dict[str, Noise] = {
    "Gaussian": lambda rng, shape: rng.standard_normal(shape),
    "uniform": lambda rng, shape: rng.uniform(-1.0, 1.0, shape),
    "Rademacher": lambda rng, shape: rng.choice((-1.0, 1.0), shape),
    "Laplace": lambda rng, shape: rng.laplace(size=shape),
    "Student t, df 5": lambda rng, shape: rng.standard_t(5, shape),
    "Student t, df 3": lambda rng, shape: rng.standard_t(3, shape),
}

STRENGTHS = (0.8, 1.0, 1.2, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class MedianMP:
    """Variance from the median of the eigenvalues below the spikes, until no more are found."""

    false_alarm: float = FALSE_ALARM

    def __call__(self, spectrum: Spectrum, /) -> MPFit:
        N, M, evals = spectrum.N, spectrum.M, spectrum.evals
        spikes, found = 0, -1
        while found != spikes and spikes < M - 2:
            spikes = max(found, 0)
            n, m = N - spikes, M - spikes
            variance = float(np.median(evals[:m])) / _mp_median(n, m)
            threshold = variance * tracy_widom_edge(n, m, self.false_alarm)
            found = max(spikes, int(np.count_nonzero(evals > threshold)))
        low, high = (variance * edge for edge in mp_edges(N, M))
        sigma = math.sqrt(variance * N * M / spectrum.norm)
        return MPFit(sigma, low, high, threshold, found)


@cache
def _mp_median(N: int, M: int) -> float:
    """Median of the Marchenko-Pastur law of unit variance."""
    roots = np.linspace(*(math.sqrt(edge) for edge in mp_edges(N, M)), 4001)
    middles = 0.5 * (roots[1:] + roots[:-1])
    mass = np.cumsum(mp_density(middles**2, N, M, 1.0) * middles)
    return float(np.interp(0.5, mass / mass[-1], roots[1:])) ** 2


FITS: dict[str, BulkFit] = {"energy": EnergyMP(), "median": MedianMP(), "kernel": KernelMP()}


def spectrum(weight: Array | Tensor) -> Spectrum:
    evals = torch.linalg.eigvalsh(gram(torch.as_tensor(weight)[None])[0]).clamp(min=0.0)
    return Spectrum(evals.numpy(), max(weight.shape), min(weight.shape))


def planted(rng: np.random.Generator, N: int, M: int, strengths: Sequence[float]) -> Array:
    """Unit Gaussian noise plus orthogonal signals."""
    k = len(strengths)
    u = np.linalg.qr(rng.standard_normal((N, k)))[0]
    v = np.linalg.qr(rng.standard_normal((M, k)))[0]
    noise: Array = rng.standard_normal((N, M))
    return noise + (u * np.asarray(strengths) * (N * M) ** 0.25) @ v.T


def scaled(repeats: int, M: int) -> int:
    """Fewer repeats for matrices above 64."""
    return max(2, min(repeats, repeats * 128 // M))


def false_alarms(repeats: int, sizes: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Print the share of noise matrices with a spike; return alarms and trials of Gaussian noise."""
    print(f"\nMatrices of pure noise in which a spike is seen, % (stated: {100 * FALSE_ALARM:g})")
    print(f"  {'entries':17}{'N x M':>12}{'matrices':>10}" + "".join(f"{n:>9}" for n in FITS))
    gaussian = dict.fromkeys(FITS, 0)
    trials = 0
    for name, noise in NOISES.items():
        for M in sizes:
            for N in (M, 2 * M, 4 * M) if name == "Gaussian" else (2 * M,):
                rng, n = np.random.default_rng([N, M]), scaled(repeats, M)
                spectra = [spectrum(noise(rng, (N, M))) for _ in range(n)]
                alarms = {f: sum(fit(s).num_spikes > 0 for s in spectra) for f, fit in FITS.items()}
                cells = "".join(f"{100 * a / n:9.1f}" for a in alarms.values())
                print(f"  {name:17}{f'{N} x {M}':>12}{n:>10}{cells}", flush=True)
                if name == "Gaussian":
                    trials += n
                    gaussian = {f: gaussian[f] + a for f, a in alarms.items()}
    return {f: (a, trials) for f, a in gaussian.items()}


def detection(repeats: int, sizes: Sequence[int]) -> dict[tuple[str, float], float]:
    """Print how often one planted signal is a spike; return the mean rates."""
    print("\nOne signal planted in Gaussian noise: % of matrices in which it is a spike")
    print(f"  {'N x M':>12}{'fit':>9}" + "".join(f"{f'theta {t:g}':>11}" for t in STRENGTHS))
    rates: dict[tuple[str, float], list[float]] = {}
    for M in sizes:
        for N in (M, 2 * M, 4 * M):
            rng, n = np.random.default_rng([N, M, 1]), scaled(repeats, M)
            seen = {f: [0] * len(STRENGTHS) for f in FITS}
            for i, strength in enumerate(STRENGTHS):
                for _ in range(n):
                    s = spectrum(planted(rng, N, M, [strength]))
                    for f, fit in FITS.items():
                        seen[f][i] += fit(s).num_spikes > 0
            for f, counts in seen.items():
                cells = "".join(f"{100 * c / n:11.0f}" for c in counts)
                print(f"  {f'{N} x {M}':>12}{f:>9}{cells}", flush=True)
                for strength, count in zip(STRENGTHS, counts, strict=True):
                    rates.setdefault((f, strength), []).append(count / n)
    return {key: float(np.mean(values)) for key, values in rates.items()}


def many_signals(repeats: int, sizes: Sequence[int]) -> dict[str, float]:
    """Print counts and sigma beside many or strong signals; return the worst error of sigma."""
    print("\nSeveral signals: mean number of spikes / sigma over the true one")
    print(f"  {'signals':34}{'N x M':>12}{'number':>8}" + "".join(f"{f:>15}" for f in FITS))
    worst = dict.fromkeys(FITS, 0.0)
    for label, share, signals in (
        ("strengths 50, 20, 10, 5, 3", 0.0, [50.0, 20.0, 10.0, 5.0, 3.0]),
        ("one of 1000", 0.0, [1000.0]),
        ("M/8 of strength 3", 0.125, [3.0]),
        ("0.45 M of strength 20", 0.45, [20.0]),
        ("M/16 of 50, one of 1.3", 0.0625, [50.0, 1.3]),
    ):
        for M in sizes:
            for N in (M, 2 * M):
                strengths = [signals[0]] * (int(share * M) or 1) + signals[1:]
                rng, n = np.random.default_rng([N, M, 2]), max(2, scaled(repeats, M) // 5)
                results: dict[str, list[tuple[float, float]]] = {f: [] for f in FITS}
                for _ in range(n):
                    s = spectrum(planted(rng, N, M, strengths))
                    rms = math.sqrt(s.norm / (N * M))
                    for f, fit in FITS.items():
                        mp = fit(s)
                        results[f].append((mp.num_spikes, mp.sigma_mp * rms))
                cells = ""
                for f, values in results.items():
                    count, sigma = np.mean(values, axis=0)
                    cells += f"{f'{count:.1f} / {sigma:.3g}':>15}"
                    worst[f] = max(worst[f], abs(sigma - 1.0))
                print(f"  {label:34}{f'{N} x {M}':>12}{len(strengths):>8}{cells}", flush=True)
    return worst


def trained_layers() -> None:
    """Print what the fits say of a pretrained transformer, where nobody knows the truth."""
    try:
        state = minilm()
    except FileNotFoundError as error:
        print(f"\nSKIP  {error}")
        return
    print("\nLayers of all-MiniLM-L6-v2: median (range) of num_spikes / M and of sigma_mp")
    layers = [w for w in state.values() if w.ndim == 2 and min(w.shape) >= 20]
    layers = [w for w in layers if max(w.shape) < 10 * min(w.shape)]  # not the word embedding
    for square in (True, False):
        spectra = [spectrum(w) for w in layers if (w.shape[0] == w.shape[1]) == square]
        print(f"  {len(spectra)} layers, {'square' if square else 'not square'}")
        for f, fit in FITS.items():
            fits = [fit(s) for s in spectra]
            shares = [mp.num_spikes / s.M for mp, s in zip(fits, spectra, strict=True)]
            sigmas = [mp.sigma_mp for mp in fits]
            cells = (
                f"{np.median(v):6.2f} ({min(v):.2f} to {max(v):.2f})" for v in (shares, sigmas)
            )
            print(f"  {f:>9}  " + "   ".join(cells))


def live_peer() -> None:
    """Print weightwatcher's own numbers beside KernelMP's."""
    try:
        watcher = peer().WeightWatcher()
    except ModuleNotFoundError as error:
        print(f"\nSKIP  {error}")
        return
    print(f"\nKernelMP against the live weightwatcher {VERSION}: num_spikes, sigma_mp, seconds")
    worst = 0.0
    for N, M, strengths in ((256, 128, []), (256, 128, [50.0, 2.0]), (192, 192, [3.0, 2.0])):
        s = spectrum(planted(np.random.default_rng([N, M]), N, M, strengths))
        start = perf_counter()
        ours = KernelMP()(s)
        middle = perf_counter()
        with quiet():
            theirs = watcher.mp_fit(
                s.evals.copy(), N, M, 1, "", 0, 0, False, False, "", "", 1.0, True, s.evals
            )
        seconds = perf_counter() - middle, middle - start
        worst = max(worst, abs(ours.sigma_mp / theirs[1] - 1.0), ours.num_spikes != theirs[0])
        print(
            f"  {f'{N} x {M}':>12}  signals {strengths!s:12} peer {theirs[0]}, {theirs[1]:.6f}, "
            f"{seconds[0]:.3f}   KernelMP {ours.num_spikes}, {ours.sigma_mp:.6f}, {seconds[1]:.4f}"
        )
    verdict("KernelMP is weightwatcher's fit, to 1e-5", worst < 1e-5, f"worst {worst:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=100, help="matrices a cell (default 100)")
    parser.add_argument(
        "--large", action="store_true", help="M up to 2048: with --repeats 16, 20 minutes"
    )
    args = parser.parse_args()

    sizes = (64, 128, 256) + ((512, 1024, 2048) if args.large else ())
    alarms = false_alarms(args.repeats, (16, *sizes))
    rates = detection(args.repeats, sizes)
    worst = many_signals(args.repeats, sizes)
    trained_layers()
    live_peer()

    seen, trials = alarms["energy"]
    rate = FALSE_ALARM * 1.5
    chance = rate + 3.0 * math.sqrt(rate / trials)
    verdict(
        f"Gaussian noise has a spike in {100 * FALSE_ALARM:g} % of matrices",
        seen / trials <= chance,
        ", ".join(f"{f} {100 * a / n:.1f} %" for f, (a, n) in alarms.items()),
    )
    for strength in (1.5, 2.0):
        verdict(
            f"a signal {strength} times the detection limit is seen",
            rates["energy", strength] >= (0.9 if strength < 2.0 else 0.99),
            ", ".join(f"{f} {100 * rates[f, strength]:.0f} %" for f in FITS),
        )
    verdict(
        "sigma is within 2 % beside many or strong signals",
        worst["energy"] < 0.02,
        ", ".join(f"{f} {100 * w:.0f} %" for f, w in worst.items()),
    )


if __name__ == "__main__":
    main()
