"""Which layers of two models belong together: the same name and the same shape."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from ww_train.selection import Layers, select
from ww_train.weights.adapters import SUFFIX
from ww_train.weights.matrices import Skipped, WeightMatrix

NAMES_SHOWN = 3
"""Names of each model that an error about two strangers quotes."""


@dataclass(frozen=True)
class Matching:
    """The layers of a base model and of another one, by what they have in common.

    Attributes:
        matched: Names of the layers that both have, in one shape; in the other model's order.
        missing: Names that only the base model has.
        extra: Names that only the other model has.
        reshaped: Layers of both whose shapes differ; the reason gives the shapes.
        unreadable: Layers of both that hold no plain matrix in one of them, with the reason; among
            them weights that are tied to another layer.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    reshaped: tuple[Skipped, ...]
    unreadable: tuple[Skipped, ...]


def match_layers(
    base: Sequence[WeightMatrix | Skipped], other: Sequence[WeightMatrix | Skipped]
) -> Matching:
    """Pair the layers of two models by name.

    Args:
        base: What `weight_matrices` yields of the base model.
        other: What it yields of the other model.

    Raises:
        ValueError: If not a single layer matches; quotes the nearest names.
    """
    partners = {layer.name: layer for layer in base}
    matched, extra = list[str](), list[str]()
    reshaped, unreadable = list[Skipped](), list[Skipped]()
    for layer in other:
        partner = partners.pop(layer.name, None)
        if partner is None:
            extra.append(layer.name)
        elif isinstance(layer, Skipped):
            unreadable.append(layer)
        elif isinstance(partner, Skipped):
            unreadable.append(Skipped(layer.name, f"in the base model: {partner.reason}"))
        elif partner.shape != layer.shape:
            reshaped.append(Skipped(layer.name, _shapes(partner, layer)))
        else:
            matched.append(layer.name)
    found = Matching(
        tuple(matched), tuple(partners), tuple(extra), tuple(reshaped), tuple(unreadable)
    )
    if not matched:
        raise ValueError(f"the two models have no layer in common: {_strangers(found)}")
    return found


def matched_pairs(
    base: Sequence[WeightMatrix | Skipped],
    other: Sequence[WeightMatrix | Skipped],
    layers: Layers = None,
    types: str | tuple[str, ...] = (),
) -> tuple[Matching, list[tuple[WeightMatrix, WeightMatrix]]]:
    """The matching of two whole models, and those of its pairs that are asked for.

    Args:
        base: What `weight_matrices` yields of the base model.
        other: What it yields of the other model.
        layers: Which of the other model's layers, as in `measure`.
        types: Which types of layers.

    Raises:
        ValueError: If the models have no layer in common, or none of those asked for.
    """
    matching = match_layers(base, other)
    by_name = {layer.name: layer for layer in base if isinstance(layer, WeightMatrix)}
    kinds = ["skipped" if isinstance(layer, Skipped) else layer.layer_type for layer in other]
    names = [layer.name for layer in other]
    chosen = select(list(zip(names, kinds, strict=True)), layers, types)
    matched = set(matching.matched)
    pairs = [
        (by_name[layer.name], layer)
        for layer, wanted in zip(other, chosen, strict=True)
        if wanted and isinstance(layer, WeightMatrix) and layer.name in matched
    ]
    if not pairs:
        raise ValueError("none of the chosen layers is in both models in one shape")
    return matching, pairs


def _shapes(base: WeightMatrix, other: WeightMatrix) -> str:
    before, after = (" x ".join(map(str, m.shape)) for m in (base, other))
    return f"{before} in the base model, {after} in the other (slices x rows x columns)"


def _strangers(found: Matching) -> str:
    """Why nothing matches, for the error."""
    for layer in (*found.reshaped, *found.unreadable):
        return f"{layer.name} and others have the same names, but {layer.reason}"
    if not found.missing or not found.extra:
        empty = "base" if not found.missing else "other"
        return f"the {empty} model holds no matrix"
    if all(name.endswith(SUFFIX) for name in found.extra):
        return "the other one is a LoRA adapter: pass ww_train.merge(base, adapter) instead"
    if all(name.endswith(SUFFIX) for name in found.missing):
        return "the base is a LoRA adapter: give the model that it was trained on first"
    pairs = []
    for name in found.extra[:NAMES_SHOWN]:
        (near,) = difflib.get_close_matches(name, found.missing, n=1, cutoff=0.0)
        pairs.append(f"{near!r} against {name!r}")
    return f"the nearest names are {', '.join(pairs)}; rename the keys of one of them"
