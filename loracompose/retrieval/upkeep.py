"""What is done to a catalog as a whole: its content summed up, its references moved, its space given back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from loracompose.retrieval.catalog import Catalog

_RECORDS = (
    "SELECT key, value FROM meta ORDER BY key",
    "SELECT * FROM adapters ORDER BY id",
    "SELECT * FROM tombstones ORDER BY id",
)


def content_digest(catalog: Catalog) -> str:
    """sha256 over every record: equal digests mean equal content. What is derived does not count."""
    total = hashlib.sha256()
    with catalog.reading():
        for query in _RECORDS:
            for row in catalog.database.rows(query):
                total.update(_summed(row))
        for id in catalog.ids():  # one adapter at a time: embeddings may be more than fits into memory
            for row in catalog.database.rows("SELECT * FROM examples WHERE adapter = ? ORDER BY position", id):
                total.update(_summed(row))
    return total.hexdigest()


def refer(catalog: Catalog, paths: Mapping[int, str]) -> None:
    """Let adapters, by row id, be found at other paths; the content is the same, and so is the generation."""
    with catalog.writing():
        for id, path in paths.items():
            catalog.database.execute("UPDATE adapters SET path = ? WHERE id = ?", path, id)


def forget_derived(catalog: Catalog, *, outdated: bool = False) -> None:
    """Drop what was derived from the catalog; with `outdated`, only what belongs to an earlier generation."""
    with catalog.writing():
        before = catalog.generation if outdated else catalog.generation + 1
        catalog.database.execute("DELETE FROM derived WHERE generation < ?", before)
        if not outdated and catalog.database.rows("SELECT 1 FROM sqlite_master WHERE name = 'version'"):
            catalog.database.execute("DELETE FROM version")  # of a large pool; see scale/ledger.py


def _summed(row: tuple[object, ...]) -> bytes:
    parts = [value if isinstance(value, bytes) else str(value).encode() for value in row]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
