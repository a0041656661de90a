"""Keeping a part of every layer's singular values and deleting the others (LASER).

Sharma, Ash and Misra, "The Truth is in There" (ICLR 2024), found that language models often answer
better after the small singular values of some layers are deleted. Which ones stay is said by a rule
(`ww_train.editing.rules`), from the layer's spectrum.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ww_train.editing.edits import Editable, Edits, edit_, write_
from ww_train.editing.rewriting import rewrite_checkpoint
from ww_train.editing.rules import DETX_TAIL, Rule, kept_by
from ww_train.linalg import all_finite, gram, symmetric_eigenvectors
from ww_train.selection import Layers
from ww_train.weights.matrices import NOT_FINITE, Skipped, WeightMatrix


@dataclass(frozen=True)
class Smoothed:
    """What smoothing did to one layer.

    Attributes:
        name: Dotted path of the layer.
        layer_type: See `ww_train.weights.matrices.WeightMatrix`.
        num_evals: Number of eigenvalues of the pooled spectrum.
        rank_before: Eigenvalues above rounding.
        rank_after: Those of them that were kept. The stored weights round the others to about zero.
        energy_kept: Share of the squared Frobenius norm that was kept.
        distance: Relative Frobenius distance between the weights before and after, with rounding:
            `sqrt(1 - energy_kept)` without.
    """

    name: str
    layer_type: str
    num_evals: int
    rank_before: int
    rank_after: int
    energy_kept: float
    distance: float


def svd_smoothing_(
    model: Editable,
    *,
    rule: Rule = DETX_TAIL,
    layers: Layers = None,
    types: str | tuple[str, ...] = (),
    min_evals: int = 8,
) -> Edits[Smoothed]:
    """Delete singular values of every layer, in place; dtype, device and storage stay.

    The slices of a convolution have one pooled spectrum, of which the rule keeps a part: slices may
    keep different numbers. WeightWatcher gives each slice `ceil(k / rf)`, whatever its size.

    Args:
        model: A module, a state dict of tensors, or one matrix.
        rule: What to keep: `DetXTail()` (the default), `PowerLawTail()`, `AboveBulk()`, `Top(0.2)`,
            `Bottom(0.8)`, or a function of your own.
        layers: Which layers, as in `measure`. Call it again for other layers with another rule.
        types: Which types of layers; `"dense"` leaves embeddings out.
        min_evals: Layers with fewer eigenvalues are left alone.

    Returns:
        What was removed from each layer, and which were left alone and why.

    Raises:
        TypeError: If the model cannot be changed in place (a path: see `smooth_checkpoint`).
        ValueError: If a layer or type that was asked for does not exist.

    Cost: one `eigh` and two products a slice, `2 N M² + 9 M³ + 4 N M k` float64 operations, on the
    device of the weights.
    """
    edit = _Truncation(rule)
    return edit_(model, edit, layers=layers, types=types, min_evals=min_evals)


def smoothed(
    source: nn.Module | Mapping[str, Tensor],
    *,
    rule: Rule = DETX_TAIL,
    layers: Layers = None,
    types: str | tuple[str, ...] = (),
    min_evals: int = 8,
) -> tuple[dict[str, Tensor], Edits[Smoothed]]:
    """A copy of a state dict with smoothed weights, and what was removed; the source stays as it is.

    Takes the arguments of `svd_smoothing_`. Tied weights stay tied in the copy.
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    with torch.no_grad():
        copied = {
            key: value.detach() if isinstance(value, Tensor) else value
            for key, value in state.items()
        }
        new = copy.deepcopy(copied)
    done = svd_smoothing_(new, rule=rule, layers=layers, types=types, min_evals=min_evals)
    return new, done


def smooth_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rule: Rule = DETX_TAIL,
    layers: Layers = None,
    types: str | tuple[str, ...] = (),
    min_evals: int = 8,
) -> Edits[Smoothed]:
    """Write a smoothed copy of a safetensors checkpoint, shard by shard.

    Takes the arguments of `svd_smoothing_`; see `ww_train.editing.rewriting.rewrite_checkpoint` for
    the files.
    """
    edit = _Truncation(rule)
    return rewrite_checkpoint(path, out, edit, layers=layers, types=types, min_evals=min_evals)


@dataclass(frozen=True)
class _Truncation:
    """The edit that keeps what a rule says."""

    rule: Rule

    @torch.no_grad()
    def __call__(self, matrix: WeightMatrix) -> Smoothed | Skipped:
        grams = gram(matrix.stack, matrix.scale)
        if not all_finite(grams):
            return Skipped(matrix.name, NOT_FINITE)
        try:
            evals, vectors = symmetric_eigenvectors(grams)
        except RuntimeError as error:  # no convergence, or no memory
            return Skipped(matrix.name, f"the eigenvalue solver failed: {error}")
        flat = evals.clamp_min(0.0).flatten().cpu().numpy()
        order = np.argsort(flat, kind="stable")
        spectrum = matrix.spectrum(flat)
        if spectrum.norm == 0.0:
            return Skipped(matrix.name, "all weights are zero, or so small that their squares are")
        try:
            kept = kept_by(self.rule, spectrum)
        except ValueError as error:
            return Skipped(matrix.name, str(error))
        distance: float | Skipped = 0.0
        if not kept.all():
            mask = np.empty_like(kept)
            mask[order] = kept
            chosen = torch.from_numpy(mask).to(vectors.device).view_as(evals)
            distance = write_(matrix, truncated(matrix.stack, vectors, chosen))
        if isinstance(distance, Skipped):
            return distance
        return Smoothed(
            name=matrix.name,
            layer_type=matrix.layer_type,
            num_evals=len(flat),
            rank_before=spectrum.matrix_rank,
            rank_after=int(np.count_nonzero(kept & (spectrum.evals > spectrum.floor))),
            energy_kept=float(spectrum.evals[kept].sum()) / spectrum.norm,
            distance=distance,
        )


def truncated(stack: Tensor, vectors: Tensor, kept: Tensor) -> Tensor:
    """Project every slice onto some of its singular vectors.

    Args:
        stack: `(rf, rows, cols)` weights.
        vectors: `(rf, M, M)` eigenvectors of the Gram matrices of the shorter side, as columns.
        kept: `(rf, M)`, which of them stay.

    Returns:
        `W V Vᵀ` with the kept columns V, or `V Vᵀ W` for a wide slice, in float64. Its distance from
        what an SVD gives is about `M eps64 lambda_max` over the gap of singular values at the cut.
    """
    result = stack.to(torch.float64, copy=True)
    for w, v, mask in zip(result, vectors, kept, strict=True):
        basis = v[:, mask]
        w.copy_((w @ basis) @ basis.mT if w.shape[0] >= w.shape[1] else basis @ (basis.mT @ w))
    return result
