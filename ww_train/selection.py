"""Choosing layers by name, glob, regular expression, position and type."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from numbers import Integral
from typing import TypeAlias

Pattern: TypeAlias = "str | int | re.Pattern[str]"
Layers: TypeAlias = "Pattern | Sequence[Pattern] | None"


def select(
    catalogue: Sequence[tuple[str, str]], layers: Layers = None, types: str | Iterable[str] = ()
) -> list[bool]:
    """Which layers of a model are meant.

    Args:
        catalogue: Name and type of every layer, in model order.
        layers: One pattern or several, of which one must match: an exact name ("encoder.0.fc1"), a
            glob ("encoder.*"), a compiled regular expression (searched anywhere in the name) or a
            position (0 is the first layer, -1 the last). A string with a leading "-" excludes what
            it matches; with exclusions only, all other layers are meant. None means all.
        types: Layer types, of which one must match as well; none means all.

    Returns:
        One flag a layer.

    Raises:
        ValueError: If a pattern, position or type matches no layer; the nearest name is suggested.
        TypeError: If a pattern is none of the above.
    """
    names = [name for name, _ in catalogue]
    if layers is None:
        patterns: list[Pattern] = []
    elif isinstance(layers, Iterable) and not isinstance(layers, str):
        patterns = list(layers)  # also an array or a Series, such as a column of `analyze`
    else:
        patterns = [layers]
    included, excluded = set[int](), set[int]()
    positive = False
    for pattern in patterns:
        if isinstance(pattern, str) and pattern.startswith("-"):
            excluded |= _matching(pattern[1:], names)
        else:
            positive = True
            included |= _matching(pattern, names)
    if not positive:
        included = set(range(len(names)))
    wanted = {types} if isinstance(types, str) else set(types)
    known = {kind for _, kind in catalogue} - {"skipped"}
    if unknown := wanted - known:
        raise ValueError(
            f"no layer is of type {', '.join(sorted(unknown))}; "
            f"the types here are {', '.join(sorted(known))}"
        )
    chosen = included - excluded
    return [i in chosen and (not wanted or kind in wanted) for i, (_, kind) in enumerate(catalogue)]


def _matching(pattern: Pattern, names: list[str]) -> set[int]:
    if isinstance(pattern, bool) or not isinstance(pattern, str | Integral | re.Pattern):
        raise TypeError(
            "layers are chosen by name, glob, compiled regular expression or position, "
            f"got {pattern!r} of type {type(pattern).__name__}"
        )
    if isinstance(pattern, Integral):
        position = int(pattern)
        if not -len(names) <= position < len(names):
            raise ValueError(f"there is no layer {position}: the model has {len(names)} layers")
        return {position % len(names)}
    matches: Callable[[str], object]
    if isinstance(pattern, re.Pattern):
        matches = pattern.search
    elif pattern in names:  # an exact name may contain the special characters of globs
        matches = pattern.__eq__
    else:
        glob = pattern

        def matches(name: str) -> bool:
            return fnmatchcase(name, glob)

    found = {i for i, name in enumerate(names) if matches(name)}
    if not found:
        text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
        near = difflib.get_close_matches(text, names, n=1, cutoff=0.4)
        hint = (
            f"; the first of {len(names)} is {names[0]!r}" if names else ": the model has no layers"
        )
        hint = f"; did you mean {near[0]!r}?" if near else hint
        raise ValueError(f"no layer matches {text!r}{hint}")
    return found
