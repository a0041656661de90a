"""The head of a report page: a paragraph in plain words, where to look first, and the main numbers."""

from __future__ import annotations

import statistics
from collections import Counter
from xml.etree.ElementTree import Element

from ww_train.page.markup import element
from ww_train.report import LayerReport, Report, worst_first
from ww_train.tables import printable, text
from ww_train.verdicts import FINE, WORST_FIRST

LOOKED_AT_FIRST = 5
"""Layers that the head of the page names with what to do."""


def anchor(layer: LayerReport) -> str:
    """Identifier of a layer's row on the page; not its name, which may hold anything."""
    part = "" if layer.slice_id is None else f"-{layer.slice_id}"
    return f"layer-{layer.layer_id}{part}"


def opening(report: Report) -> Element:
    """The verdict on the model as a paragraph, and the layers to look at first with what to do."""
    attention = [layer for layer in worst_first(report) if layer.verdict not in FINE]
    lead = element("p", *_sentences(report, len(attention)), class_="lead")
    section = element("section", lead)
    if attention:
        first = attention[:LOOKED_AT_FIRST]
        more = len(attention) - len(first)
        rest = f" ({more} more need attention; sort or filter the table for them)" if more else ""
        section.append(element("p", f"Look first at{rest}:"))
        section.append(element("ul", *(_advised(layer) for layer in first)))
    return section


def _sentences(report: Report, attention: int) -> list[str]:
    counts = Counter(layer.verdict for layer in report)
    listed = [f"{counts[word]} {word}" for word in WORST_FIRST if counts[word]]
    alphas = [layer.alpha for layer in report if layer.alpha is not None]
    sentences = ["No layer was measured. "]
    if listed:
        sentences = [f"{_layers(len(report))}: {_and(listed)}. "]
    if alphas:
        sentences.append(
            f"The median alpha is {statistics.median(alphas):.2f}; 2 to 6 is healthy. "
        )
    if not attention and listed:
        sentences.append("No layer needs attention. ")
    if report.layers and all(layer.traps is None for layer in report):
        sentences.append("Correlation traps were not looked for (--randomize does). ")
    if report.skipped:
        sentences.append(f"{_layers(len(report.skipped)).capitalize()} could not be analysed. ")
    return sentences


def _advised(layer: LayerReport) -> Element:
    link = element("a", printable(layer.name), href=f"#{anchor(layer)}")
    return element("li", link, f": {advice(layer)}")


def advice(layer: LayerReport) -> str:
    """What to do about a layer, without its name."""
    return printable(layer.advice.removeprefix(f"layer {layer.name}: "))


def cards(report: Report) -> Element:
    """The main numbers of the model, and the shares of the verdicts as a bar."""
    summary = report.summary()
    traps = [layer.num_traps for layer in report if layer.num_traps is not None]
    numbers = [("layers", str(len(report)))]
    counts = Counter(layer.verdict for layer in report)
    words = [word for word in WORST_FIRST if counts[word]]
    if traps:
        numbers.append(("correlation traps", str(sum(traps))))
    shown = (
        "alpha",
        "alpha_weighted",
        "log_norm",
        "log_spectral_norm",
        "stable_rank",
        "mp_softrank",
    )
    numbers += [(f"mean {name}", text(summary[name], name)) for name in shown if name in summary]
    items = [
        element("li", element("b", str(counts[word]), class_=word), element("span", word))
        for word in words
    ]
    items += [element("li", element("b", value), element("span", name)) for name, value in numbers]
    bar = [element("i", class_=word, style=f"flex:{counts[word]}", title=word) for word in words]
    return element(
        "section",
        element("h2", "Summary"),
        element("div", *bar, class_="share", aria_hidden="true"),
        element("ul", *items, class_="cards"),
    )


def _layers(number: int) -> str:
    return "1 layer" if number == 1 else f"{number} layers"


def _and(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
