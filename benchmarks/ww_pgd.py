"""WW_PGD 0.1.0 as it is: its published code, re-implemented from its description.

For timing (benchmarks/projection_speed.py) and comparison only, faults included. At the end of an
epoch weightwatcher analyses the whole model on the CPU (`analyze(detX=True)`); then, layer by layer,
a full singular value decomposition, a Cayley step of the tail towards a power law, a retraction and a
blend. What is wrong with it, by the numbers that `ww_train.steering.tail_projection` refers to:

P1   a linear layer that is the model itself is never found, and nothing happens
P2   the midpoint rule can only shorten the power-law tail; the paper's tail is the midpoint
P3   the tail's trace-log is kept; in the paper it becomes zero, on the scale of mean one
P4   the blend undoes the retraction, and the tail may sink below the largest of the bulk
P5   the Cayley factor has a pole at a log distance of 1/cayley, beyond which it points the wrong way
     up to its clamp; cayley 0 is the whole way, not the identity
P6   convolutions: xmin is of the pooled slices, the eigenvalues are of the flattened kernel
P7   it is no torch optimizer: no scheduler, no scaler, no checkpoint (not re-implemented)
P8   weights of 16 bits have no singular value decomposition
P9   tied weights are projected twice; embeddings, heads and frozen layers are projected too
P10  one layer with NaN ends the training; the analysis also runs when the hardness is zero
P12  alpha saturates above 2 while the tail shrinks
P13  singular values below 1e-8 are lifted to it, those of a zero matrix too
"""

from __future__ import annotations

import torch
from peer import peer_analyze
from torch import Tensor, nn


@torch.no_grad()
def ww_pgd_(
    model: nn.Module,
    hard: float,
    *,
    q: float = 1.0,
    blend: float = 0.5,
    cayley: float = 0.25,
    min_tail: int = 5,
) -> dict[str, int]:
    """One projection of every layer that weightwatcher has a row for, in place.

    Args:
        model: The network, in float32.
        hard: Hardness, 0 to 1; multiplies blend and cayley.
        q: Exponent of the template; `1 + 1/q` is the alpha aimed at.
        blend: Share of the new weights.
        cayley: Step of the tail.
        min_tail: Layers with a shorter tail stay.

    Returns:
        Size of the tail of each projected layer.
    """
    details = peer_analyze(model, detX=True)
    modules = dict(model.named_modules())
    tails = {}
    for row in details.itertuples():
        module = modules.get(row.longname)
        if hard <= 0.0 or module is None:
            continue
        weight = module.weight
        flat = weight.reshape(weight.shape[0], -1)
        U, S, Vh = torch.linalg.svd(flat, full_matrices=False)
        evals = S.square()
        k = tail_size(evals, float(row.xmin), int(row.detX_num))
        if k < min_tail:
            continue
        new = evals.clone()
        new[:k] = retract(cayley_step(evals[:k], template(evals[:k], q), cayley * hard), evals[:k])
        projected = (U * new.sqrt().clamp_min(1e-8)) @ Vh
        weight.lerp_(projected.view_as(weight), blend * hard)
        tails[row.longname] = k
    return tails


def tail_size(evals: Tensor, xmin: float, detX_num: int) -> int:
    """Eigenvalues at or above both xmin and the one at the midpoint of both tails."""
    power_law = int((evals >= xmin).sum())
    midpoint = min(max((power_law + detX_num) // 2, 1), len(evals))
    return int((evals >= max(xmin, float(evals[midpoint - 1]))).sum())


def template(tail: Tensor, q: float) -> Tensor:
    """`A i^-q` with the product of the tail itself."""
    logs = -q * torch.arange(1, len(tail) + 1, dtype=tail.dtype, device=tail.device).log()
    return (logs - logs.mean() + tail.log().mean()).exp()


def cayley_step(tail: Tensor, target: Tensor, eta: float) -> Tensor:
    """`(1 - eta g) / (1 + eta g)` times the tail, g its log distance from the target."""
    if eta <= 0.0:
        return target
    g = tail.log() - target.log()
    return tail * ((1.0 - eta * g) / (1.0 + eta * g)).clamp(0.1, 10.0)


def retract(moved: Tensor, tail: Tensor) -> Tensor:
    """Scaled to the product that the tail had."""
    return moved * (tail.log().mean() - moved.log().mean()).exp()
