"""The table of layers of a report page, with a row of details under each."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from ww_train.columns import Row
from ww_train.page.esd import esd_svg
from ww_train.page.markup import element
from ww_train.page.summary import advice, anchor
from ww_train.report import LayerReport, Report, worst_first
from ww_train.tables import printable, shortened, text
from ww_train.verdicts import WORST_FIRST

COLUMNS = ("alpha", "D", "num_pl_spikes", "ERG_gap", "num_traps", "N", "M")
"""Columns of numbers; those that were not measured are left out."""

GROUPS = {
    "Tail": "alpha sigma alpha_low alpha_high p_value D xmin xmax num_pl_spikes Lambda raw_alpha",
    "ERG condition": "detX_num detX_val ERG_gap trace_log",
    "Size and norms": "num_evals Q rf log_norm log_spectral_norm stable_rank matrix_rank entropy "
    "alpha_weighted log_alpha_norm",
    "Random bulk": "num_spikes sigma_mp bulk_max mp_softrank",
    "Shuffled weights": "num_traps num_traps_mean max_rand_eval rand_bulk_max rand_distance "
    "ww_softrank",
}
"""Numbers of the details."""

FIGURES = 300
"""So many layers, the worst, have a figure; it keeps the page of a large model at a few MB."""

NAMED_CAUSES = 12
"""Causes of traps that the details name."""

LONGEST = 44
"""Longer names are shortened in the middle in the table; the details have them in full."""

KEY = (
    ("tail", "power-law tail"),
    ("fit", "power law"),
    ("xmin", "its start (xmin)"),
    ("detx", "start of the ERG tail (detX)"),
    ("shuffled", "shuffled weights"),
    ("edge", "end of their noise: traps lie beyond"),
)
"""Classes of the parts of a figure, and what they are."""


def layers_section(report: Report) -> Element:
    """Heading, filter and table."""
    rows = [layer.to_dict() for layer in report]
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    drawn = {layer.name for layer in worst_first(report)[:FIGURES]}
    heads = [
        _head("layer"),
        _head("verdict"),
        *(_head(x, "number") for x in columns),
        _head("type"),
    ]
    table = element("table", element("thead", element("tr", *heads)), class_="layers")
    for position, (layer, row) in enumerate(zip(report, rows, strict=True)):
        summary = _row(layer, row, columns)
        detail = element("tr", class_="detail", id=f"{anchor(layer)}-detail", hidden="hidden")
        detail.append(_details(layer, row, len(heads), drawn=layer.name in drawn))
        body = element("tbody", summary, detail, id=anchor(layer), data_verdict=layer.verdict)
        body.set("data-position", str(position))
        table.append(body)
    scroll = element(
        "div", table, class_="scroll", tabindex="0", role="region", aria_label="Layers"
    )
    note = f" Figures are drawn for the worst {FIGURES}." if len(report) > FIGURES else ""
    hint = element("p", f"Press a name for details, a heading to sort.{note}", class_="note")
    return element("section", element("h2", "Layers"), hint, _filter(report), scroll)


def _head(name: str, kind: str = "") -> Element:
    return element("th", element("button", name, type="button"), scope="col", class_=kind)


def _filter(report: Report) -> Element:
    present = {layer.verdict for layer in report}
    options = [element("option", "all", value="")]
    options += [element("option", word, value=word) for word in WORST_FIRST if word in present]
    return element(
        "form",
        element(
            "label", "Layers with", element("input", id="name", type="search", autocomplete="off")
        ),
        element("label", "Verdict", element("select", *options, id="verdict")),
        element("output", f"{len(report)} layers", id="shown", aria_live="polite", class_="note"),
        class_="filter",
    )


def _row(layer: LayerReport, row: Row, columns: Sequence[str]) -> Element:
    name = printable(layer.name)
    button = element("button", shortened(name, LONGEST), type="button", title=name)
    button.set("aria-expanded", "false")
    button.set("aria-controls", f"{anchor(layer)}-detail")
    rank = str(WORST_FIRST.index(layer.verdict))
    cells = [
        element("th", button, scope="row", data_sort=name),
        element("td", layer.verdict, data_sort=rank, class_=f"verdict {layer.verdict}"),
    ]
    for column in columns:
        value = row.get(column)
        key = "" if value is None else repr(value)
        cells.append(element("td", text(value, column), data_sort=key, class_="number"))
    cells.append(element("td", layer.layer_type, data_sort=layer.layer_type))
    return element("tr", *cells)


def _details(layer: LayerReport, row: Row, width: int, *, drawn: bool) -> Element:
    head = element("div", element("h3", printable(layer.name)), element("p", f"{advice(layer)}."))
    if layer.warning:
        head.append(element("p", f"Warning: {printable(layer.warning)}.", class_="note"))
    parts = [head]
    if drawn:
        parts.append(element("figure", esd_svg(layer), _key(layer)))
    numbers = element("div", class_="numbers")
    for title, names in GROUPS.items():
        terms = [x for name in names.split() if name in row for x in _term(name, row)]
        if terms:
            numbers.append(element("section", element("h3", title), element("dl", *terms)))
    numbers.append(_causes(layer))
    parts.append(numbers)
    return element("td", element("div", *parts, class_="inside"), colspan=str(width))


def _term(name: str, row: Row) -> tuple[Element, Element]:
    return element("dt", name), element("dd", text(row[name], name))


def _causes(layer: LayerReport) -> Element:
    """What makes the traps, if there are any."""
    section = element("section")
    if layer.num_traps:
        items = [element("li", str(cause)) for cause in layer.trap_causes[:NAMED_CAUSES]]
        if not items:
            items = [element("li", "no single weight: large ones that met in the shuffle")]
        if (more := len(layer.trap_causes) - NAMED_CAUSES) > 0:
            items.append(element("li", f"and {more} more"))
        section.extend([element("h3", "What makes the traps"), element("ul", *items)])
    return section


def _key(layer: LayerReport) -> Element:
    there = {
        "tail": layer.fit,
        "fit": layer.fit,
        "xmin": layer.fit,
        "detx": layer.erg.detX_val,
        "shuffled": layer.shuffled,
        "edge": layer.traps,
    }
    items = []
    for kind, meaning in KEY:
        if there[kind] is not None:
            shape = "M0 0H20V10H0z" if kind == "tail" else "M0 5H20"
            sample = element("svg", element("path", class_=kind, d=shape), class_="esd")
            sample.set("viewBox", "0 0 20 10")
            sample.set("aria-hidden", "true")
            items.append(element("span", sample, meaning))
    return element("figcaption", *items, class_="key")
