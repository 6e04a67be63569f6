"""Marked places of a document: filled alone, and again without change."""

from __future__ import annotations

import pytest

from loracompose.marked import fill, marks

BEGIN, END = marks("one")


def test_blocks_are_filled_in_their_places_and_again_without_change():
    document = "# A\n<!-- one: begin -->\nold\n<!-- one: end -->\ntext\n<!-- two: begin -->\n<!-- two: end -->\n"
    once = fill(document, {"one": "1", "two": "2"})
    assert once == ("# A\n<!-- one: begin -->\n1\n<!-- one: end -->\ntext\n<!-- two: begin -->\n2\n<!-- two: end -->\n")
    assert fill(once, {"one": "1", "two": "2"}) == once
    with pytest.raises(ValueError, match="three: begin"):
        fill(document, {"three": "3"})


@pytest.mark.parametrize("document", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_document_without_its_marks_is_refused(document):
    with pytest.raises(ValueError, match="needs the lines"):
        fill(document, {"one": "1"})
