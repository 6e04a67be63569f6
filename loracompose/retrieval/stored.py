"""An index as it lies on disk: all that can be done without its encoder. Needs neither torch nor faiss to list."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from loracompose.retrieval import backup, compaction
from loracompose.retrieval.backup import SnapshotReport
from loracompose.retrieval.cards import Card
from loracompose.retrieval.catalog import Catalog, Record
from loracompose.retrieval.compaction import CompactReport
from loracompose.retrieval.copies import discard_copy
from loracompose.retrieval.placement import CATALOG_FILE, displaced


class StoredIndex:
    """The records of an index and the adapters they refer to; `AdapterIndex` adds what takes an encoder.

    Other processes may use the same folder at the same time.
    """

    def __init__(self, folder: Path, catalog: Catalog) -> None:
        self.folder = folder
        self.catalog = catalog

    def close(self) -> None:
        """Close the catalog; closing twice is fine."""
        self.catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.catalog)

    def __contains__(self, name: object) -> bool:
        return name in self.catalog

    @property
    def cards(self) -> tuple[Card, ...]:
        """The cards of all adapters, in index order."""
        return tuple(entry.card for entry in self.catalog.entries())

    def card(self, name: str) -> Card:
        """The card of one adapter.

        Raises:
            LookupError: no adapter has this name.
        """
        return self.catalog.entry(name).card

    def path(self, name: str) -> Path:
        """The folder of one adapter.

        Raises:
            LookupError: no adapter has this name.
            FileNotFoundError: the folder is gone.
        """
        record = self.record(name)
        if record is None:
            raise LookupError(self.catalog.unknown(name))
        return self.folder_of(record)

    def record(self, name: str) -> Record | None:
        """Who an adapter is and where it lies, without its examples; None if no adapter has this name."""
        return self.catalog.record(name)

    def folder_of(self, record: Record) -> Path:
        """The folder of an adapter.

        Raises:
            FileNotFoundError: it is gone.
        """
        folder = Path(os.path.normpath(self.folder / record.path))
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the folder of {record.name!r} is gone: {folder}; the index refers to it by the path {record.path!r}. "
                "Put it back, or tell the index the new place with update(folder)"
            )
        return folder

    def remove(self, name: str) -> Card:
        """Remove one adapter, and its copy if the index made one; a tombstone stays in the catalog.

        An adapter that the index only refers to stays where it is.

        Raises:
            LookupError: no adapter has this name.
        """
        old = self.catalog.remove(name)
        discard_copy(self.folder / old.path, self.folder, copies=self.catalog.settings.copies)
        return old.card

    def compact(self) -> CompactReport:
        """Give back the space of what was removed: gaps in the catalog, its log, and what a killed process left.

        No record changes, and others may read meanwhile; writers wait.

        Raises:
            PermissionError: the index cannot be written.
        """
        return compaction.compact(self.catalog, self.folder)

    def snapshot(self, folder: str | Path) -> SnapshotReport:
        """Copy the index as it is at one moment to `folder`, while others read and write.

        The snapshot is itself an index: copies of adapters are in it, other adapters it refers to from where it is.
        It is made aside and renamed: there is a whole snapshot or none.

        Raises:
            FileExistsError: `folder` is not free.
            ValueError: `folder` is in the index folder.
        """
        return backup.save_snapshot(self.catalog, self.folder, Path(folder).resolve())


def open_catalog(home: Path) -> Catalog:
    """The catalog of an index folder.

    Raises:
        FileNotFoundError: there is no index; the message says so if an interrupted replacement has put it elsewhere.
        ValueError: it cannot be read.
    """
    try:
        return Catalog.open(home / CATALOG_FILE)
    except FileNotFoundError as error:
        old = displaced(home)
        if home.exists() or not old:
            raise
        raise FileNotFoundError(
            f"{home} was being replaced when that was interrupted; the index is in {old[0]}: rename it back"
        ) from error
