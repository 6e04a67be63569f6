"""The parts of a prompt: templates put their instruction at the edges, and what lies between is its subject."""

from __future__ import annotations

import re

WORDS = 16
"""Words of an edge at most."""

_WORD = re.compile(r"\S+")
_LABEL = re.compile(r"^[^.:?!\n]{1,120}: ")
_QUOTED = re.compile(r'"([^"]+)"')
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


def subject(text: str) -> str:
    """What the prompt is about, as far as its form tells: the longest line, without quotes or a label around it.

    Quotes and labels leave more than half of the line; else they are parts of the subject themselves.
    """
    line = max(text.strip().split("\n"), key=len)
    quoted = max(_QUOTED.findall(line), key=len, default="")
    if 2 * len(quoted) > len(line):
        return str(quoted)
    labelled = _LABEL.sub("", line, count=1)
    return labelled if 2 * len(labelled) > len(line) else line
