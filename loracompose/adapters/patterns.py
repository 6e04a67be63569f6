"""Regular expressions out of an adapter's configuration: valid, and without exponential backtracking."""

from __future__ import annotations

import re
from re import _constants as opcodes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_LENGTH = 10_000
_MANY = 10
_REPEATS = (opcodes.MAX_REPEAT, opcodes.MIN_REPEAT)


def check_pattern(pattern: str) -> None:
    """Refuse a pattern that Python cannot compile or that backtracks exponentially.

    Adapters come from strangers, and one `(a+)+b` would stop the process that lists them: Python's matcher has no
    time limit. A repetition of something that can itself match in several ways is therefore refused; patterns of
    module names have no need of it. Slow but polynomial patterns (`.*a.*a.*a`) remain possible.

    Raises:
        ValueError: what is wrong with the pattern.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"it has {len(pattern)} characters, at most {MAX_LENGTH} are allowed")
    try:
        re.compile(pattern)
        tree = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None
    _refuse_nesting(tree, times=1)


def _refuse_nesting(node: Any, *, times: int) -> None:
    """Walk a parsed pattern; raise at a choice (`?`, `*`, `{1,9}`, `|`) that is repeated many times in all."""
    if isinstance(node, tuple) and len(node) == 2 and node[0] in (*_REPEATS, opcodes.BRANCH):
        least, most = node[1][:2] if node[0] in _REPEATS else (0, 1)
        if times > _MANY and least != most:
            raise ValueError("it repeats a choice, which can match for ever; list the modules instead")
        _refuse_nesting(node[1][-1], times=times * int(most))
    elif isinstance(node, (tuple, list, parser.SubPattern)):
        for child in node:
            _refuse_nesting(child, times=times)
