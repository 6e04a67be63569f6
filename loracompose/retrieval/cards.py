"""The card of an adapter: what it is for, in words and in example prompts. Needs neither torch nor faiss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from loracompose.adapters.folder import read_json_object

CARD_FILE = "card.json"

_DEEPEST = 100  # levels: what is nested near Python's limit can be read here and not where the stack is deeper


@dataclass(frozen=True)
class Card:
    """What retrieval knows about one adapter.

    `name` is the name of the adapter's folder. `examples` are prompts of the kind the adapter was made for; they
    are what search compares with. `fingerprint` and `base_model` come from the adapter itself. `extra` holds the
    keys of `card.json` that are not ours, as they were; treat it as read-only.

    `kinds` is the kind of each example, kind after kind, where the adapter serves several unlike kinds of prompt: each
    is then compared with prompts by itself (`centres.py`). It is empty where all examples are of one kind, named or
    not. Scoring "mean" and pools above the index's `exact_limit` take all examples for one kind.
    """

    name: str
    description: str = ""
    examples: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    license: str = ""
    fingerprint: str = ""
    base_model: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    kinds: tuple[str, ...] = ()

    def parts(self) -> tuple[tuple[str, slice], ...]:
        """Name of each kind and where its examples stand; a single kind has no name.

        Raises:
            ValueError: `kinds` are not one for each example, kind after kind.
        """
        kinds, count = self.kinds, len(self.examples)
        starts = [place for place in range(len(kinds)) if place == 0 or kinds[place] != kinds[place - 1]]
        names = [kinds[start] for start in starts]
        if kinds and (len(kinds) != count or len(set(names)) != len(names)):
            raise ValueError(
                f"{self.name}: kinds must name the kind of each of its {count} examples, those of one kind side by "
                f"side, got {kinds}; read the card from {CARD_FILE} again: update(folder)"
            )
        if len(names) < 2:
            return (("", slice(0, count)),)
        return tuple((name, slice(*ends)) for name, ends in zip(names, pairwise([*starts, count]), strict=True))


def read_card(folder: Path, name: str | None = None) -> Card:
    """The card beside an adapter, with `fingerprint` and `base_model` still empty.

    Args:
        folder: the adapter's folder.
        name: the adapter's name where it is not the name of `folder`.

    Raises:
        ValueError: there is no `card.json`, it is too large or not such a card, or it has no examples.
    """
    path = folder / CARD_FILE
    name = folder.name if name is None else name
    if not path.is_file():
        raise ValueError(
            f"{name}: no {CARD_FILE} beside the adapter; without example prompts search cannot find it. "
            'Write one: {"description": str, "examples": [prompt, ...], "tags": [str, ...], "license": str}'
        )
    try:
        content = read_json_object(path)
    except (ValueError, LookupError) as error:  # a LookupError where it went a moment ago
        raise ValueError(f"{name}: {error}") from error
    return _card(name, content)


def _card(name: str, content: dict[str, Any]) -> Card:
    extra = {key: value for key, value in content.items() if key not in _KEYS}
    for key, value in extra.items():
        _check_depth(name, key, value, _DEEPEST)
    groups = _groups(name, content)
    labels = tuple(kind for kind, prompts in groups.items() for _ in prompts)
    return Card(
        name=_encodable(name, "the folder's name", name),
        description=_string(name, content, "description"),
        examples=tuple(prompt for prompts in groups.values() for prompt in prompts),
        tags=_strings(name, content.get("tags", []), "'tags'"),
        license=_string(name, content, "license"),
        extra=extra,
        kinds=labels if len(groups) > 1 else (),  # of a single kind the name says nothing
    )


def _groups(name: str, content: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Example prompts by their kind; a list is one kind of no name."""
    given = content.get("examples", [])
    if not isinstance(given, dict):
        prompts = _strings(name, given, "'examples'")
        if not prompts:
            raise ValueError(
                f"{name}: {CARD_FILE} has no examples (its keys are {sorted(content)}); without example prompts "
                "search cannot find the adapter. Give about 20 prompts of its kind under 'examples'"
            )
        return {"": _written(name, prompts, "")}
    if not given:
        raise ValueError(
            f"{name}: 'examples' in {CARD_FILE} names no kind, got {{}}, expected {{kind: [prompt, ...]}}; "
            "name each kind and give prompts of it, or give one list of prompts"
        )
    return {_kind(name, kind): _of_kind(name, kind, prompts) for kind, prompts in given.items()}


def _kind(name: str, kind: str) -> str:
    if not kind.strip():
        raise ValueError(f"{name}: a kind under 'examples' in {CARD_FILE} has no name, got {kind!r}; give it one")
    return _encodable(name, "the name of a kind", kind)


def _of_kind(name: str, kind: str, given: Any) -> tuple[str, ...]:
    prompts = _strings(name, given, f"the kind {kind!r} under 'examples'")
    if not prompts:
        raise ValueError(
            f"{name}: the kind {kind!r} under 'examples' in {CARD_FILE} has no examples, got []; give prompts of it, "
            "or leave it out"
        )
    return _written(name, prompts, f" of the kind {kind!r}")


def _written(name: str, prompts: tuple[str, ...], whose: str) -> tuple[str, ...]:
    """The prompts themselves; none may be blank."""
    blank = [position for position, prompt in enumerate(prompts) if not prompt.strip()]
    if blank:
        raise ValueError(f"{name}: {CARD_FILE} has blank examples{whose} at positions {blank}; remove them")
    return prompts


def _check_depth(name: str, key: str, value: Any, left: int) -> None:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        return
    if not left:
        raise ValueError(f"{name}: {key!r} in {CARD_FILE} is nested more than {_DEEPEST} levels deep; flatten it")
    for item in inner:
        _check_depth(name, key, item, left - 1)


_KEYS = frozenset({"description", "examples", "tags", "license"})


def _string(name: str, content: dict[str, Any], key: str) -> str:
    value = content.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"{name}: {key!r} in {CARD_FILE} must be a string, got {value!r}")
    return _encodable(name, key, value)


def _strings(name: str, value: Any, what: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: {what} in {CARD_FILE} must be a list of strings, got {value!r}")
    wrong = next((item for item in value if not isinstance(item, str)), None)
    if wrong is not None or None in value:
        raise ValueError(f"{name}: {what} in {CARD_FILE} must be a list of strings, one item is {wrong!r}")
    return tuple(_encodable(name, what, item) for item in value)


def _encodable(name: str, key: str, value: str) -> str:
    """The value itself; a lone surrogate (legal in JSON) can neither be stored nor tokenized."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name!a}: {key} in {CARD_FILE} is not valid Unicode: {value!a}") from error
    return value
