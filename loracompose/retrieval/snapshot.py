"""One generation of an index in memory: what a search reads, derived from the catalog in one go.

Adding and removing only change the catalog; the snapshot, its faiss file and its temperature follow with the next
search. The faiss file belongs to a generation by a sha256 that the catalog keeps for that generation.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.cards import Card
from loracompose.retrieval.catalog import Catalog, Entry, Settings
from loracompose.retrieval.embedding import representation
from loracompose.retrieval.weighting import fit_temperature

VECTORS_KEY, TEMPERATURE_KEY = "vectors", "temperature"

_FITTED_EXAMPLES = 2048
"""Examples that the temperature is fitted on at most; more change its third digit and cost seconds."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The adapters of one generation, their representations in faiss, and the fitted temperature."""

    generation: int
    settings: Settings
    entries: tuple[Entry, ...]
    vectors: Any  # faiss.IndexFlatIP, row i represents entries[i]
    temperature: float

    @cached_property
    def cards(self) -> tuple[Card, ...]:
        """Cards in index order."""
        return tuple(entry.card for entry in self.entries)

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """Row of each name."""
        return {card.name: row for row, card in enumerate(self.cards)}


def take_snapshot(catalog: Catalog, file: Path, previous: Snapshot | None = None) -> Snapshot:
    """The catalog's present generation; writes the faiss file where it is missing, stale or damaged.

    Args:
        catalog: the truth.
        file: the faiss file.
        previous: an earlier snapshot; what it shares with this one is not read again.
    """
    with catalog.reading():
        generation, settings = catalog.generation, catalog.settings
        entries = _entries(catalog, previous)
        vectors = read_vectors(file, catalog.noted(VECTORS_KEY, generation), len(entries), settings.dimension)
        matrix = None if vectors is not None else _matrix(catalog, entries, settings, previous)
        fitted = catalog.noted(TEMPERATURE_KEY, generation)
        rows, examples = ([], []) if fitted else _sample(catalog, entries)
    if matrix is not None:
        vectors = faiss.IndexFlatIP(settings.dimension)
        vectors.add(matrix)
        if catalog.writable:
            catalog.note(VECTORS_KEY, generation, _write_vectors(file, vectors))
    means = all_vectors(vectors)
    temperature = float(fitted) if fitted else fit_temperature(means, examples, rows)
    if not fitted:
        catalog.note(TEMPERATURE_KEY, generation, repr(temperature))
    return Snapshot(generation, settings, entries, vectors, temperature)


def all_vectors(vectors: Any) -> NDArray[np.float32]:
    """All rows of a faiss index, (N, dimension)."""
    rows: NDArray[np.float32] = vectors.reconstruct_n(0, vectors.ntotal)
    return rows


def read_vectors(file: Path, digest: str | None, count: int, dimension: int) -> Any | None:
    """The faiss index in the file, None unless it is the one that the catalog's digest stands for."""
    if digest is None or not file.is_file():
        return None
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:  # never parse what we did not write
        return None
    vectors = faiss.deserialize_index(np.frombuffer(content, dtype=np.uint8))
    return vectors if (vectors.ntotal, vectors.d) == (count, dimension) else None


def _write_vectors(file: Path, vectors: Any) -> str:
    content = faiss.serialize_index(vectors).tobytes()
    aside = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with aside.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
    return hashlib.sha256(content).hexdigest()


def _entries(catalog: Catalog, previous: Snapshot | None) -> tuple[Entry, ...]:
    known = {} if previous is None else {entry.id: entry for entry in previous.entries}
    ids = catalog.ids()
    fresh = {entry.id: entry for entry in catalog.entries([id for id in ids if id not in known])}
    return tuple(known.get(id) or fresh[id] for id in ids)


def _matrix(
    catalog: Catalog, entries: tuple[Entry, ...], settings: Settings, previous: Snapshot | None
) -> NDArray[np.float32]:
    """Representations of the entries, (N, dimension)."""
    known: dict[int, NDArray[np.float32]] = {}
    if previous is not None and previous.settings.epoch == settings.epoch:
        old = all_vectors(previous.vectors)
        known = {entry.id: old[row] for row, entry in enumerate(previous.entries)}
    matrix = np.empty((len(entries), settings.dimension), dtype=np.float32)
    for row, entry in enumerate(entries):
        vector = known.get(entry.id)
        matrix[row] = representation(catalog.embeddings(entry.id), entry.card.name) if vector is None else vector
    return matrix


def _sample(catalog: Catalog, entries: tuple[Entry, ...]) -> tuple[list[int], list[NDArray[np.float32]]]:
    """Rows of evenly spaced adapters and their examples' embeddings, about 2,048 examples in all."""
    step = -(-catalog.example_count() // _FITTED_EXAMPLES) or 1
    rows = list(range(0, len(entries), step))
    return rows, [catalog.embeddings(entries[row].id) for row in rows]
