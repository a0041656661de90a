"""Conditions on a table of layers, such as `alpha<2`: what `ww-train --fail-if` understands."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_COMPARE: Mapping[str, Callable[[Any, float], Any]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}

AGGREGATES = ("mean", "median", "min", "max", "sum")
"""What a condition may take of a column instead of each of its values."""

NUM_SKIPPED = "num_skipped"
"""What is compared as if it were a column: the number of layers that were not measured."""

_FORM = re.compile(
    r"(?:(?P<aggregate>[a-z]+)\(\s*(?P<of>\w+)\s*\)|(?P<column>\w+))"
    r"\s*(?P<compare><=|>=|==|!=|<|>)\s*(?P<number>[-+.\w]+)"
)


@dataclass(frozen=True)
class Condition:
    """`column compare number`, of any layer, or of an aggregate over all layers.

    Attributes:
        column: Name of a column of numbers, or `NUM_SKIPPED`.
        compare: One of <, <=, >, >=, ==, !=.
        number: What the column is compared with.
        aggregate: One of `AGGREGATES`; "" to look at each layer.
    """

    column: str
    compare: str
    number: float
    aggregate: str = ""

    def __str__(self) -> str:
        what = f"{self.aggregate}({self.column})" if self.aggregate else self.column
        return f"{what}{self.compare}{self.number:g}"

    def check(self, frame: pd.DataFrame) -> None:
        """Raise ValueError if `frame` has no such column of numbers; names the nearest."""
        from pandas.api.types import is_numeric_dtype

        if self.of_skipped:
            return
        known = [str(name) for name in frame.columns if is_numeric_dtype(frame[name])]
        if self.column in known:
            return
        if self.column in frame.columns:
            raise ValueError(f"condition {self}: {self.column} is text, not a number")
        near = difflib.get_close_matches(self.column, known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(known)}"
        raise ValueError(f"condition {self}: there is no column {self.column!r}{hint}")

    @property
    def of_skipped(self) -> bool:
        """Whether it is about the layers that were skipped."""
        return self.column == NUM_SKIPPED and not self.aggregate

    def met_by_skipped(self, skipped: Sequence[str]) -> list[str]:
        """As `met_by`, of the number of layers that were skipped: their names or, of none, "0"."""
        return list(skipped or ["0"]) if _COMPARE[self.compare](len(skipped), self.number) else []

    def met_by(self, frame: pd.DataFrame, label: str = "longname") -> list[str]:
        """What satisfies the condition, as text: "layer (value)" each; empty if nothing does.

        A value that is NaN satisfies no condition, also not `!=`; aggregates leave NaN out.

        Args:
            frame: One row a layer.
            label: Column that names the row.
        """
        values = frame[self.column].astype(float)
        values = values[values.notna()]
        compare = _COMPARE[self.compare]
        if self.aggregate:
            value = float(getattr(values, self.aggregate)()) if len(values) else math.nan
            met = not math.isnan(value) and compare(value, self.number)
            return [f"{self.aggregate} {value:.4g}"] if met else []
        chosen = values[compare(values, self.number)]
        return [f"{frame[label][i]} ({value:.4g})" for i, value in chosen.items()]


def condition(text: str) -> Condition:
    """Read `alpha<2`, `mean(alpha) > 6` and the like.

    Raises:
        ValueError: If it is no such condition; says what one looks like.
    """
    match = _FORM.fullmatch(text.strip())
    forms = "write one like 'alpha<2' or 'mean(alpha)>6'"
    if match is None:
        raise ValueError(f"{text!r} is no condition; {forms}, with <, <=, >, >=, == or !=")
    aggregate = match["aggregate"] or ""
    if aggregate and aggregate not in AGGREGATES:
        raise ValueError(f"{text!r}: {aggregate!r} is none of {', '.join(AGGREGATES)}")
    try:
        number = float(match["number"])
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"{text!r}: {match['number']!r} is not a number; {forms}")
    return Condition(match["of"] or match["column"], match["compare"], number, aggregate)
