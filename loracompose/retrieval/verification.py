"""Is an index sound? Every adapter, every embedding and what is derived are held against the catalog."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from loracompose.adapters.checkpoint import load_adapter
from loracompose.retrieval.cards import Card, read_card
from loracompose.retrieval.catalog import Catalog, Entry
from loracompose.retrieval.compaction import leftover_vectors
from loracompose.retrieval.copies import leftover_copies
from loracompose.retrieval.embedding import representation
from loracompose.retrieval.fit_note import FitNote
from loracompose.retrieval.placement import VECTORS_FILE
from loracompose.retrieval.scale.sized import broken_files
from loracompose.retrieval.snapshot import FITTED_KEY, VECTORS_KEY, all_vectors, read_vectors

Kind = Literal["catalog", "missing", "adapter", "embeddings", "derived", "leftover"]

_REEMBED = "repair(), or embed everything again: AdapterIndex.open(folder, reembed=True)"
_REDERIVE = "repair(), or open the index again and search, which derives it from the catalog"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and what mends it; `adapter` is None where it concerns the whole index.

    `kind` says what disagrees: the "catalog" file itself; an adapter whose folder is "missing"; the "adapter" in its
    folder, by content; its "embeddings"; what is "derived" from all of them; or something "leftover" that no record
    refers to, as a process leaves that was killed. An adapter that is being added at this moment may look left over.
    """

    adapter: str | None
    what: str
    remedy: str
    kind: Kind


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
    remedy = "restore a snapshot: loracompose index restore SNAPSHOT INDEX, or build the index again"
    damage = [Problem(None, f"catalog: {what}", remedy, "catalog") for what in catalog.damage()]
    if damage:
        return VerifyReport(0, tuple(damage))
    with catalog.reading():
        entries = catalog.entries()
        problems = [problem for entry in entries for problem in _embeddings(catalog, entry)]
        problems += [] if problems else _vectors(catalog, home, entries)
        problems += _fitted(catalog)
        problems += [Problem(None, what, _REDERIVE, "derived") for what in broken_files(catalog, home)]
    adapters = [(entry.id, problem) for entry in entries for problem in _adapter(home, entry)]
    still_there = set(catalog.ids()) if adapters else set()  # others may remove adapters while these are read
    problems += [problem for id, problem in adapters if id in still_there]
    return VerifyReport(len(entries), tuple([*problems, *_leftovers(catalog, home)]))


def same_content(card: Card, other: Card) -> bool:
    """Whether two cards say the same of an adapter, whatever its name, weights and base model."""
    return (card.description, card.examples, card.kinds, card.tags, card.license, card.extra) == (
        *(other.description, other.examples, other.kinds, other.tags, other.license, other.extra),
    )


def _adapter(home: Path, entry: Entry) -> Iterator[Problem]:
    name, folder = entry.card.name, home / entry.path
    if not folder.is_dir():
        remedy = "put it back, or repair(look_in=[folder]) to find it by content, or update(folder), or remove(name)"
        yield Problem(name, f"its folder {entry.path} is missing", remedy, "missing")
        return
    try:
        adapter = load_adapter(folder)
    except (ValueError, LookupError, OSError) as error:
        yield Problem(name, f"it does not load: {error}", "mend the folder, or remove(name)", "adapter")
        return
    if adapter.fingerprint != entry.card.fingerprint:
        yield Problem(
            name,
            f"its fingerprint is {adapter.fingerprint[:12]}, the catalog has {entry.card.fingerprint[:12]}",
            "update(folder) if the change is meant, else restore the folder",
            "adapter",
        )
    try:
        card = read_card(folder, name)
    except (ValueError, OSError) as error:
        yield Problem(name, str(error), "restore card.json, then update(folder)", "adapter")
        return
    if not same_content(card, entry.card):
        yield Problem(name, "its card.json changed since it entered", "update(folder)", "adapter")


def _embeddings(catalog: Catalog, entry: Entry) -> Iterator[Problem]:
    name = entry.card.name
    try:
        embeddings = catalog.embeddings(entry.id)
    except ValueError as error:
        yield Problem(name, str(error), _REEMBED, "embeddings")
        return
    if len(embeddings) != len(entry.card.examples) or not len(embeddings):
        what = f"{len(embeddings)} embeddings for {len(entry.card.examples)} examples"
        yield Problem(name, what, _REEMBED, "embeddings")
    elif not np.isfinite(embeddings).all():
        yield Problem(name, "an embedding is not finite", _REEMBED, "embeddings")
    elif np.abs(np.linalg.norm(np.split(embeddings, 4, axis=1), axis=2) - 1).max() > 1e-3:
        yield Problem(name, "an embedding is not of norm 1", _REEMBED, "embeddings")


def _vectors(catalog: Catalog, home: Path, entries: list[Entry]) -> Iterator[Problem]:
    file = home / VECTORS_FILE
    digest = catalog.noted(VECTORS_KEY, catalog.generation)
    vectors = read_vectors(file, digest, len(entries), catalog.settings.dimension)
    if vectors is None:
        if digest is not None:  # without one it merely waits for the next search
            what = "is missing" if not file.is_file() else "is damaged"
            yield Problem(None, f"{VECTORS_FILE} {what}", _REDERIVE, "derived")
        return
    rows = all_vectors(vectors)
    for row, entry in zip(rows, entries, strict=True):
        expected = representation(catalog.embeddings(entry.id), entry.card.name)
        if np.abs(row - expected).max() > 1e-5:  # the file is the one that was written: these embeddings changed
            what = f"{VECTORS_FILE} disagrees with its embeddings"
            yield Problem(entry.card.name, what, _REEMBED, "embeddings")


def _fitted(catalog: Catalog) -> Iterator[Problem]:
    noted = catalog.last_noted(FITTED_KEY)
    try:
        if noted is not None:
            FitNote.read(noted)
    except ValueError as error:
        yield Problem(None, f"what was fitted cannot be read: {error}", _REDERIVE, "derived")


def _leftovers(catalog: Catalog, home: Path) -> Iterator[Problem]:
    copies = leftover_copies(home, catalog.entries(), copies=catalog.settings.copies)
    for place in [*copies, *leftover_vectors(home)]:
        what = f"{place.relative_to(home)} belongs to no adapter of the index"
        yield Problem(None, what, "compact(), or delete it", "leftover")
