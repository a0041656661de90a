"""How far two models are apart, layer by layer: weights, representations, tails and spectra.

A layer of several slices counts as the block-diagonal matrix of them, whose spectrum is the pooled
one. All numbers are in float64 and, but for the two norms, do not depend on the scale of either.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ww_train.comparing.matching import Matching, matched_pairs
from ww_train.comparing.similarity import Decomposed, centred_cka, linear_cka, tail_overlaps, unit
from ww_train.divergence import jensen_shannon_distance
from ww_train.linalg import gram_eigenvalues, has_float64
from ww_train.power_law import TailFit, fit_power_law
from ww_train.selection import Layers
from ww_train.weights.matrices import Skipped, Source, WeightMatrix, slices, weight_matrices
from ww_train.weights.stored import CPU

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LayerDistance:
    """The distance of one layer to the layer of the same name in a base model.

    A and B are the two weight matrices, rows outputs, columns inputs. What is not defined, because a
    matrix is zero or the base has no tail, is None.

    Attributes:
        name: Dotted path of the layer, with `[i]` for a slice by itself.
        layer_type: See `ww_train.weights.matrices.WeightMatrix`.
        N: Larger dimension of one slice.
        M: Smaller dimension of one slice.
        rf: Number of slices.
        frobenius: `||B - A||_F`, in units of the weights (WeightWatcher's "raw").
        relative_frobenius: The same over `||A||_F`.
        spectral: Largest singular value of `B - A`, in units of the weights.
        cosine: `<A, B> / (||A||_F ||B||_F)`, of the weights as vectors.
        cka: Linear CKA `||AᵀB||_F² / (||AᵀA||_F ||BᵀB||_F)`, 0 to 1, rows as examples and columns as
            features, hence unchanged if the columns of either are rotated; not centred. WeightWatcher's
            "cka" is its square root.
        cka_centred: The same with the mean of each column taken off first, as it is defined by
            Kornblith, Norouzi, Lee and Hinton (ICML 2019, linear CKA). None if the rows are equal.
        num_tail: k, the number of eigenvalues in the base's power-law tail.
        left_overlap: Mean squared cosine of the principal angles between the first k left singular
            vectors of A and B: 1 if they span the same space, about `k / rows` by chance.
        right_overlap: The same of the right singular vectors; about `k / columns` by chance.
        esd_distance: Jensen-Shannon distance of the two spectra.
    """

    name: str
    layer_type: str
    N: int
    M: int
    rf: int
    frobenius: float
    relative_frobenius: float | None
    spectral: float
    cosine: float | None
    cka: float | None
    cka_centred: float | None
    num_tail: int | None
    left_overlap: float | None
    right_overlap: float | None
    esd_distance: float


@dataclass(frozen=True)
class Distances:
    """Distances of two models.

    Attributes:
        layers: One for each matched layer that could be read, in the second model's order.
        skipped: Matched layers that could not be, with reasons.
        matching: Which layers matched, and which are missing, extra or reshaped.
    """

    layers: tuple[LayerDistance, ...]
    skipped: tuple[Skipped, ...]
    matching: Matching

    def to_dataframe(self) -> pd.DataFrame:
        """One row a layer, NaN for None; what was left out is in `frame.attrs`."""
        import pandas as pd

        frame = pd.DataFrame([asdict(layer) for layer in self.layers])
        if self.layers:
            optional = list(frame.columns[5:])
            frame[optional] = frame[optional].astype(float)
        m = self.matching
        frame.attrs |= {"missing": list(m.missing), "extra": list(m.extra)}
        frame.attrs["reshaped"] = {layer.name: layer.reason for layer in m.reshaped}
        left_out = (*m.unreadable, *self.skipped)
        frame.attrs["skipped"] = {layer.name: layer.reason for layer in left_out}
        return frame


def distances(
    base: Source,
    other: Source,
    *,
    layers: Layers = None,
    types: str | tuple[str, ...] = (),
    pool: bool = True,
    fit: TailFit = fit_power_law,
) -> Distances:
    """Distance of every layer of a model to the layer of the same name in a base model.

    Args:
        base: The base model; any source that `measure` takes.
        other: The other model.
        layers: Which of its layers, as in `measure`.
        types: Which types of layers.
        pool: Take the slices of a convolution as one block-diagonal matrix; otherwise each is a layer.
        fit: Finds the base's tail, whose size k the overlaps use.

    Raises:
        ValueError: If the models have no layer in common, or none of those asked for.

    Cost: for an N x M layer about `15 N M² + 20 M³` float64 operations and three float64 copies of
    it, on the other model's device; some ten synchronisations.
    """
    before, after = list(weight_matrices(base)), list(weight_matrices(other))
    matching, pairs = matched_pairs(before, after, layers, types)
    measured: list[LayerDistance] = []
    skipped: list[Skipped] = []
    for pair in pairs:
        loaded = [matrix.loaded() for matrix in pair]  # one layer of either model at a time
        for a, b in [loaded] if pool else zip(*map(slices, loaded), strict=True):
            found = layer_distance(a, b, fit=fit)
            if isinstance(found, Skipped):
                skipped.append(found)
            else:
                measured.append(found)
    return Distances(tuple(measured), tuple(skipped), matching)


@torch.no_grad()
def layer_distance(
    base: WeightMatrix, other: WeightMatrix, *, fit: TailFit = fit_power_law
) -> LayerDistance | Skipped:
    """Distance of one layer to another of the same shape; `Skipped` if a weight is not finite."""
    if not has_float64(other.device):
        other = other.to(CPU)
    b = other.stack.detach().to(torch.float64)
    a = base.stack.detach().to(b)
    sizes = [float(x.abs().max()) for x in (a, b)]
    if not all(map(math.isfinite, sizes)):
        return Skipped(other.name, "NaN or infinite weights")
    scale = max(sizes) or 1.0  # squares of the weights, and squares of those, must not overflow
    a, b = a / scale, b / scale
    difference = b - a
    distance, norm_a, norm_b = (float(torch.linalg.vector_norm(x)) for x in (difference, a, b))
    spectral = math.sqrt(float(gram_eigenvalues(difference).max()))
    del difference
    both = norm_a > 0.0 and norm_b > 0.0
    left = right = k = None
    before, after = Decomposed.of(a, base), Decomposed.of(b, other)
    if both and (tail := fit(before.spectrum.positive)):
        k = int(np.count_nonzero(before.spectrum.evals >= tail.xmin))
        left, right = tail_overlaps(before, after, k)
    return LayerDistance(
        name=other.name,
        layer_type=other.layer_type,
        N=other.N,
        M=other.M,
        rf=other.rf,
        frobenius=scale * distance,
        relative_frobenius=distance / norm_a if norm_a > 0.0 else None,
        spectral=scale * spectral,
        cosine=unit(float((a * b).sum()) / (norm_a * norm_b)) if both else None,
        cka=linear_cka(a / norm_a, b / norm_b) if both else None,
        cka_centred=centred_cka(a, b),
        num_tail=k,
        left_overlap=left,
        right_overlap=right,
        esd_distance=jensen_shannon_distance(before.spectrum.evals, after.spectrum.evals),
    )
