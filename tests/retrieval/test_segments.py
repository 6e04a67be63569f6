from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracompose.retrieval.segments import WORDS, closing, opening, subject

LONG = " ".join(f"w{i}" for i in range(40))


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("Sentence fusion: A. B.", "Sentence fusion", "Sentence fusion: A. B."),
        ("Some text.\nJoin these.", "Some text.", "Join these."),
        ("\n Same meaning?\n- one\n- two\n", "Same meaning?", "- two"),
        ("at 12:30 sharp", "at 12:30 sharp", "at 12:30 sharp"),
        (LONG, " ".join(LONG.split()[:WORDS]), " ".join(LONG.split()[-WORDS:])),
        ("", "", ""),
        (": ", ":", ":"),
    ],
)
def test_edges_are_the_first_line_or_label_and_the_last_line_cut_to_a_number_of_words(text, first, last):
    assert (opening(text), closing(text)) == (first, last)


@given(st.text("ab :\n", max_size=40))
def test_edges_are_parts_of_the_text_of_few_words_and_never_blank_where_the_text_is_not(text):
    for edge in (opening(text), closing(text)):
        assert edge in text
        assert len(edge.split()) <= WORDS
        assert bool(edge.strip()) == bool(text.strip())


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("Split this.\nThe mill was old and the canal was new.", "The mill was old and the canal was new."),
        ("Sentence fusion: The mill was old. It burnt.", "The mill was old. It burnt."),
        ('Say "The mill was old and grey." in German?', "The mill was old and grey."),
        ('He called it " home " and nothing else would do.', 'He called it " home " and nothing else would do.'),
        ("Which area is it: now?", "Which area is it: now?"),
        ("name: The Mill, area: riverside", "The Mill, area: riverside"),
        ("  one  ", "one"),
        ("", ""),
        ('""', '""'),
    ],
)
def test_the_subject_is_the_longest_line_without_a_short_label_or_quotes_around_it(text, about):
    assert subject(text) == about


@given(st.text('ab ":\n', max_size=40))
def test_the_subject_is_a_part_of_the_text_and_more_than_half_of_its_longest_line(text):
    found = subject(text)
    assert found in text
    assert 2 * len(found) >= max(map(len, text.strip().split("\n")))
