"""What hyper-parameters may be: refused where a composer is made, not deep inside a batch."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

from loracompose.composition.router import Router


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


def check_choice(owner: str, name: str, value: object, choices: Collection[str]) -> None:
    """Raise a ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_amount(owner: str, name: str, value: object) -> None:
    """Raise a ValueError unless the value is a finite number of at least 0."""
    if not (is_finite(value) and value >= 0):
        raise ValueError(f"{owner}: {name} must be a finite number of at least 0, got {value!r}")


def check_router(owner: str, method: str, router: object) -> None:
    """Refuse what is no router of a method.

    Raises:
        TypeError: no router at all.
        ValueError: another method's.
    """
    if not isinstance(router, Router):
        raise TypeError(f"{owner}: router must be a Router, as load_router reads it, got {router!r}")
    if router.method != method:
        raise ValueError(f"{owner}: {router!r} belongs to the composer {router.method!r}, not to {method!r}")


def filled(owner: str, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a router with the defaults of those left out.

    Raises:
        ValueError: an unknown one.
    """
    if unknown := sorted(set(settings) - set(defaults)):
        raise ValueError(f"{owner} has no setting {', '.join(unknown)}; it has {', '.join(defaults)}")
    return {**defaults, **settings}
