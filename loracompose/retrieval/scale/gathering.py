"""The first pass of making a version: statistics, means and n-grams of a pool, its memory bounded whatever its size.

From a version before, what stays is taken over: only what came and went since is read from the catalog.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.database import Database
from loracompose.retrieval.scale import ledger
from loracompose.retrieval.scale.ledger import Position, Profile
from loracompose.retrieval.scale.metric import Singles
from loracompose.retrieval.scale.parts import SHAPE, part_widths
from loracompose.retrieval.scale.rows import FileWriter, packed
from loracompose.retrieval.scale.statistics import Moments, moments
from loracompose.retrieval.scale.version import COUNTS, EDGES, MEANS, WORDS, Version, file_of
from loracompose.retrieval.scale.wordings import Frequencies, Wordings, read_wordings
from loracompose.retrieval.shape import SHAPE_WIDTH

_SAMPLE = 512  # adapters that hyper-parameters are fitted on
_COUNTED = 4096  # adapters that n-grams are counted over


class CancelledError(Exception):
    """The version is not wanted any more."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """What the pass over the pool leaves, beside the files of means and n-grams; `shapes` (N, D) are centred means."""

    position: Position
    epoch: int
    moments: tuple[Moments, ...]
    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    starts: NDArray[np.int64]
    centres: tuple[Singles, ...]
    shapes: Singles
    sample: list[Profile]
    frequencies: Frequencies


class _Block(NamedTuple):
    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    means: tuple[Singles, ...]  # centred, of each part
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
        ids, sizes, lengths, known, shapes, examples = [], [], [], [], [], 0
        for block, change in _blocks(database, previous, present, centres, width):
            if cancelled():
                raise CancelledError("no longer wanted")
            if change is not None:
                state = tuple(old.plus(new) for old, new in zip(state, change, strict=True))
            _write(files, block)
            ids.append(block.ids)  # not `present`: an adapter whose examples are lost has no row
            sizes.append(block.sizes)
            lengths.append(block.wordings.lengths)
            shapes.append(block.means[SHAPE])
            chosen = np.flatnonzero(np.isin(block.ids, counted))
            known.append(block.wordings.chosen(chosen.tolist()))
            examples += int(block.sizes[chosen].sum())
    gathered = Gathered(
        position=position,
        epoch=settings.epoch,
        moments=state,
        ids=np.concatenate([*ids, np.zeros(0, dtype=np.int64)]),
        sizes=np.concatenate([*sizes, np.zeros(0, dtype=np.int64)]),
        starts=np.concatenate([[0], np.cumsum(np.concatenate([*lengths, np.zeros(0, dtype=np.int64)]))]),
        centres=centres,
        shapes=np.concatenate([*shapes, np.zeros((0, SHAPE_WIDTH), dtype=np.float32)]),
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
) -> tuple[tuple[Singles, ...], tuple[Moments, ...]]:
    """The centres, and the moments of what stays of the version before."""
    if previous is None:
        widths = part_widths(width)
        groups = zip(*(profile.parts for profile in sample), strict=True) if sample else ((),) * len(widths)
        centres = tuple(_centre(own, size) for own, size in zip(groups, widths, strict=True))
        return centres, tuple(map(Moments.none, widths))
    state = tuple(Moments(part.scatter, part.frame.freedom) for part in previous.parts)
    for gone in departed:
        if gone.id <= previous.position.adapter:
            state = tuple(old.without(own) for old, own in zip(state, gone.parts, strict=True))
    return tuple(part.frame.centre for part in previous.parts), state


def _write(files: dict[str, FileWriter], block: _Block) -> None:
    for kind, means in zip((MEANS, EDGES), block.means, strict=False):  # of shapes there is no file
        files[kind].write(packed(means))
    files[WORDS].write(block.wordings.keys.astype("<u4").tobytes())
    files[COUNTS].write(block.wordings.counts.tobytes())


def _blocks(
    database: Database,
    previous: Version | None,
    present: NDArray[np.int64],
    centres: tuple[Singles, ...],
    width: int,
) -> Iterator[tuple[_Block, tuple[Moments, ...] | None]]:
    """All adapters in the order of their row ids, and the moments of those that the version before lacks."""
    if previous is not None:
        stays = np.isin(previous.ids, present)
        for blocks in zip(*(part.means.blocks() for part in previous.parts), strict=True):
            start, count = blocks[0][0], len(blocks[0][1])
            rows = start + np.flatnonzero(stays[start : start + count])
            kept = tuple(means[rows - start] for _, means in blocks)
            yield _Block(previous.ids[rows], previous.sizes[rows], kept, previous.words.take(rows)), None
    after = 0 if previous is None else previous.position.adapter
    for profiles in ledger.profiles(database, after, width):
        found = [moments(own) for own in zip(*(profile.parts for profile in profiles), strict=True)]
        ids = np.array([profile.id for profile in profiles], dtype=np.int64)
        wordings = read_wordings([profile.prompts for profile in profiles])
        centred = tuple((means - centre).astype(np.float32) for (*_, means), centre in zip(found, centres, strict=True))
        yield _Block(ids, found[0][1], centred, wordings), tuple(change for change, *_ in found)


def _centre(groups: Sequence[Singles], width: int) -> Singles:
    if not groups:
        return np.zeros(width, dtype=np.float32)
    means = np.stack([group.mean(axis=0, dtype=np.float64) for group in groups])
    return np.asarray(means.mean(axis=0), dtype=np.float32)
