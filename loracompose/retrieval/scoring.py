"""The names of the ways to compare a prompt with adapters."""

from __future__ import annotations

from typing import Literal, cast, get_args

Scoring = Literal["hybrid", "discriminant", "mean"]
SCORINGS: tuple[str, ...] = get_args(Scoring)

DEFAULT_SCORING: Scoring = "hybrid"


def check_scoring(given: str) -> Scoring:
    """The scoring of this name.

    Raises:
        ValueError: there is none.
    """
    if given not in SCORINGS:
        raise ValueError(f"scoring must be one of {list(SCORINGS)}, got {given!r}")
    return cast(Scoring, given)
