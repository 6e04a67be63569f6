"""Giving back what an index no longer needs: space in the catalog, left-over copies, outdated derived values."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.copies import leftover_copies
from loracompose.retrieval.locking import locked
from loracompose.retrieval.placement import VECTORS_FILE
from loracompose.retrieval.upkeep import forget_derived


@dataclass(frozen=True)
class CompactReport:
    """Bytes of all files of the index before and after, and what was deleted, relative to the index folder."""

    bytes_before: int
    bytes_after: int
    deleted: tuple[str, ...]


def compact(catalog: Catalog, home: Path) -> CompactReport:
    """Drop what no record refers to and rewrite the catalog without gaps; no record changes.

    Raises:
        PermissionError: the index cannot be written.
    """
    before = folder_bytes(home)
    deleted = drop_leftovers(catalog, home)
    forget_derived(catalog, outdated=True)
    catalog.database.compact()
    return CompactReport(before, folder_bytes(home), deleted)


def drop_leftovers(catalog: Catalog, home: Path) -> tuple[str, ...]:
    """Delete copies and halves of faiss files that a killed process left; returns their paths in the index folder."""
    with locked(home):  # whoever is entering a copy has it recorded before this begins
        left = leftover_copies(home, catalog.entries(), copies=catalog.settings.copies)
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
    with catalog.writing():  # a faiss file is written in such a transaction
        halves = leftover_vectors(home)
        for file in halves:
            file.unlink(missing_ok=True)
    return tuple(path.relative_to(home).as_posix() for path in [*left, *halves])


def leftover_vectors(home: Path) -> list[Path]:
    """Halves of faiss files that a killed process left."""
    return sorted(home.glob(f".{VECTORS_FILE}*"))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; files that go meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
