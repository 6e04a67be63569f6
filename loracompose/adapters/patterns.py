"""Regular expressions out of an adapter's configuration: valid, without exponential backtracking, and soon done."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise, takewhile
from re import _constants as opcodes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_LENGTH = 10_000
MAX_WAYS = 2e11
"""Ways to match that are tried, over all names together: about 5 ns each, so a quarter of an hour at the very worst.

They are counted as if every part of a pattern could stand anywhere in a name, far more than ordinary patterns take."""

_MANY = 10
_DEEPEST = 50  # groups inside each other: far from where Python's parser gives up, also on a deeper stack than this one
_STARS = 6  # of repetitions without end: n of them can share a name of m characters in about m ** n / n! ways
_BITS = 12  # of other choices, all together: 4,096 ways
_REPEATS = (opcodes.MAX_REPEAT, opcodes.MIN_REPEAT)
_TOO_DEEP = "it is nested too deeply; list the modules instead"


def check_pattern(pattern: str) -> None:
    """Refuse a pattern that Python cannot compile or that backtracks exponentially.

    Adapters come from strangers, and one `(a+)+b` would stop the process that lists them: Python's matcher has no
    time limit. A repetition of something that can itself match in several ways is therefore refused, and so is a long
    chain of choices (`.?` thirty times); patterns of module names have no need of either. Slow but polynomial patterns
    (`.*a.*a.*a`) remain possible: `ways_to_match` says how slow.

    Raises:
        ValueError: what is wrong with the pattern.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"it has {len(pattern)} characters, at most {MAX_LENGTH} are allowed")
    try:
        re.compile(pattern)
        _refuse_nesting(parser.parse(pattern), times=1, deep=0)
        stars, bits = _complexity(pattern)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (re.error, OverflowError) as error:
        raise ValueError(str(error)) from None
    if stars > _STARS or bits > _BITS:
        raise ValueError(
            "it leaves too many choices one after another, which can match for ever; list the modules instead"
        )


def ways_to_match(pattern: str, lengths: Mapping[int, int]) -> float:
    """About how many ways a checked pattern leaves to match names, in all, if none of them matches.

    Args:
        pattern: as it is run.
        lengths: length of a name -> how many names are so long.
    """
    stars, bits = _complexity(pattern)
    places = sum(count * math.comb(length + stars, stars) for length, count in lengths.items())
    return float(places * 2**bits)


@lru_cache(maxsize=1024)
def _complexity(pattern: str) -> tuple[int, float]:
    return _choices(parser.parse(pattern))


def _refuse_nesting(node: Any, *, times: int, deep: int) -> None:
    """Walk a parsed pattern; raise at a choice (`?`, `*`, `{1,9}`, `|`) that is repeated many times in all."""
    if deep > _DEEPEST:
        raise ValueError(_TOO_DEEP)
    if isinstance(node, tuple) and len(node) == 2 and node[0] in (*_REPEATS, opcodes.BRANCH):
        least, most = node[1][:2] if node[0] in _REPEATS else (0, 1)
        if times > _MANY and least != most:
            raise ValueError("it repeats a choice, which can match for ever; list the modules instead")
        _refuse_nesting(node[1][-1], times=times * int(most), deep=deep)
    elif isinstance(node, (tuple, list, parser.SubPattern)):
        for child in node:
            _refuse_nesting(child, times=times, deep=deep + isinstance(node, parser.SubPattern))


def _choices(node: Any) -> tuple[int, float]:
    """Repetitions without end on one way through a parsed pattern, and the bits of all other choices on it."""
    if not isinstance(node, (tuple, list, parser.SubPattern)):
        return 0, 0.0
    operator = node[0] if isinstance(node, tuple) and len(node) == 2 else None
    if operator is opcodes.BRANCH:
        ways = node[1][1]
        within = [_choices(way) for way in ways]
        own = 0.0 if _exclusive(ways) else math.log2(len(ways))
        return max(stars for stars, _ in within), max(bits for _, bits in within) + own
    if operator in _REPEATS:
        least, most, body = node[1]
        most, (stars, bits) = int(most), _choices(body)
        if most - least > _MANY:
            return stars * most + 1, bits * most
        return stars * most, bits * most + math.log2(most - least + 1)
    found = [_choices(child) for child in node]
    return sum(stars for stars, _ in found), sum(bits for _, bits in found)


def _exclusive(alternatives: Any) -> bool:
    """Whether at most one alternative can match: of their literal beginnings none begins another."""
    words = sorted(_beginning(way) for way in alternatives)
    return all(word and not following.startswith(word) for word, following in pairwise(words))


def _beginning(way: Any) -> str:
    """The characters that an alternative begins with, whatever follows, in lower case."""
    literal = takewhile(lambda node: node[0] is opcodes.LITERAL, way)
    return "".join(chr(node[1]).casefold() for node in literal)
