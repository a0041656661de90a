"""Slow, literal versions of what ww_train computes, and what several test files share."""

import math
import re

import numpy as np
import torch
from hypothesis import settings
from torch import nn

quick = settings(derandomize=True, deadline=None, max_examples=40)
"""Hypothesis profile: the same examples on every run, no timing, no database."""

thorough = settings(quick, max_examples=1000)
"""For bad input, of which there are more kinds than one thinks."""


def named(value):
    """A name for a parameter of a test that is the same in every process: no addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def evals_by_svd(*slices, scale=1.0):
    """Pooled eigenvalues of WᵀW from float64 singular values."""
    arrays = [torch.as_tensor(w).detach().double().numpy() for w in slices]
    pooled = [np.linalg.svd(scale * w, compute_uv=False) ** 2 for w in arrays]
    return np.sort(np.concatenate(pooled))


def power_law_scan(evals):
    """Index, alpha and distance of the best xmin, by trying every one (Clauset et al. 2009).

    Below 20 values: unbiased alpha, tails of at least 8, distance minus 0.868/sqrt(n).
    """
    small = len(evals) < 20
    best = (math.inf, None, None, None)
    for i in range(len(evals) - 1):
        tail = evals[i:] / evals[i]
        n = len(tail)
        log_sum = math.fsum(math.log(x) for x in tail)
        if log_sum <= 1e-12 or (small and n < 8):
            continue
        alpha = 1 + (n - 1 if small else n) / log_sum
        distance = np.abs(1 - tail ** (1 - alpha) - np.arange(n) / n).max()
        score = distance - 0.868 / math.sqrt(n) if small else distance
        if score < best[0]:
            best = (score, i, alpha, distance)
    return best


def detx_num(evals):
    """Smallest number of top eigenvalues whose product, at mean one, is below one. Exact."""
    exact = [float(x).as_integer_ratio() for x in sorted(evals, reverse=True)]
    common = max(denominator for _, denominator in exact)
    integers = [numerator * (common // denominator) for numerator, denominator in exact]
    total, product, limit = sum(integers), 1, 1
    for k, value in enumerate(integers, 1):
        product *= value * len(integers)
        limit *= total
        if product < limit:
            return k
    return None


def pareto(n, alpha, seed=0):
    """Sorted sample of the density x^-alpha above one."""
    uniform = np.random.default_rng(seed).random(n)
    return np.sort((1 - uniform) ** (-1 / (alpha - 1)))


def gaussian(rows, cols, seed=0, dtype=torch.float32):
    """Matrix of independent standard normal entries, without the global generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator, dtype=torch.float64).to(dtype)


def stack_of(*shape, seed=0):
    """Stack of any shape of independent standard normal entries, without the global generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy(rows, cols, seed=0):
    """Matrix of Student-t entries: a spectrum with a tail, as trained layers have."""
    return np.random.default_rng(seed).standard_t(2.5, size=(rows, cols))


def orthogonal(n, seed=0):
    """A float64 orthogonal matrix."""
    return torch.linalg.qr(gaussian(n, n, seed, torch.float64)).Q


class Experts(nn.Module):
    """Three fused expert matrices in one raw parameter."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 16, 12))


class Zoo(nn.Module):
    """One of each layer type whose matrices a state dict describes completely."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.fc = nn.Linear(12, 20)
        self.conv1 = nn.Conv1d(10, 12, 3)
        self.conv2 = nn.Conv2d(10, 12, 3)
        self.conv3 = nn.Conv3d(10, 12, (1, 2, 3))
        self.transposed = nn.ConvTranspose2d(10, 12, 2)
        self.attention = nn.MultiheadAttention(16, 4)
        self.lstm = nn.LSTM(11, 12, num_layers=2, bidirectional=True)
        self.gru = nn.GRU(11, 12)
        self.rnn = nn.RNN(11, 12)
        self.cell = nn.LSTMCell(11, 12)
        self.experts = Experts()
        self.norm = nn.LayerNorm(12)
        self.batch_norm = nn.BatchNorm2d(12)


def zoo(seed=0):
    """A seeded `Zoo`, without touching the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Zoo()


def dense(weight):
    """An `nn.Linear` that holds exactly this weight."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.out_features, layer.in_features = weight.shape
    return layer
