"""A SQLite file that several threads and processes share: one connection, WAL, and nested transactions."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loracompose.adapters.folder import sync

_BUSY_SECONDS = 30.0
_IMMUTABLE = "ro&immutable=1"


class Database:
    """One open SQLite file.

    Threads share one connection under a lock that a transaction holds to its end, so no thread ever reads the
    half-made change of another. Writers of other processes are waited for, up to 30 seconds. Once another file
    stands at the path, every use is a ValueError: changes to the old one would be lost.

    A file that nobody can write is opened as one that never changes, for SQLite needs to write beside it otherwise. If
    somebody else changes it after all, it is opened anew with the next use.
    """

    def __init__(self, path: Path, mode: str) -> None:
        self.path = path
        self.writable = mode in ("rw", "rwc")
        self._lock = threading.RLock()
        self._open: sqlite3.Connection | None = self._connect(mode)

    def _connect(self, mode: str) -> sqlite3.Connection:
        before = _identity(self.path)  # not after opening: a file that is put there in between must be noticed
        self._frozen = _content(self.path) if mode == _IMMUTABLE else None
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,  # transactions are begun and ended below, nowhere else
            check_same_thread=False,
        )
        connection.execute("PRAGMA foreign_keys = ON")
        self._file = before or _identity(self.path)
        return connection

    @classmethod
    def create(cls, path: Path, schema: str) -> Database:
        """A new file with these tables.

        Raises:
            FileExistsError: the file is there already.
        """
        if path.exists():
            raise FileExistsError(f"{path} exists already; open it or choose another place")
        database = cls(path, "rwc")
        database.execute("PRAGMA journal_mode = WAL")
        database._connection.executescript(f"BEGIN;{schema}COMMIT;")
        return database

    @classmethod
    def open(cls, path: Path) -> Database:
        """An existing file; one that this user cannot write is opened for reading only.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
            return cls(path, "rw")
        return cls(path, _reading_mode(path))

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """All rows of one query."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def execute(self, query: str, *values: object) -> int:
        """Run one statement; returns the id of the row it inserted, if it did."""
        with self._lock:
            return self._connection.execute(query, values).lastrowid or 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Everything read inside comes from one state of the file."""
        with self._transaction("BEGIN"):
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Everything written inside takes effect at its end, or not at all.

        Raises:
            PermissionError: the file was opened for reading only.
        """
        self._check_writable()
        with self._transaction("BEGIN IMMEDIATE"):
            yield

    def copy_to(self, path: Path) -> None:
        """A copy of one state of the file, flushed to the disk; readers and writers go on meanwhile."""
        self.rows("SELECT 1")  # refuses if another file stands at the path
        source = Database.open(self.path)  # a connection of its own: no thread waits for the end
        target = sqlite3.connect(path)
        try:
            source._connection.backup(target)
        finally:
            target.close()
            source.close()
        sync(path)

    def compact(self) -> None:
        """Give back the space of what was deleted, and empty the write-ahead log unless somebody reads from it.

        Raises:
            PermissionError: the file was opened for reading only.
        """
        self._check_writable()
        with self._lock:
            self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def damage(self) -> list[str]:
        """What SQLite finds wrong with the file itself; empty when it is sound."""
        try:
            found = [str(row[0]) for row in self.rows("PRAGMA integrity_check")]
        except sqlite3.DatabaseError as error:
            return [str(error)]
        return [] if found == ["ok"] else found

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        with self._lock:
            connection = self._connection
            if connection.in_transaction:  # a part of a larger one of this very thread
                yield
                return
            connection.execute(begin)
            try:
                yield
                connection.execute("COMMIT")
            except BaseException:
                self._roll_back(connection)
                raise

    @staticmethod
    def _roll_back(connection: sqlite3.Connection) -> None:
        if connection.in_transaction:  # SQLite ends a transaction by itself after some failures, as on a full disk
            connection.execute("ROLLBACK")

    def _check_writable(self) -> None:
        if not self.writable:
            raise PermissionError(f"{self.path} cannot be written; copy its folder to a place where it can")

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._open is None:
            raise ValueError(f"{self.path} was closed; open the index again")
        if _identity(self.path) != self._file:  # what this connection still holds has no name any more
            raise ValueError(
                f"{self.path} is not the file that was opened: the index was replaced, moved or deleted since; "
                "open the index again"
            )
        if not self.writable:
            self._open = self._as_others_left_it(self._open)
        return self._open

    def _as_others_left_it(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        """A connection that fits: another one if the file was changed, or others have opened or closed it, since."""
        changed = self._frozen is not None and _content(self.path) != self._frozen
        if changed and connection.in_transaction:  # whose beginning belongs to a state that is gone
            raise ValueError(f"{self.path} was changed while it was read; try again")
        mode = _reading_mode(self.path)
        fits = not changed and (mode == _IMMUTABLE) == (self._frozen is not None)
        if fits or connection.in_transaction:
            return connection
        fitting = self._connect(mode)
        connection.close()
        return fitting


def _reading_mode(path: Path) -> str:
    """How a file is opened that this user cannot write.

    WAL needs shared memory beside the file. Where none can be made and none is there, nobody writes.
    """
    return "ro" if _log(path).exists() else _IMMUTABLE


def _log(path: Path) -> Path:
    return Path(f"{path}-wal")


def _content(path: Path) -> tuple[int, int]:
    """What changes with the content of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
