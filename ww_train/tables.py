"""Tables of layers as text: on a terminal as many columns as fit, in a pipe plain and whole."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

GAP = 2
"""Spaces between two columns."""

MIN_NAME = 28
"""Names are shortened to this many characters, or to a third of the width, to make room."""

UNLIMITED = 10**6
"""Width of a console that wraps nothing."""

STYLES: Mapping[str, str] = {
    "trapped": "bold red",
    "over-trained": "red",
    "critical": "bold green",
    "well-trained": "green",
    "random-like": "cyan",
    "under-trained": "yellow",
    "malformed": "magenta",
}
"""Colours of verdicts on a terminal that has colours."""

_PLACES = {
    **dict.fromkeys(("alpha", "alpha_low", "alpha_high", "alpha_base", "alpha_finetuned"), ".2f"),
    **{"alpha_of_delta": ".2f", "alpha_change": "+.2f", "relative_delta": ".3f", "D": ".3f"},
}


def console() -> Console:
    """Standard output; where that is no terminal, without colours and without a limit of width."""
    terminal = Console(highlight=False, emoji=False, markup=False)
    if terminal.is_terminal:
        return terminal
    return Console(highlight=False, emoji=False, markup=False, width=UNLIMITED)


def show(frame: pd.DataFrame, columns: Sequence[str], importance: Sequence[str] = ()) -> None:
    """Print a table; on a terminal, only the columns that fit its width.

    Args:
        frame: One row a layer; its first column in `columns` names the layer.
        columns: What to print, from left to right; those that `frame` lacks are left out.
        importance: The columns that may go if there is no room, the first to stay first; columns
            that are not among them always stay. None, and the table is as wide as it is.
    """
    out = console()
    limit = out.width if importance else UNLIMITED
    columns = [name for name in columns if name in frame.columns]
    cells = {name: [text(value, name) for value in frame[name]] for name in columns}
    widths = {name: max(map(len, [name, *cells[name]])) for name in columns}
    first = columns[0]
    room = min(widths[first], max(MIN_NAME, limit // 3))
    shown = fitting(widths | {first: room}, importance, limit)
    rest = sum(widths[name] + GAP for name in shown if name != first)
    cells[first] = [shortened(name, max(room, limit - rest)) for name in cells[first]]
    numbers = {name for name in shown if all(isinstance(x, Real) for x in frame[name])}
    _print(out, {name: cells[name] for name in shown}, numbers)
    if left_out := [name for name in columns if name not in shown]:
        print(f"not shown for lack of room: {', '.join(left_out)} (--wide shows all)")


def _print(out: Console, cells: Mapping[str, Sequence[str]], numbers: Container[str]) -> None:
    """Print columns of cells, those of numbers to the right; nothing is cut."""
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    for name in cells:
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    for line in zip(*cells.values(), strict=True):
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in line))
    out.width = UNLIMITED
    with out.capture() as rendered:  # printed by rich, a closed pipe would end the process
        out.print(table)
    print("\n".join(line.rstrip() for line in rendered.get().splitlines()))


def fitting(widths: Mapping[str, int], importance: Sequence[str], width: int) -> list[str]:
    """The columns, in their order, that fit a line when the least important go."""
    shown = list(widths)
    for name in reversed(importance):
        if sum(widths[column] + GAP for column in shown) - GAP <= width:
            break
        if name in shown:
            shown.remove(name)
    return shown


def text(value: object, column: str = "") -> str:
    """One cell: numbers to a few digits, "-" for what is missing, no control characters."""
    if isinstance(value, bool | Integral):
        return str(value)
    if isinstance(value, Real):
        number = float(value)
        if number != number:
            return "-"
        if number.is_integer() and abs(number) < 1e6 and column not in _PLACES:
            return str(int(number))
        shown = format(number, _PLACES.get(column, ".4g"))
        return shown if float(shown) else "0"  # not "-0.00"
    return "-" if value is None else printable(str(value))


def printable(words: str) -> str:
    """Text on one line in which nothing can steer a terminal; an escape is shown as its number."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def shortened(name: str, width: int) -> str:
    """The name with its middle left out if it is longer than `width`."""
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"
