"""What happens to an adapter folder before it enters an index: loaded, hashed, its card read, copied if wanted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from loracompose.adapters.checkpoint import load_adapter
from loracompose.retrieval.cards import Card, read_card
from loracompose.retrieval.copies import discard_copy, make_copy

CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Admitted:
    """An adapter that may enter: its complete card, and its folder relative to the index folder."""

    card: Card
    path: str


def absolute(folder: str | Path) -> Path:
    """The folder with its parents resolved but its own name kept, for the name is the adapter's."""
    plain = Path(os.path.abspath(folder))  # resolve() would follow a link and lose its name
    return plain.parent.resolve() / plain.name


@contextmanager
def admitted(folder: str | Path, home: Path, *, copies: bool) -> Iterator[Admitted]:
    """The checked adapter; a copy made of it is removed again if the block fails.

    Args:
        folder: the adapter's folder.
        home: the index folder.
        copies: copy the adapter into the index folder; then the copy is what is checked and hashed.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: the adapter is refused by `load_adapter`, or has no card or no examples.
        LookupError: the adapter is incomplete.
    """
    source = absolute(folder)
    if not (source / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} is no adapter folder: it has no {CONFIG_FILE}")
    card = read_card(source)
    place = make_copy(source, home) if copies else source
    try:
        yield Admitted(complete(card, place), relative(place, home))
    except BaseException:
        discard_copy(place, home, copies=copies)
        raise


def complete(card: Card, place: Path) -> Card:
    """The card with the fingerprint and the base model of the adapter in this folder, which is loaded and freed."""
    adapter = load_adapter(place)
    return replace(card, fingerprint=adapter.fingerprint, base_model=adapter.base_model)


def relative(place: Path, home: Path) -> str:
    """How an index in `home` refers to the adapter in `place`."""
    return Path(os.path.relpath(place, home)).as_posix()
