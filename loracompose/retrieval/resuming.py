"""The embeddings a build has made so far, in a file beside the index: an interrupted build goes on from there."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.database import Database
from loracompose.retrieval.tables import Settings

_FILE = "embedded.sqlite"
_SCHEMA = "CREATE TABLE IF NOT EXISTS embedded (key BLOB PRIMARY KEY, embeddings BLOB NOT NULL);"


class EmbeddedSoFar:
    """Embeddings by the content they were made of: encoder, revision, dimension, instruction and the examples.

    So nothing that changed since the interruption is taken for what it was. Leaving the `with` block closes the file,
    and deletes it if it holds nothing.

    Args:
        folder: where the file is, or will be.
        settings: what the examples are embedded with.

    Raises:
        ValueError: there is such a file, and it is damaged.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._file = folder / _FILE
        self._settings = settings
        try:
            self._database = Database(self._file, "rwc")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self._file} of an interrupted build is damaged ({error}); delete it") from error

    def __enter__(self) -> EmbeddedSoFar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        empty = len(self) == 0
        self._database.close()
        if empty:
            self._file.unlink()

    def __len__(self) -> int:
        return int(self._database.rows("SELECT count(*) FROM embedded")[0][0])

    def __contains__(self, examples: tuple[str, ...]) -> bool:
        return bool(self._database.rows("SELECT 1 FROM embedded WHERE key = ?", self._key(examples)))

    def get(self, examples: tuple[str, ...]) -> NDArray[np.float32]:
        """Embeddings of these examples, (examples, width).

        Raises:
            LookupError: they are not here.
        """
        rows = self._database.rows("SELECT embeddings FROM embedded WHERE key = ?", self._key(examples))
        if not rows:
            raise LookupError(f"{self._file} has no embeddings of {examples[:1]} and {len(examples) - 1} more examples")
        return np.frombuffer(rows[0][0], dtype="<f4").reshape(len(examples), self._settings.width).astype(np.float32)

    def put(self, examples: tuple[str, ...], embeddings: NDArray[np.float32]) -> None:
        """Keep the embeddings of these examples, (examples, width)."""
        blob = embeddings.astype("<f4").tobytes()
        self._database.execute("INSERT OR REPLACE INTO embedded VALUES (?, ?)", self._key(examples), blob)

    def _key(self, examples: tuple[str, ...]) -> bytes:
        settings = self._settings
        made_of = [settings.encoder, settings.revision, settings.dimension, settings.instruction, examples]
        return hashlib.sha256(json.dumps(made_of).encode()).digest()
