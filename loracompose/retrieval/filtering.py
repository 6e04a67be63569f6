"""What a search may be asked: its prompts, metadata filters for the batch, exclusions per prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.cards import Card

Where = Mapping[str, Any] | Callable[[Card], bool]
Exclude = Sequence[Collection[str] | None]

_FIELDS = ("name", "description", "tags", "license", "fingerprint", "base_model")


def allowed_rows(cards: Sequence[Card], where: Where | None) -> NDArray[np.bool_]:
    """Which cards pass the filter, (N,).

    A mapping passes a card if every key does; a key does if the card's value, or one of its values (tags), is the
    wanted one or among the wanted ones. Keys are fields of Card or keys of `extra`. A callable decides by itself.

    Raises:
        LookupError: a key that is neither a field nor in any card's `extra`.
        ValueError: `where` is neither a mapping nor a callable.
    """
    unknown = unknown_keys(cards, where)
    if unknown and cards:
        known = sorted({*_FIELDS, *(key for card in cards for key in card.extra)})
        raise LookupError(f"where has {unknown}, which no card has; there are {known}")
    return passing_rows(cards, where)


def passing_rows(cards: Sequence[Card], where: Where | None) -> NDArray[np.bool_]:
    """As `allowed_rows` of cards that are only some of all: a key that none of them has passes none.

    Raises:
        ValueError: `where` is neither a mapping nor a callable.
    """
    if where is None:
        return np.ones(len(cards), dtype=np.bool_)
    if isinstance(where, Mapping):
        wanted = {key: _values(value) for key, value in where.items()}
        return np.array([_passes(card, wanted) for card in cards], dtype=np.bool_)
    if callable(where):
        return np.array([bool(where(card)) for card in cards], dtype=np.bool_)
    raise ValueError(f"where must be a mapping or a callable on a Card, got {where!r}")


def unknown_keys(cards: Sequence[Card], where: Where | None) -> list[str]:
    """Keys of a mapping that are neither fields nor in the `extra` of any of these cards."""
    if not isinstance(where, Mapping):
        return []
    return [key for key in where if key not in _FIELDS and not any(key in card.extra for card in cards)]


def excluded_rows(exclude: Exclude | None, batch: int, rows: Mapping[str, int]) -> list[set[int]]:
    """The rows that each prompt must not get.

    Args:
        exclude: for each prompt a collection of names, or None.
        batch: number of prompts.
        rows: row of each name.

    Raises:
        LookupError: a name that the index does not have.
        ValueError: not one collection of names a prompt.
    """
    if exclude is None:
        return [set() for _ in range(batch)]
    if isinstance(exclude, str | Mapping) or not isinstance(exclude, Sequence):
        raise ValueError(f"exclude must be a list with one collection of names (or None) a prompt, got {exclude!r}")
    if len(exclude) != batch:
        raise ValueError(f"exclude must have one entry a prompt, got {len(exclude)} for {batch} prompts")
    text = next((names for names in exclude if isinstance(names, str)), None)
    if text is not None:
        raise ValueError(
            f"each entry of exclude must be a collection of names, got the string {text!r}; use [{text!r}]"
        )
    unknown = sorted({repr(name) for names in exclude for name in names or () if name not in rows})
    if unknown:
        raise LookupError(f"exclude names {', '.join(unknown)}, not in the index; it has {sorted(rows)[:50]}")
    return [{rows[name] for name in names or ()} for names in exclude]


def check_request(prompts: Sequence[str], k: int) -> None:
    """Refuse what cannot be searched for.

    Raises:
        ValueError: prompts that are not a list of at least one string, or k < 1.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be a list of strings, got {prompts!r}; put a single prompt in a list")
    if not prompts:
        raise ValueError("prompts is empty; give at least one")
    wrong = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if wrong:
        raise ValueError(f"every prompt must be a string, got {wrong[0]!r} of type {type(wrong[0]).__name__}")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")


def _passes(card: Card, wanted: Mapping[str, tuple[Any, ...]]) -> bool:
    return all(_value_passes(_value(card, key), values) for key, values in wanted.items())


def _value(card: Card, key: str) -> Any:
    return getattr(card, key) if key in _FIELDS else card.extra.get(key)


def _value_passes(value: Any, wanted: tuple[Any, ...]) -> bool:
    return any(item in wanted for item in _values(value)) if value is not None else False


def _values(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)
