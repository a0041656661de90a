"""HTML elements built in Python: every text is escaped by the serialiser, whoever wrote it."""

from __future__ import annotations

from typing import TypeAlias
from xml.etree.ElementTree import Element, tostring

Content: TypeAlias = "Element | str"


def element(tag: str, *content: Content, **attributes: str) -> Element:
    """An element with texts and elements in it.

    Args:
        tag: Its name.
        *content: What is in it, in order.
        **attributes: Its attributes: `class_` is class, `aria_sort` is aria-sort.
    """
    names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
    result = Element(tag, {names[key]: value for key, value in attributes.items()})
    last: Element | None = None
    for item in content:
        if isinstance(item, Element):
            result.append(item)
            last = item
        elif last is None:
            result.text = (result.text or "") + item
        else:
            last.tail = (last.tail or "") + item
    return result


def html(content: Element) -> str:
    """The element as HTML."""
    return tostring(content, encoding="unicode", method="html")
