"""The edges of a prompt: templates put their instruction first or last, and what lies between is its subject."""

from __future__ import annotations

import re

WORDS = 16
"""Words of an edge at most."""

_WORD = re.compile(r"\S+")
_BREAK = re.compile(r"\n+|: ")  # a line break, or a label such as "Question: "


def opening(text: str) -> str:
    """The beginning up to the first line break or label, at most `WORDS` words; the text itself if that is blank."""
    first = _BREAK.split(text.strip(), maxsplit=1)[0] or text
    words = list(_WORD.finditer(first))
    return first[: words[WORDS - 1].end()] if len(words) > WORDS else first


def closing(text: str) -> str:
    """The last line, at most its last `WORDS` words."""
    last = text.strip().rsplit("\n", maxsplit=1)[-1]
    words = list(_WORD.finditer(last))
    return last[words[-WORDS].start() :] if len(words) > WORDS else last
