"""What a large pool keeps in the catalog's file: which version is current, and what went since.

From the first version on a trigger keeps the examples of every adapter that goes, in the transaction in which it
goes, whoever removes it. What came is in the catalog itself: its row id is higher than the version's. So the current
statistics are always those of the version and of few rows, exactly, and adding or removing costs nothing more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.database import Database
from loracompose.retrieval.scale.parts import Parts, parts_of
from loracompose.retrieval.tables import Settings, stored_embeddings

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS departures (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    adapter INTEGER NOT NULL,
    position INTEGER NOT NULL,
    prompt TEXT NOT NULL,
    embedding BLOB NOT NULL
)""",
    "CREATE TABLE IF NOT EXISTS version (one INTEGER PRIMARY KEY CHECK (one = 1), record TEXT NOT NULL)",
    """CREATE TRIGGER IF NOT EXISTS departing BEFORE DELETE ON adapters BEGIN
    INSERT INTO departures (adapter, position, prompt, embedding)
    SELECT adapter, position, prompt, embedding FROM examples WHERE adapter = OLD.id ORDER BY position;
END""",
)
_OUTDATED = ("DROP TRIGGER IF EXISTS departing", "DROP TABLE IF EXISTS departures")
_BLOCK = 512


@dataclass(frozen=True)
class Record:
    """The current version: its token, the epoch of its embeddings, and size, spot digest and sha256 of each file."""

    token: str
    epoch: int
    files: dict[str, tuple[int, str, str]]


class Position(NamedTuple):
    """How far somebody has read: the highest row id of an adapter, and of a departure."""

    adapter: int
    departure: int


class Profile(NamedTuple):
    """One adapter: its row id; its examples' embeddings, (examples, width), and prompts; and their parts."""

    id: int
    embeddings: NDArray[np.float32]
    prompts: tuple[str, ...]
    parts: Parts

    @classmethod
    def of(cls, id: int, blobs: Sequence[bytes], prompts: Sequence[str], width: int) -> Profile:
        """From what is stored of its examples."""
        embeddings = stored_embeddings(blobs, width)
        return cls(id, embeddings, tuple(prompts), parts_of(embeddings, prompts))


def prepare(database: Database) -> None:
    """Begin to keep what goes; nothing if that was begun.

    Raises:
        PermissionError: it was not, and the catalog cannot be written.
    """
    prompts = database.rows("SELECT 1 FROM pragma_table_info('departures') WHERE name = 'prompt'")
    if prompts and database.rows("SELECT 1 FROM sqlite_master WHERE name = 'departing'"):
        return
    with database.writing():
        # What another format kept without prompts belongs to a version that is made anew.
        for statement in (*(() if prompts else _OUTDATED), *_SCHEMA):
            database.execute(statement)


def forget(database: Database) -> None:
    """Keep no version and nothing of what goes, until `prepare`."""
    with database.writing():
        for statement in ("DROP TRIGGER IF EXISTS departing", "DELETE FROM departures", "DELETE FROM version"):
            database.execute(statement)


def generation_and_record(database: Database) -> tuple[int, Record | None]:
    """The catalog's generation, and its current version."""
    query = "SELECT value, (SELECT record FROM version) FROM meta WHERE key = 'generation'"
    generation, value = database.rows(query)[0]
    return int(generation), None if value is None else _record(value)


# Of a version's files. A record of another format has an epoch that no index has, so its version is made anew.
FORMAT, OTHER_FORMAT = 3, -1


@lru_cache(maxsize=16)
def _record(value: str) -> Record:
    content = json.loads(value)
    files = {kind: (int(size), str(spots), str(digest)) for kind, (size, spots, digest) in content["files"].items()}
    epoch = content["epoch"] if content.get("format") == FORMAT else OTHER_FORMAT
    return Record(content["token"], epoch, files)


def settings(database: Database) -> Settings:
    """The settings in the file."""
    return Settings(**json.loads(database.rows("SELECT value FROM meta WHERE key = 'settings'")[0][0]))


def install(database: Database, record: Record, upto: Position) -> bool:
    """Make a version current and forget the departures that it knows; False if everything was embedded anew since."""
    with database.writing():
        if settings(database).epoch != record.epoch:
            return False
        database.execute(
            "INSERT OR REPLACE INTO version VALUES (1, ?)", json.dumps({**asdict(record), "format": FORMAT})
        )
        database.execute("DELETE FROM departures WHERE seq <= ?", upto.departure)
        return True


def position(database: Database) -> Position:
    """How far the file goes now."""
    adapter = database.rows("SELECT max(id) FROM adapters")[0][0]
    departure = database.rows("SELECT max(seq) FROM departures")[0][0]
    return Position(adapter or 0, departure or 0)


def departures(database: Database, after: int, width: int) -> list[Profile]:
    """What went after this departure, in order.

    Raises:
        ValueError: what is stored of one is no embedding, so that nothing can be taken back exactly.
    """
    query = "SELECT adapter, embedding, prompt FROM departures WHERE seq > ? ORDER BY seq"
    found = _profiles(database.rows(query, after), width)
    broken = [profile.id for profile in found if not np.isfinite(profile.embeddings).all()]
    if broken:
        raise ValueError(f"the adapter of row id {broken[0]} went with an embedding that is not finite")
    return found


def profiles(database: Database, after: int, width: int) -> Iterator[list[Profile]]:
    """All adapters with a higher row id that have examples, by blocks that are never empty."""
    while True:
        query = "SELECT id FROM adapters WHERE id > ? ORDER BY id LIMIT ?"
        ids = [row[0] for row in database.rows(query, after, _BLOCK)]
        if not ids:
            return
        found = _select(database, ids, width)
        if found:
            yield found
        after = ids[-1]


def chosen_profiles(database: Database, ids: Sequence[int], width: int) -> list[Profile]:
    """The adapters with these row ids, ascending."""
    return [found for id in ids for found in _select(database, [id], width)]


def all_ids(database: Database) -> NDArray[np.int64]:
    """Row ids of all adapters, ascending."""
    return np.fromiter((row[0] for row in database.rows("SELECT id FROM adapters ORDER BY id")), dtype=np.int64)


def _select(database: Database, ids: Sequence[int], width: int) -> list[Profile]:
    query = "SELECT adapter, embedding, prompt FROM examples WHERE adapter BETWEEN ? AND ? ORDER BY adapter, position"
    return _profiles(database.rows(query, ids[0], ids[-1]), width)


def _profiles(rows: Iterable[Sequence[Any]], width: int) -> list[Profile]:
    """Of rows of an adapter, an embedding and a prompt."""
    groups: dict[int, tuple[list[bytes], list[str]]] = {}
    for adapter, embedding, prompt in rows:
        blobs, prompts = groups.setdefault(adapter, ([], []))
        blobs.append(embedding)
        prompts.append(prompt)
    return [Profile.of(id, blobs, prompts, width) for id, (blobs, prompts) in groups.items()]
