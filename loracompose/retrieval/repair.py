"""Mending an index: what can be derived again is, what moved is found by its content, and the rest is reported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loracompose.retrieval.admission import CONFIG_FILE, absolute, complete, relative
from loracompose.retrieval.cards import Card, read_card
from loracompose.retrieval.catalog import Catalog, Entry
from loracompose.retrieval.compaction import drop_leftovers
from loracompose.retrieval.copies import discard_copy, make_copy
from loracompose.retrieval.embedding import Embedder, check_encoder
from loracompose.retrieval.entering import embedded
from loracompose.retrieval.locking import locked
from loracompose.retrieval.scale.sized import derive
from loracompose.retrieval.upkeep import forget_derived, refer
from loracompose.retrieval.verification import Problem, verify


@dataclass(frozen=True)
class RepairReport:
    """What was wrong and is mended, and what is wrong still, each with its remedy."""

    mended: tuple[Problem, ...]
    remaining: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong any more."""
        return not self.remaining


def repair(catalog: Catalog, home: Path, encoder: Callable[[], Embedder], look_in: Sequence[Path]) -> RepairReport:
    """Mend an index; arguments and errors are those of `AdapterIndex.repair`, `encoder` gives its embedder.

    An adapter that is embedded again moves to the end of the order, as one that is updated does.
    """
    before = verify(catalog, home).problems
    kinds = {problem.kind for problem in before}
    if not before or "catalog" in kinds:
        return RepairReport((), before)
    if "missing" in kinds:
        _find_moved(catalog, home, _named(catalog, before, "missing"), look_in)
    if "embeddings" in kinds:
        _embed_again(catalog, encoder(), _named(catalog, before, "embeddings"))
    if kinds & {"embeddings", "derived"}:
        forget_derived(catalog)
    if "leftover" in kinds:
        drop_leftovers(catalog, home)
    after = verify(catalog, home).problems
    if kinds & {"embeddings", "derived"} and not any(problem.kind == "embeddings" for problem in after):
        derive(catalog, home)
    return RepairReport(tuple(problem for problem in before if problem not in after), after)


def _named(catalog: Catalog, problems: Sequence[Problem], kind: str) -> list[Entry]:
    return [catalog.entry(problem.adapter) for problem in problems if problem.kind == kind and problem.adapter]


def _embed_again(catalog: Catalog, embedder: Embedder, entries: Sequence[Entry]) -> None:
    settings = catalog.settings
    check_encoder(settings, embedder)
    for entry in entries:
        if not entry.card.examples:  # lost with their embeddings: only the adapter's card.json has them
            continue
        embeddings = embedded(entry.card, embedder, settings)
        catalog.replace(entry.card, entry.path, embeddings, epoch=settings.epoch)


def _find_moved(catalog: Catalog, home: Path, entries: Sequence[Entry], look_in: Sequence[Path]) -> None:
    """Refer to folders of the same fingerprint and card, where there are any; of several to one of the same name."""
    candidates = _by_card(home, catalog.entries(), look_in)
    for entry in entries:
        places = candidates.get(_summed(entry.card), [])
        for place in sorted(places, key=lambda place: place.name != entry.card.name):
            if _is(entry.card, place):
                _refer(catalog, home, entry, place)
                break


def _by_card(home: Path, entries: Sequence[Entry], look_in: Sequence[Path]) -> dict[str, list[Path]]:
    """Adapter folders by their card's content: those in `look_in`, and those beside adapters of the index."""
    parents = dict.fromkeys([*look_in, *((home / entry.path).parent for entry in entries)])
    found: dict[str, list[Path]] = {}
    for folder in [path for parent in parents if parent.is_dir() for path in sorted(parent.iterdir())]:
        try:
            if (folder / CONFIG_FILE).is_file():
                found.setdefault(_summed(read_card(folder)), []).append(absolute(folder))
        except (ValueError, OSError):  # no card: then it is none that entered
            continue
    return found


def _summed(card: Card) -> str:
    content = [card.description, card.examples, card.kinds, card.tags, card.license, dict(card.extra)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is(card: Card, place: Path) -> bool:
    try:
        return complete(read_card(place, card.name), place) == card
    except (ValueError, LookupError, OSError):  # it does not load: then it is not the one that did
        return False


def _refer(catalog: Catalog, home: Path, entry: Entry, place: Path) -> None:
    if not catalog.settings.copies:
        refer(catalog, {entry.id: relative(place, home)})
        return
    with locked(home, shared=True):  # until it is referred to, the copy must not be taken for a leftover
        refer(catalog, {entry.id: relative(make_copy(place, home), home)})
    discard_copy(home / entry.path, home, copies=True)  # what is left of it
