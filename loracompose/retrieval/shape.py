"""The shape of a prompt's subject: how many sentences, lines, words and marks it has, whatever they say.

A phrasing never seen changes the instruction, and leaves the subject the kind of text that it was: one sentence to be
split or two to be fused, a command in small letters, a question, a record of keys and values. Encoders of meaning
hardly tell such things, and words cannot. Every property is a number in [0, 1] on a scale of its own, fixed once and
not fitted, so that adapters come and go exactly; a discriminant compares them (`discriminant.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.segments import subject

_WORD = re.compile(r"\S+")
_CAPITALISED = re.compile(r"\b[^\W\d_a-z]\w+")
_NUMBER = re.compile(r"\d+")
_SPACED_MARK = re.compile(r" [.,]")
_END = re.compile(
    r"(?<!\b[^\W\d_])(?<!\b[A-Z][a-z])"  # not after initials, nor "Mr" and the like
    r"[.!?]++[\"'”)\]]*+"  # possessive: no input makes the search quadratic
    r"(?=\s*+$|\s++(?:[\"'“(\[]++\s*+)?[^\W_a-z]|\s++[\"'“(\[]++\s)"  # the text ends, or a sentence begins
)


def sentences(text: str) -> int:
    """Sentences of a text, by their ends; in a text without capitals only its own end counts."""
    return len(_END.findall(text))


def shape(text: str) -> NDArray[np.float32]:
    """The properties of a text's subject and of its lines, (SHAPE_WIDTH,), each in [0, 1]."""
    part = subject(text)
    words, letters = _WORD.findall(part), max(len(part), 1)
    ends, last = sentences(part), part.rstrip()[-1:]
    lines = sorted((len(line.split()) for line in text.split("\n")), reverse=True)
    longest, second, third = (*lines, 0, 0)[:3]
    return np.array(
        [
            *(ends == count for count in range(4)),
            *(part.count("?") == count for count in range(2)),
            min(math.log1p(len(words)) / 6, 1.0),
            _within(letters / max(len(words), 1) - 3, 5),  # letters a word
            bool(last) and last in ".!?",
            part[:1].isupper(),
            part == part.lower(),
            _within(5 * sum(map(str.isdigit, part)), letters),
            _within(3 * sum(map(str.isupper, part)), letters),
            _within(10 * (len(part) - len(part.encode("ascii", "ignore"))), letters),
            _within(part.count(","), 4),
            _within(part.count(":") + part.count(";"), 3),
            _within(part.count("("), 2),
            _within(part.count('"'), 4),
            _within(part.count("-"), 3),
            _within(part.count("'"), 3),
            _within(len(_NUMBER.findall(part)), 3),
            _within(len(_CAPITALISED.findall(part)), 8),
            _within(len(_SPACED_MARK.findall(part)), 3),  # marks that a tokenizer set apart
            min(math.log1p(second) / 6, 1.0),
            2 * second > longest,
            2 * third > longest,
        ],
        dtype=np.float32,
    )


def shapes(texts: Sequence[str]) -> NDArray[np.float32]:
    """The shapes of texts, (len(texts), SHAPE_WIDTH)."""
    return np.stack([shape(text) for text in texts]) if texts else np.zeros((0, SHAPE_WIDTH), dtype=np.float32)


def _within(count: float, most: float) -> float:
    return min(max(count / most, 0.0), 1.0)


SHAPE_WIDTH = len(shape(""))
"""Properties of a shape."""
