"""Is an index sound? Every adapter, every embedding and the faiss file are held against the catalog."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loracompose.adapters.checkpoint import load_adapter
from loracompose.retrieval.admission import COPIES
from loracompose.retrieval.building import VECTORS_FILE
from loracompose.retrieval.cards import read_card
from loracompose.retrieval.catalog import Catalog, Entry
from loracompose.retrieval.embedding import representation
from loracompose.retrieval.snapshot import VECTORS_KEY, all_vectors, read_vectors

_REEMBED = "embed again: AdapterIndex.open(folder, reembed=True)"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and what mends it; `adapter` is None where it concerns the whole index."""

    adapter: str | None
    what: str
    remedy: str


@dataclass(frozen=True)
class VerifyReport:
    """The result of a check of the whole index."""

    checked: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(catalog: Catalog, home: Path) -> VerifyReport:
    """Load and hash every adapter and compare everything derived with the catalog; changes nothing."""
    damage = [Problem(None, f"catalog: {what}", "build the index again") for what in catalog.damage()]
    if damage:
        return VerifyReport(0, tuple(damage))
    with catalog.reading():
        entries = catalog.entries()
        problems = [problem for entry in entries for problem in _embeddings(catalog, entry)]
        problems += [] if problems else _vectors(catalog, home, entries)
    problems += [problem for entry in entries for problem in _adapter(home, entry)]
    return VerifyReport(len(entries), tuple(problems + list(_leftovers(home, entries))))


def _adapter(home: Path, entry: Entry) -> Iterator[Problem]:
    name, folder = entry.card.name, home / entry.path
    if not folder.is_dir():
        yield Problem(name, f"its folder {entry.path} is missing", "put it back, or update(folder), or remove(name)")
        return
    try:
        adapter = load_adapter(folder)
    except (ValueError, LookupError, OSError) as error:
        yield Problem(name, f"it does not load: {error}", "mend the folder, or remove(name)")
        return
    if adapter.fingerprint != entry.card.fingerprint:
        yield Problem(
            name,
            f"its fingerprint is {adapter.fingerprint[:12]}, the catalog has {entry.card.fingerprint[:12]}",
            "update(folder) if the change is meant, else restore the folder",
        )
    try:
        card = read_card(folder, name)
    except (ValueError, OSError) as error:
        yield Problem(name, str(error), "restore card.json, then update(folder)")
        return
    stored = entry.card
    if (card.description, card.examples, card.tags, card.license, card.extra) != (
        *(stored.description, stored.examples, stored.tags, stored.license, stored.extra),
    ):
        yield Problem(name, "its card.json changed since it entered", "update(folder)")


def _embeddings(catalog: Catalog, entry: Entry) -> Iterator[Problem]:
    name = entry.card.name
    try:
        embeddings = catalog.embeddings(entry.id)
    except ValueError as error:
        yield Problem(name, str(error), _REEMBED)
        return
    if len(embeddings) != len(entry.card.examples) or not len(embeddings):
        yield Problem(name, f"{len(embeddings)} embeddings for {len(entry.card.examples)} examples", _REEMBED)
    elif not np.isfinite(embeddings).all():
        yield Problem(name, "an embedding is not finite", _REEMBED)
    elif np.abs(np.linalg.norm(np.split(embeddings, 4, axis=1), axis=2) - 1).max() > 1e-3:
        yield Problem(name, "an embedding is not of norm 1", _REEMBED)


def _vectors(catalog: Catalog, home: Path, entries: list[Entry]) -> Iterator[Problem]:
    remedy = "open the index again, which derives it from the catalog"
    file = home / VECTORS_FILE
    digest = catalog.noted(VECTORS_KEY, catalog.generation)
    vectors = read_vectors(file, digest, len(entries), catalog.settings.dimension)
    if vectors is None:
        if digest is not None:  # without one it merely waits for the next search
            what = "is missing" if not file.is_file() else "is damaged"
            yield Problem(None, f"{VECTORS_FILE} {what}", remedy)
        return
    rows = all_vectors(vectors)
    for row, entry in zip(rows, entries, strict=True):
        expected = representation(catalog.embeddings(entry.id), entry.card.name)
        if np.abs(row - expected).max() > 1e-5:
            yield Problem(entry.card.name, f"{VECTORS_FILE} disagrees with its embeddings", remedy)


def _leftovers(home: Path, entries: list[Entry]) -> Iterator[Problem]:
    used = {(home / entry.path).parent for entry in entries}
    for folder in sorted(path for path in (home / COPIES).glob("*") if path not in used):
        yield Problem(None, f"{folder.relative_to(home)} belongs to no adapter of the index", "delete it")
