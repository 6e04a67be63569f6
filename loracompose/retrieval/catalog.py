"""The catalog of an index: one SQLite file, the truth from which everything else is derived.

It holds cards, example prompts with their embeddings, fingerprints, where each adapter lies, and what was
removed. It needs neither torch nor faiss. Every change is one transaction and raises the generation by one.
A row id stands for one unchanging content: an updated adapter gets a new id and moves to the end of the order.
"""

from __future__ import annotations

import difflib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval import tables
from loracompose.retrieval.cards import Card
from loracompose.retrieval.database import Database
from loracompose.retrieval.tables import Entry, Record, Settings, Tombstone

__all__ = ["FORMAT", "Card", "Catalog", "Entry", "Record", "Settings", "Tombstone"]

FORMAT = 4


class Catalog:
    """An open catalog; threads share it, and several processes may hold the file open side by side.

    Use `Catalog.create` or `Catalog.open`. A failure inside a change leaves the old state, also when the process
    dies.
    """

    def __init__(self, database: Database) -> None:
        self.path = database.path
        self.database = database

    @classmethod
    def create(cls, path: Path, settings: Settings) -> Catalog:
        """A new, empty catalog.

        Raises:
            FileExistsError: the file is there already.
        """
        catalog = cls(Database.create(path, tables.SCHEMA))
        with catalog.database.writing():
            catalog._set("format", str(FORMAT))
            catalog._set("generation", "0")
            catalog._set("settings", json.dumps(asdict(settings)))
        return catalog

    @classmethod
    def open(cls, path: Path) -> Catalog:
        """An existing catalog; one that this user cannot write is opened for reading only.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a catalog, or one of another format version.
        """
        try:
            catalog = cls(Database.open(path))
            version = catalog._get("format")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no index here: {error}; make one with AdapterIndex.build") from error
        except (sqlite3.DatabaseError, IndexError) as error:
            raise ValueError(f"{path} is not a catalog ({error}); build the index again") from error
        if version != str(FORMAT):
            catalog.close()
            raise ValueError(
                f"{path} has format version {version}, this loracompose reads version {FORMAT}; use the loracompose "
                "that wrote it, or build the index again from its adapters: AdapterIndex.build(..., overwrite=True)"
            )
        return catalog

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self.database.close()

    def reading(self) -> AbstractContextManager[None]:
        """Everything read inside belongs to one generation."""
        return self.database.reading()

    def writing(self) -> AbstractContextManager[None]:
        """Everything changed inside takes effect at its end, or not at all; other writers wait meanwhile."""
        return self.database.writing()

    def damage(self) -> list[str]:
        """What SQLite finds wrong with the file itself; empty when it is sound."""
        return self.database.damage()

    @property
    def writable(self) -> bool:
        """Whether this user can change the catalog."""
        return self.database.writable

    @property
    def generation(self) -> int:
        """Number of changes so far; equal generations mean equal content."""
        return int(self._get("generation"))

    @property
    def settings(self) -> Settings:
        """What the index was built with."""
        return Settings(**json.loads(self._get("settings")))

    def __len__(self) -> int:
        return int(self.database.rows("SELECT count(*) FROM adapters")[0][0])

    def __contains__(self, name: object) -> bool:
        query = "SELECT 1 FROM adapters WHERE name = ?"
        return isinstance(name, str) and bool(self.database.rows(query, name))

    def ids(self) -> list[int]:
        """Row ids of all adapters, in index order."""
        return [row[0] for row in self.database.rows("SELECT id FROM adapters ORDER BY id")]

    def names(self) -> list[str]:
        """Names of all adapters, in index order."""
        return [row[0] for row in self.database.rows("SELECT name FROM adapters ORDER BY id")]

    def example_count(self) -> int:
        """Number of example prompts of all adapters together."""
        return int(self.database.rows("SELECT count(*) FROM examples")[0][0])

    def entry(self, name: str) -> Entry:
        """The adapter of this name, read alone.

        Raises:
            LookupError: no adapter has this name.
        """
        with self.reading():
            found = self.database.rows("SELECT id FROM adapters WHERE name = ?", name)
            if not found:
                raise LookupError(self.unknown(name))
            return tables.select_entries(self.database, [found[0][0]])[0]

    def record(self, name: str) -> Record | None:
        """The adapter of this name, without its examples; None if there is none."""
        return tables.select_record(self.database, name)

    def entries(self, ids: Sequence[int] | None = None) -> list[Entry]:
        """The adapters with these row ids (default: all), in index order; ids that are gone are left out."""
        with self.reading():
            return tables.select_entries(self.database, self.ids() if ids is None else ids)

    def embeddings(self, id: int) -> NDArray[np.float32]:
        """Embeddings of one adapter's examples, (examples, width), in the order of its card.

        Raises:
            ValueError: a stored embedding has the wrong number of bytes.
        """
        with self.reading():
            return tables.select_embeddings(self.database, id, self.settings.width)

    def tombstones(self, name: str | None = None) -> list[Tombstone]:
        """What was removed or replaced, oldest first; of one name or of all."""
        query = "SELECT name, fingerprint, removed_at FROM tombstones WHERE ?1 IS NULL OR name = ?1 ORDER BY id"
        return [Tombstone(*row) for row in self.database.rows(query, name)]

    def add(self, card: Card, path: str, embeddings: NDArray[np.float32], *, epoch: int = 0) -> Entry:
        """Add one adapter at the end.

        Args:
            card: the card, complete with fingerprint and base model.
            path: the adapter's folder relative to the index folder.
            embeddings: features of the card's examples, (examples, width).
            epoch: the epoch of the settings that the embeddings were made under.

        Raises:
            ValueError: the name is taken, or the embeddings do not fit the card or the settings.
        """
        with self._changing():
            if card.name in self:
                raise ValueError(
                    f"an adapter named {card.name!r} is in the index already; use update for a new version of it, "
                    "or rename the folder"
                )
            return self._insert(card, path, embeddings, epoch)

    def replace(self, card: Card, path: str, embeddings: NDArray[np.float32], *, epoch: int = 0) -> Entry:
        """Replace the adapter of the same name, which moves to the end of the order; arguments as for `add`.

        Raises:
            LookupError: there is no adapter of that name.
            ValueError: the embeddings do not fit the card or the settings.
        """
        with self._changing():
            old = self.entry(card.name)
            self.database.execute("DELETE FROM adapters WHERE id = ?", old.id)
            if old.card.fingerprint != card.fingerprint:
                tables.bury(self.database, old.card)
            return self._insert(card, path, embeddings, epoch)

    def remove(self, name: str) -> Entry:
        """Remove one adapter and leave a tombstone; returns what was removed.

        Raises:
            LookupError: there is no adapter of that name.
        """
        with self._changing():
            old = self.entry(name)
            self.database.execute("DELETE FROM adapters WHERE id = ?", old.id)
            tables.bury(self.database, old.card)
            return old

    def replace_embeddings(self, settings: Settings, embeddings: Mapping[int, NDArray[np.float32]]) -> None:
        """Give every example a new embedding, under new settings of the next epoch, in one step.

        Raises:
            ValueError: `embeddings` does not cover exactly the adapters that are here now, or does not fit them.
        """
        with self._changing():
            if sorted(embeddings) != self.ids() or settings.epoch != self.settings.epoch + 1:
                raise ValueError("the index changed while it was being embedded; run rebuild again")
            before = self.entries()
            self._set("settings", json.dumps(asdict(settings)))
            self.database.execute("DELETE FROM examples")
            for entry in before:
                tables.insert_examples(self.database, entry, embeddings[entry.id], settings)

    def note(self, key: str, generation: int, value: str) -> None:
        """Keep a value derived from this generation; dropped if the catalog moved on or is read-only."""
        if not self.writable:
            return
        with self.database.writing():
            if self.generation == generation:
                query = "INSERT OR REPLACE INTO derived VALUES (?, ?, ?)"
                self.database.execute(query, key, generation, value)

    def noted(self, key: str, generation: int) -> str | None:
        """The value kept for this generation, None if there is none."""
        query = "SELECT value FROM derived WHERE key = ? AND generation = ?"
        rows = self.database.rows(query, key, generation)
        return str(rows[0][0]) if rows else None

    def last_noted(self, key: str) -> str | None:
        """The value kept last, for whatever generation; None if there is none."""
        rows = self.database.rows("SELECT value FROM derived WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self.database.writing():
            self._set("generation", str(self.generation + 1))
            yield

    def _insert(self, card: Card, path: str, embeddings: NDArray[np.float32], epoch: int) -> Entry:
        settings = self.settings
        if settings.epoch != epoch:
            raise ValueError(f"the index was embedded anew while {card.name!r} was being embedded; try again")
        entry = tables.insert_adapter(self.database, card, path)
        tables.insert_examples(self.database, entry, embeddings, settings)
        return entry

    def _get(self, key: str) -> str:
        return str(self.database.rows("SELECT value FROM meta WHERE key = ?", key)[0][0])

    def _set(self, key: str, value: str) -> None:
        self.database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, value)

    def unknown(self, name: str) -> str:
        """What to say of a name that no adapter has: when it was removed, or what is near."""
        names = self.names()
        buried = self.tombstones(name)
        if buried:
            return f"{name!r} was removed from the index on {buried[-1].removed_at}; add it again to use it"
        near = difflib.get_close_matches(str(name), names, n=10) or names[:10]
        return f"no adapter named {name!r} in the index; it has {len(names)}, among them {near}"
