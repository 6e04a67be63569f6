"""The card of an adapter: what it is for, in words and in example prompts. Needs neither torch nor faiss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CARD_FILE = "card.json"


@dataclass(frozen=True)
class Card:
    """What retrieval knows about one adapter.

    `name` is the name of the adapter's folder. `examples` are prompts of the kind the adapter was made for; they
    are what search compares with. `fingerprint` and `base_model` come from the adapter itself. `extra` holds the
    keys of `card.json` that are not ours, as they were; treat it as read-only.
    """

    name: str
    description: str = ""
    examples: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    license: str = ""
    fingerprint: str = ""
    base_model: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


def read_card(folder: Path, name: str | None = None) -> Card:
    """The card beside an adapter, with `fingerprint` and `base_model` still empty.

    Args:
        folder: the adapter's folder.
        name: the adapter's name where it is not the name of `folder`.

    Raises:
        ValueError: there is no `card.json`, it is not such a card, or it has no examples.
    """
    path = folder / CARD_FILE
    name = folder.name if name is None else name
    if not path.is_file():
        raise ValueError(
            f"{name}: no {CARD_FILE} beside the adapter; without example prompts search cannot find it. "
            'Write one: {"description": str, "examples": [prompt, ...], "tags": [str, ...], "license": str}'
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ValueError(f"{name}: {CARD_FILE} is not JSON in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: {CARD_FILE} must hold an object, got {type(content).__name__}")
    return _card(name, content)


def _card(name: str, content: dict[str, Any]) -> Card:
    extra = {key: value for key, value in content.items() if key not in _KEYS}
    examples = _strings(name, content, "examples")
    if not examples:
        raise ValueError(
            f"{name}: {CARD_FILE} has no examples (its keys are {sorted(content)}); without example prompts "
            "search cannot find the adapter. Give about 20 prompts of its kind under 'examples'"
        )
    blank = [position for position, prompt in enumerate(examples) if not prompt.strip()]
    if blank:
        raise ValueError(f"{name}: {CARD_FILE} has blank examples at positions {blank}; remove them")
    return Card(
        name=_encodable(name, "the folder's name", name),
        description=_string(name, content, "description"),
        examples=examples,
        tags=_strings(name, content, "tags"),
        license=_string(name, content, "license"),
        extra=extra,
    )


_KEYS = frozenset({"description", "examples", "tags", "license"})


def _string(name: str, content: dict[str, Any], key: str) -> str:
    value = content.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"{name}: {key!r} in {CARD_FILE} must be a string, got {value!r}")
    return _encodable(name, key, value)


def _strings(name: str, content: dict[str, Any], key: str) -> tuple[str, ...]:
    value = content.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"{name}: {key!r} in {CARD_FILE} must be a list of strings, got {value!r}")
    wrong = next((item for item in value if not isinstance(item, str)), None)
    if wrong is not None or None in value:
        raise ValueError(f"{name}: {key!r} in {CARD_FILE} must be a list of strings, one item is {wrong!r}")
    return tuple(_encodable(name, key, item) for item in value)


def _encodable(name: str, key: str, value: str) -> str:
    """The value itself; a lone surrogate (legal in JSON) can neither be stored nor tokenized."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name!a}: {key} in {CARD_FILE} is not valid Unicode: {value!a}") from error
    return value
