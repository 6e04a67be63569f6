"""Documents with places for what is made from results: blocks between two marks of one name."""

from __future__ import annotations

from collections.abc import Mapping


def marks(name: str) -> tuple[str, str]:
    """The lines before and after a block."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def fill(document: str, blocks: Mapping[str, str]) -> str:
    """A document with each block in the place between the two marks of its name; the rest stays as it is.

    Raises:
        ValueError: the document does not have the marks of a block once each, in order.
    """
    for name, text in blocks.items():
        begin, end = marks(name)
        if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
            raise ValueError(f"the document needs the lines {begin} and {end}, once each and in this order")
        head, rest = document.split(begin)
        document = f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return document
