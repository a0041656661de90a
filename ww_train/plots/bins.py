"""Bins of histograms: of equal width in lambda or in ln lambda, and how wide they are where."""

from __future__ import annotations

import math

import numpy as np

from ww_train.spectrum import Array

MOST_BINS = 100
"""Most bins of a histogram: with more, bars are as narrow as the lines across them."""


def log_edges(evals: Array, narrow: float = 0.0) -> Array:
    """Edges of bins of equal width in ln lambda.

    Args:
        evals: `(n,)`, ascending and positive.
        narrow: A width in ln lambda that bins should not exceed, as far as `MOST_BINS` allows.
    """
    low, high = float(evals[0]), float(evals[-1])
    if high < low * (1.0 + 1e-6):
        low, high = low / 1.05, high * 1.05
    number = _number_of_bins(evals)
    if narrow > 0.0:
        number = max(number, min(math.ceil(math.log(high / low) / narrow), MOST_BINS))
    edges: Array = np.geomspace(low, high, number + 1)
    return edges


def linear_edges(evals: Array, low: float, high: float) -> Array:
    """Edges of bins of equal width from low to high, as many as suit that many eigenvalues."""
    if high < low + 1e-6 * abs(low):
        low, high = 0.95 * low, 1.05 * high
    edges: Array = np.linspace(low, high, _number_of_bins(evals) + 1)
    return edges


def bin_width(edges: Array, x: Array) -> Array:
    """Width of a bin at `x`: linear in lambda, be the bins equal in lambda or in ln lambda."""
    centres, widths = 0.5 * (edges[1:] + edges[:-1]), np.diff(edges)
    slope = (widths[-1] - widths[0]) / (centres[-1] - centres[0])
    width: Array = widths[0] + slope * (x - centres[0])
    return width


def _number_of_bins(evals: Array) -> int:
    return min(MOST_BINS, max(10, round(3.0 * math.sqrt(len(evals)))))
