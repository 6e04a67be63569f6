"""How the catalog lies in its tables: the schema, its values, and the reading and writing of single rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.cards import Card
from loracompose.retrieval.database import Database

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE adapters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    path TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    base_model TEXT NOT NULL,
    description TEXT NOT NULL,
    license TEXT NOT NULL,
    tags TEXT NOT NULL,
    kinds TEXT NOT NULL,
    extra TEXT NOT NULL,
    added_at TEXT NOT NULL
);
CREATE TABLE examples (
    adapter INTEGER NOT NULL REFERENCES adapters (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    prompt TEXT NOT NULL,
    embedding BLOB NOT NULL,
    PRIMARY KEY (adapter, position)
);
CREATE TABLE tombstones (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    removed_at TEXT NOT NULL
);
CREATE INDEX tombstones_by_name ON tombstones (name);
CREATE TABLE derived (key TEXT PRIMARY KEY, generation INTEGER NOT NULL, value TEXT NOT NULL) WITHOUT ROWID;
"""
EXACT_LIMIT = 4096
"""Adapters up to which all are compared with every prompt, unless an index says otherwise."""

_CHUNK = 500  # row ids per query: SQLite limits the variables of a statement


@dataclass(frozen=True)
class Settings:
    """What an index was built with.

    An example is stored as four embeddings side by side, `width` numbers: `embedding.features` says of what.
    `scoring` is how a search compares unless it says otherwise. `loadable` says that the encoder is a
    sentence-transformers model that its name is enough to load; `copies` that adapter folders are copied into the
    index. `epoch` counts how often everything was embedded anew. Pools of more than `exact_limit` adapters are searched
    through a version (`scale/`). Embeddings are stored as numbers of `precision` bytes, 4 or 2.
    """

    encoder: str
    revision: str
    dimension: int
    instruction: str
    scoring: str = "mean"
    loadable: bool = False
    copies: bool = False
    epoch: int = 0
    exact_limit: int = EXACT_LIMIT
    precision: int = 4

    @property
    def width(self) -> int:
        """Numbers stored for one example."""
        return 4 * self.dimension


@dataclass(frozen=True)
class Entry:
    """One adapter of the catalog: its row id, its card, and its folder relative to the index folder."""

    id: int
    card: Card
    path: str


@dataclass(frozen=True)
class Record:
    """What the catalog says of one adapter without its examples; `path` as in `Entry`."""

    name: str
    fingerprint: str
    base_model: str
    path: str


@dataclass(frozen=True)
class Tombstone:
    """What stays of an adapter that was removed or replaced: name, fingerprint, and when (UTC, ISO 8601)."""

    name: str
    fingerprint: str
    removed_at: str


def select_entries(database: Database, ids: Sequence[int]) -> list[Entry]:
    """The adapters with these row ids, in the order of the ids; ids that are gone are left out."""
    wanted = sorted(ids)
    chunks = [wanted[start : start + _CHUNK] for start in range(0, len(wanted), _CHUNK)]
    return [entry for chunk in chunks for entry in _select_chunk(database, chunk)]


def select_record(database: Database, name: str) -> Record | None:
    """The adapter of this name, without its examples; None if there is none."""
    rows = database.rows("SELECT name, fingerprint, base_model, path FROM adapters WHERE name = ?", name)
    return Record(*rows[0]) if rows else None


def select_embeddings(database: Database, id: int, width: int) -> NDArray[np.float32]:
    """Embeddings of one adapter's examples, (examples, width).

    Raises:
        ValueError: a stored embedding has the wrong number of bytes.
    """
    query = "SELECT embedding FROM examples WHERE adapter = ? ORDER BY position"
    blobs = [row[0] for row in database.rows(query, id)]
    try:
        return stored_embeddings(blobs, width)
    except ValueError as error:
        raise ValueError(
            f"{database.path}: an embedding of the adapter with row id {id} has {error}; embed everything anew with "
            "AdapterIndex.open(folder, reembed=True)"
        ) from error


def stored_embeddings(blobs: Sequence[bytes], width: int) -> NDArray[np.float32]:
    """Embeddings as they are stored, in single or in half precision, (len(blobs), width).

    Raises:
        ValueError: one has the wrong number of bytes.
    """
    size = 2 * width if blobs and len(blobs[0]) == 2 * width else 4 * width
    wrong = next((blob for blob in blobs if len(blob) != size), None)
    if wrong is not None:
        raise ValueError(f"{len(wrong)} bytes, expected {size}")
    return np.frombuffer(b"".join(blobs), dtype=f"<f{size // width}").reshape(len(blobs), width).astype(np.float32)


def insert_adapter(database: Database, card: Card, path: str) -> Entry:
    """Insert the row of an adapter, without its examples.

    Raises:
        ValueError: the kinds of the card are not one for each example, kind after kind.
    """
    card.parts()  # what could not be searched never enters
    id = database.execute(
        "INSERT INTO adapters "
        "(path, name, description, license, fingerprint, base_model, tags, kinds, extra, added_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        *(path, card.name, card.description, card.license, card.fingerprint, card.base_model),
        *(json.dumps(card.tags), json.dumps(card.kinds), json.dumps(dict(card.extra)), _now()),
    )
    return Entry(id, card, path)


def insert_examples(database: Database, entry: Entry, embeddings: NDArray[np.float32], settings: Settings) -> None:
    """Insert the examples of an adapter with their embeddings, (examples, width), in the precision of the settings.

    Raises:
        ValueError: the embeddings do not fit the card or are not finite.
    """
    expected = (len(entry.card.examples), settings.width)
    if embeddings.shape != expected or not np.isfinite(embeddings).all():
        raise ValueError(
            f"{entry.card.name}: embeddings must be finite and {expected}, got {embeddings.shape}; check the embedder"
        )
    for position, (prompt, row) in enumerate(zip(entry.card.examples, embeddings, strict=True)):
        blob = row.astype(f"<f{settings.precision}").tobytes()
        database.execute("INSERT INTO examples VALUES (?, ?, ?, ?)", entry.id, position, prompt, blob)


def bury(database: Database, card: Card) -> None:
    """Leave a tombstone for an adapter that goes."""
    query = "INSERT INTO tombstones (name, fingerprint, removed_at) VALUES (?, ?, ?)"
    database.execute(query, card.name, card.fingerprint, _now())


def _select_chunk(database: Database, ids: Sequence[int]) -> list[Entry]:
    marks = ", ".join("?" * len(ids))
    prompts: dict[int, list[str]] = {id: [] for id in ids}
    query = f"SELECT adapter, prompt FROM examples WHERE adapter IN ({marks}) ORDER BY adapter, position"
    for id, prompt in database.rows(query, *ids):
        prompts[id].append(prompt)
    query = (
        "SELECT id, path, name, description, license, fingerprint, base_model, tags, kinds, extra "
        f"FROM adapters WHERE id IN ({marks}) ORDER BY id"
    )
    return [_entry(row, prompts[row[0]]) for row in database.rows(query, *ids)]


def _entry(row: Sequence[str], prompts: Sequence[str]) -> Entry:
    id, path, name, description, license, fingerprint, base_model, tags, kinds, extra = row
    card = Card(
        name=name,
        description=description,
        examples=tuple(prompts),
        tags=_names(tags),
        license=license,
        fingerprint=fingerprint,
        base_model=base_model,
        extra={} if extra == "{}" else json.loads(extra),  # as in most cards
        kinds=_names(kinds),
    )
    return Entry(int(id), card, path)


@lru_cache(maxsize=4096)
def _names(stored: str) -> tuple[str, ...]:
    return tuple(json.loads(stored))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
