"""The example prompts of a pool of adapters: read from cards, an index or a file, and made ready for training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loracompose.retrieval.admission import CONFIG_FILE
from loracompose.retrieval.cards import CARD_FILE, Card, read_card
from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.placement import CATALOG_FILE

Profiles = Mapping[str, tuple[str, ...]]
"""Example prompts by the name of their adapter."""


class HasCards(Protocol):
    """Anything with cards, such as an `AdapterIndex`."""

    @property
    def cards(self) -> Sequence[Card]:
        """The cards of all adapters."""


Source = HasCards | Mapping[str, Sequence[str]] | Path | str


def read_profiles(source: Source) -> Profiles:
    """The profiles of an index, of the folder of one, of a folder of adapters, of a JSONL file, or as they are given.

    A line of the JSONL is `{"adapter": name, "prompt": text}`; other fields are ignored.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: an adapter has no examples, a prompt is no text or blank, or there is no adapter at all.
    """
    if isinstance(source, str | Path):
        profiles = _read_path(Path(source))
    elif isinstance(source, Mapping):
        profiles = {name: tuple(prompts) for name, prompts in source.items()}
    else:
        profiles = _of_cards(source.cards)
    for name, prompts in profiles.items():
        _check(name, prompts)
    if not profiles:
        raise ValueError(f"{source!r} holds no adapter with examples")
    return profiles


def trainable(profiles: Profiles, among: Profiles) -> Profiles:
    """What pairs can be made of: distinct prompts that stand for one adapter only, two or more an adapter.

    A prompt that two adapters share would be told to be near to itself and far from itself.

    Args:
        profiles: of some adapters.
        among: of all adapters.
    """
    owners = Counter(prompt for prompts in among.values() for prompt in dict.fromkeys(prompts))
    own = {
        name: tuple(prompt for prompt in dict.fromkeys(prompts) if owners[prompt] == 1)
        for name, prompts in profiles.items()
    }
    return {name: prompts for name, prompts in own.items() if len(prompts) > 1}


def draw_share(names: Iterable[str], share: float, seed: int) -> tuple[str, ...]:
    """A share of the names, drawn by the seed; with one seed a smaller share is part of a larger one.

    Raises:
        ValueError: the share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    ordered = sorted(names)
    drawn = np.random.default_rng(seed).permutation(len(ordered))[: round(share * len(ordered))]
    return tuple(ordered[place] for place in sorted(drawn.tolist()))


def _read_path(path: Path) -> dict[str, tuple[str, ...]]:
    if path.is_file():
        return _read_lines(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there: give an index, a folder of adapters or a JSONL file")
    if (path / CATALOG_FILE).is_file():
        catalog = Catalog.open(path / CATALOG_FILE)
        try:
            return _of_cards(entry.card for entry in catalog.entries())
        finally:
            catalog.close()
    folders = (folder for folder in sorted(path.iterdir()) if folder.is_dir())
    return _of_cards(read_card(f) for f in folders if (f / CARD_FILE).is_file() or (f / CONFIG_FILE).is_file())


def _of_cards(cards: Iterable[Card]) -> dict[str, tuple[str, ...]]:
    return {card.name: card.examples for card in cards}


def _read_lines(path: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for place, row in _rows(path):
        if not isinstance(row, dict) or not {"adapter", "prompt"} <= row.keys():
            raise ValueError(f'{place}: a line must be {{"adapter": ..., "prompt": ...}}, got {row!r:.200}')
        if not isinstance(row["adapter"], str) or not row["adapter"]:
            raise ValueError(f"{place}: the adapter must be a name, got {row['adapter']!r}")
        found.setdefault(row["adapter"], []).append(row["prompt"])
    return {name: tuple(prompts) for name, prompts in found.items()}


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error})") from error


def _check(name: str, prompts: Sequence[Any]) -> None:
    if not prompts:
        raise ValueError(f"{name}: no example prompts; give about 20 of its kind")
    wrong = next((prompt for prompt in prompts if not isinstance(prompt, str) or not prompt.strip()), None)
    if wrong is not None or None in prompts:
        raise ValueError(f"{name}: an example prompt must be a text that is not blank, got {wrong!r}")
