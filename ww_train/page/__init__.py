"""A report as one HTML page that needs nothing else: no network, no other file, no server."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from dataclasses import replace
from html import escape
from importlib import resources
from importlib.metadata import version
from string import Template
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from ww_train import exports
from ww_train.glossary import DETAILS, HEADLINES, VERDICTS
from ww_train.page.layers import layers_section
from ww_train.page.markup import element, html
from ww_train.page.summary import cards, opening
from ww_train.report import Report
from ww_train.tables import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESOLUTION = 130
"""Dots per inch of the figures of the model."""


def write_page(
    report: Report,
    path: str | os.PathLike[str],
    *,
    title: str = "Weight spectra",
    date: str = "",
    options: str = "",
) -> None:
    """Write `render(report)` to a file, whole or not at all.

    Args:
        report: What `measure` found.
        path: The file; "-" for standard output.
        title: See `render`.
        date: See `render`.
        options: See `render`.
    """
    page = render(report, title=title, date=date, options=options)
    exports.write_bytes(page.encode("utf-8", "backslashreplace"), path)


def render(
    report: Report, *, title: str = "Weight spectra", date: str = "", options: str = ""
) -> str:
    """The page, as HTML: verdict, summary, figures, table of layers with details, glossary.

    The same arguments give the same page. Names of layers are escaped: a checkpoint from a stranger
    cannot put anything into it. Figures of the model need Matplotlib and are left out without it.

    Args:
        report: What `measure` found; traps and the random bulk are shown if they were measured.
        title: Heading of the page, such as the name of the model.
        date: When it was made, as text; "" to leave that out.
        options: How it was made, such as the command.
    """
    script = _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_part("page.html")).substitute(
        title=escape(printable(title)),
        style=_part("page.css"),
        script=script,
        script_hash=f"sha256-{digest}",
        verdict=html(opening(report)),
        cards=html(cards(report)),
        figures=html(_figures(report)),
        layers=html(layers_section(report)),
        skipped=html(_skipped(report)),
        glossary=html(_glossary()),
        made=html(_made(date, options)),
    )


def _part(name: str) -> str:
    return resources.files("ww_train.page").joinpath(name).read_text(encoding="utf-8")


def _figures(report: Report) -> Element:
    """The figures of the whole model."""
    section = element("section")
    if not report.layers:
        return section
    section.append(element("h2", "The model"))
    try:
        from ww_train import plots
    except ModuleNotFoundError:
        section.append(element("p", "Figures need Matplotlib: pip install 'ww-train[plots]'"))
        return section
    # names with control characters have no glyphs
    report = Report(tuple(replace(x, name=printable(x.name)) for x in report), report.skipped)
    drawn = [
        ("Histogram of alpha over the layers", plots.alpha_histogram(report)),
        ("Alpha of the layers against their depth", plots.correlation_flow(report)),
    ]
    if any(layer.rand_distance is not None for layer in report):
        meaning = "Alpha of the layers against the distance to their shuffled weights"
        drawn.append((meaning, plots.alpha_vs_rand_distance(report)))
    images = [element("figure", _image(figure, meaning)) for meaning, figure in drawn]
    section.append(element("div", *images, class_="figures"))
    return section


def _image(figure: Figure, meaning: str) -> Element:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=RESOLUTION, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return element("img", alt=meaning, src=f"data:image/png;base64,{data}")


def _skipped(report: Report) -> Element:
    section = element("section")
    if report.skipped:
        section.append(element("h2", "Layers that were not analysed"))
        items = [f"{printable(layer.name)}: {printable(layer.reason)}" for layer in report.skipped]
        section.append(element("ul", *(element("li", item) for item in items)))
    return section


def _glossary() -> Element:
    section = element("section", element("h2", "Glossary"), class_="glossary")
    for title, terms in (("Verdicts", VERDICTS), ("Numbers", (*HEADLINES, *DETAILS))):
        entries = []
        for term in terms:
            healthy = f" Healthy: {term.healthy}." if term.healthy else ""
            entries += [element("dt", term.name), element("dd", f"{term.meaning}{healthy}")]
        block = element("details", element("summary", title), element("dl", *entries))
        section.append(block)
    return section


def _made(date: str, options: str) -> Element:
    made = element("p", f"Made by ww_train {version('ww-train')}")
    if date:
        made = element("p", f"{made.text} on {date}")
    if options:
        made.text = f"{made.text}: "
        made.append(element("code", printable(options)))
    return made
