"""What hyper-parameters may be: refused where a composer is made, not deep inside a batch."""

from __future__ import annotations

import sys
from typing import TypeGuard


def check_count(owner: str, name: str, value: object, *, least: int = 1, optional: bool = False) -> None:
    """Refuse what is no count.

    True and numbers of NumPy and PyTorch are refused too: a composer's fields go into the recipe, which is JSON.

    Args:
        owner: the composer, for the message.
        name: the field.
        value: what was given for it.
        least: the smallest count allowed.
        optional: whether None is allowed.

    Raises:
        ValueError: not an integer, or less than `least`.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        choice = " or None" if optional else ""
        raise ValueError(f"{owner}: {name} must be an integer of at least {least}{choice}, got {value!r}")


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a field holds an ordinary number: an int or a float, neither True nor nan nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
