"""The first pass of making a version: statistics, means and n-grams of a pool, its memory bounded whatever its size.

From a version before, what stays is taken over: only what came and went since is read from the catalog.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.database import Database
from loracompose.retrieval.embedding import edges, whole
from loracompose.retrieval.scale import ledger
from loracompose.retrieval.scale.ledger import Position, Profile
from loracompose.retrieval.scale.metric import Singles
from loracompose.retrieval.scale.rows import FileWriter, packed
from loracompose.retrieval.scale.statistics import Moments, moments
from loracompose.retrieval.scale.version import COUNTS, EDGES, MEANS, WORDS, Version, file_of
from loracompose.retrieval.scale.wordings import Frequencies, Wordings, read_wordings

_SAMPLE = 512  # adapters that hyper-parameters are fitted on
_COUNTED = 4096  # adapters that n-grams are counted over

T = TypeVar("T")


class CancelledError(Exception):
    """The version is not wanted any more."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """What the pass over the pool leaves, beside the files of means and n-grams."""

    position: Position
    epoch: int
    moments: tuple[Moments, Moments]
    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    starts: NDArray[np.int64]
    centres: tuple[Singles, Singles]
    sample: list[Profile]
    frequencies: Frequencies


class _Block(NamedTuple):
    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    means: tuple[Singles, Singles]  # centred, of whole prompts and of edges
    wordings: Wordings


def gather(
    database: Database, home: Path, token: str, previous: Version | None, cancelled: Callable[[], bool]
) -> tuple[Gathered, dict[str, str]]:
    """Read the present generation, and write the files of means and n-grams of a version; also their digests."""
    with database.reading():
        settings = ledger.settings(database)
        if previous is not None and previous.epoch != settings.epoch:
            previous = None
        departed: list[Profile] = []
        if previous is not None:
            departed = ledger.departures(database, previous.position.departure, settings.width)
        width, position, present = settings.width, ledger.position(database), ledger.all_ids(database)
        sample = ledger.chosen_profiles(database, spread(present, _SAMPLE).tolist(), width)
        centres, state = _begun(previous, departed, sample, width)
        counted = spread(present, _COUNTED)
        files = {kind: FileWriter(file_of(home, token, kind)) for kind in (MEANS, EDGES, WORDS, COUNTS)}
        sizes, lengths, known, examples = [], [], [], 0
        for block, change in _blocks(database, previous, present, centres, width):
            if cancelled():
                raise CancelledError("no longer wanted")
            state = state if change is None else (state[0].plus(change[0]), state[1].plus(change[1]))
            _write(files, block)
            sizes.append(block.sizes)
            lengths.append(block.wordings.lengths)
            chosen = np.flatnonzero(np.isin(block.ids, counted))
            known.append(block.wordings.chosen(chosen.tolist()))
            examples += int(block.sizes[chosen].sum())
    gathered = Gathered(
        position=position,
        epoch=settings.epoch,
        moments=state,
        ids=present,
        sizes=np.concatenate([*sizes, np.zeros(0, dtype=np.int64)]),
        starts=np.concatenate([[0], np.cumsum(np.concatenate([*lengths, np.zeros(0, dtype=np.int64)]))]),
        centres=centres,
        sample=sample,
        frequencies=Frequencies.of(Wordings.joined(known), examples),
    )
    return gathered, {kind: file.close() for kind, file in files.items()}


def spread(items: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """So many of the items, or all, evenly spaced."""
    if len(items) <= count:
        return items
    return items[np.linspace(0, len(items) - 1, count).astype(np.int64)]


def _begun(
    previous: Version | None, departed: list[Profile], sample: list[Profile], width: int
) -> tuple[tuple[Singles, Singles], tuple[Moments, Moments]]:
    """The centres, and the moments of what stays of the version before."""
    if previous is None:
        centres = _both(lambda half: _centre([half(profile.embeddings) for profile in sample], width // 2))
        return centres, _both(lambda half: Moments.none(width // 2))
    first, second = (Moments(half.scatter, half.frame.freedom) for half in previous.halves)
    for gone in departed:
        if gone.id <= previous.position.adapter:
            first, second = first.without(whole(gone.embeddings)), second.without(edges(gone.embeddings))
    return (previous.halves[0].frame.centre, previous.halves[1].frame.centre), (first, second)


def _write(files: dict[str, FileWriter], block: _Block) -> None:
    for kind, means in zip((MEANS, EDGES), block.means, strict=True):
        files[kind].write(packed(means))
    files[WORDS].write(block.wordings.keys.astype("<u4").tobytes())
    files[COUNTS].write(block.wordings.counts.tobytes())


def _blocks(
    database: Database,
    previous: Version | None,
    present: NDArray[np.int64],
    centres: tuple[Singles, Singles],
    width: int,
) -> Iterator[tuple[_Block, tuple[Moments, Moments] | None]]:
    """All adapters in the order of their row ids, and the moments of those that the version before lacks."""
    if previous is not None:
        stays = np.isin(previous.ids, present)
        first, second = previous.halves
        for (start, means), (_, ends) in zip(first.means.blocks(), second.means.blocks(), strict=True):
            rows = start + np.flatnonzero(stays[start : start + len(means)])
            kept = means[rows - start], ends[rows - start]
            yield _Block(previous.ids[rows], previous.sizes[rows], kept, previous.words.take(rows)), None
    after = 0 if previous is None else previous.position.adapter
    for profiles in ledger.profiles(database, after, width):
        change, sizes, own = moments([whole(profile.embeddings) for profile in profiles])
        change_edges, _, own_edges = moments([edges(profile.embeddings) for profile in profiles])
        ids = np.array([profile.id for profile in profiles], dtype=np.int64)
        wordings = read_wordings([profile.prompts for profile in profiles])
        centred = (own - centres[0]).astype(np.float32), (own_edges - centres[1]).astype(np.float32)
        yield _Block(ids, sizes, centred, wordings), (change, change_edges)


def _centre(groups: list[Singles], width: int) -> Singles:
    if not groups:
        return np.zeros(width, dtype=np.float32)
    means = np.stack([group.mean(axis=0, dtype=np.float64) for group in groups])
    return np.asarray(means.mean(axis=0), dtype=np.float32)


def _both(make: Callable[[Callable[[Singles], Singles]], T]) -> tuple[T, T]:
    """Of whole prompts and of their edges."""
    return make(whole), make(edges)
