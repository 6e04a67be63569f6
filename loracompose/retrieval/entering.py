"""How one adapter enters an index that is there already: checked, copied if wanted, embedded, recorded."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.admission import absolute, admitted, relative
from loracompose.retrieval.cards import Card
from loracompose.retrieval.catalog import Catalog, Settings
from loracompose.retrieval.copies import discard_copy
from loracompose.retrieval.embedding import Embedder, check_encoder, features, representation
from loracompose.retrieval.locking import locked


def enter(catalog: Catalog, home: Path, embedder: Embedder, folder: str | Path, *, update: bool) -> Card:
    """Add the adapter of a folder, or update the one of its name; errors are those of `AdapterIndex.add`, `update`."""
    settings = catalog.settings
    check_encoder(settings, embedder)  # somebody may have embedded anew since this index was opened
    _check_outside(catalog, home, absolute(folder), copies=settings.copies)
    with ExitStack() as stack:
        if settings.copies:  # until it is recorded, a copy must not be taken for a leftover
            stack.enter_context(locked(home, shared=True))
        new = stack.enter_context(admitted(folder, home, copies=settings.copies))
        old = catalog.entry(new.card.name) if update else None
        if old is not None and old.card == new.card and (settings.copies or old.path == new.path):
            discard_copy(home / new.path, home, copies=settings.copies)
            return old.card
        write = catalog.replace if update else catalog.add
        write(new.card, new.path, embedded(new.card, embedder, settings), epoch=settings.epoch)
    if old is not None:
        discard_copy(home / old.path, home, copies=settings.copies)
    return new.card


def _check_outside(catalog: Catalog, home: Path, folder: Path, *, copies: bool) -> None:
    """Refuse an adapter in the index folder: whoever replaces the index deletes what looks as if the index made it.

    Raises:
        ValueError: it lies there, itself or what it links to, and is no copy that the index made and records.
    """
    inside = next((place for place in (folder, folder.resolve()) if place.is_relative_to(home)), None)
    if inside is None or not folder.exists():  # that it is not there is said where it is read
        return
    recorded = catalog.database.rows("SELECT 1 FROM adapters WHERE path = ?", relative(folder, home))
    if not (copies and recorded):
        raise ValueError(
            f"{folder.name}: {inside} is in the index folder {home}, which is the index's own; move it out of there "
            "and give its new place"
        )


def embedded(card: Card, embedder: Embedder, settings: Settings) -> NDArray[np.float32]:
    """Embeddings of a card's examples, (examples, width).

    Raises:
        ValueError: the embedder misbehaves, or the examples cancel out.
    """
    embeddings = features(embedder, card.examples, settings)
    representation(embeddings, card.name)  # refuses what could not be searched
    return embeddings
