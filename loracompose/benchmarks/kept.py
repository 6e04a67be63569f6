"""Embeddings that outlive a measurement, so that one that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loracompose.durable import whole_file
from loracompose.retrieval.embedding import Embedder

BATCH = 256
"""Texts that are embedded between two writes of the file."""


class KeptEmbedder:
    """An embedder that keeps every vector it makes in a file, by a hash of the text.

    Args:
        embedder: makes the vectors; its revision names the file, so that no other encoder's vectors are read.
        folder: where the file is, or will be.
    """

    def __init__(self, embedder: Embedder, folder: Path) -> None:
        self.name, self.revision = embedder.name, embedder.revision
        self.made = 0
        self._embedder = embedder
        self._file = folder / f"{hashlib.sha256(embedder.revision.encode()).hexdigest()[:16]}.npz"
        self._known: dict[bytes, NDArray[np.float32]] = {}
        if self._file.is_file():
            with np.load(self._file) as stored:
                keys, vectors = stored["keys"], stored["vectors"]
            self._known = {key.tobytes(): vector for key, vector in zip(keys, vectors, strict=True)}

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self(["dimension"]).shape[1])

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of the texts, (len(texts), dimension); texts of like length are embedded together."""
        missing = sorted({text for text in texts if _key(text) not in self._known}, key=len)
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            self._known.update(zip(map(_key, part), self._embedder(part), strict=True))
            self.made += len(part)
            self._write()
        return np.stack([self._known[_key(text)] for text in texts])

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        keys = np.frombuffer(b"".join(self._known), dtype=np.uint8).reshape(len(self._known), -1)
        with whole_file(self._file) as out:
            np.savez(out, keys=keys, vectors=np.stack(list(self._known.values())))


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
