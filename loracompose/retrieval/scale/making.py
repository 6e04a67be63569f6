"""Making a version: one pass over what is new, one over the means; memory bounded whatever the size of the pool.

From a version before, the statistics, means and n-grams of what stays are taken over: only what came and went since is
read from the catalog. Hyper-parameters are fitted on a sample of the pool, under the covariance of all of it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.database import Database
from loracompose.retrieval.discriminant import Spectrum, Statistics
from loracompose.retrieval.embedding import representation
from loracompose.retrieval.fitting import Fitted, fit
from loracompose.retrieval.lexicon import Lexicon
from loracompose.retrieval.scale import ledger
from loracompose.retrieval.scale.ledger import Position, Profile, Record
from loracompose.retrieval.scale.metric import Frame, Singles
from loracompose.retrieval.scale.rows import FileWriter, Rows, file_digest
from loracompose.retrieval.scale.statistics import Moments, moments
from loracompose.retrieval.scale.structure import NEAREST, Structure, build_structure, write_structure
from loracompose.retrieval.scale.version import (
    COUNTS,
    MEANS,
    NUMBERS,
    PATTERNS,
    VECTORS,
    WORDS,
    Version,
    file_of,
    notes_of,
    recorded,
    write_numbers,
)
from loracompose.retrieval.scale.wordings import Frequencies, Wordings, read_wording

DIRECTIONS = 255
"""Principal directions of the whitened means that faiss gets at most."""

LOCK_FILE = "version-lock"

_SAMPLE = 512  # adapters that hyper-parameters are fitted on
_COUNTED = 4096  # adapters that n-grams are counted over
_LEARNED = 32768  # means that directions are found from
_TRAINED = 131072  # means that faiss is trained on
_QUERIES = 256  # that recall is measured on


class CancelledError(Exception):
    """The version is not wanted any more."""


@dataclass(frozen=True, eq=False)
class _Gathered:
    """What the pass over the pool leaves, beside the files of means and n-grams."""

    position: Position
    epoch: int
    moments: Moments
    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    starts: NDArray[np.int64]
    centre: Singles
    sample: list[Profile]
    frequencies: Frequencies


class _Block(NamedTuple):
    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    means: Singles  # centred
    wordings: Wordings


def make_version(
    database: Database, home: Path, previous: Version | None = None, cancelled: Callable[[], bool] = lambda: False
) -> Record:
    """Make a version of the present generation, and make it current.

    Args:
        database: the catalog's file, by a connection of its own: it is read for minutes.
        home: the index folder.
        previous: the current version, if it is sound.
        cancelled: asked now and then.

    Raises:
        CancelledError: it was cancelled, or everything was embedded anew meanwhile.
        PermissionError: the catalog cannot be written.
    """
    token = uuid.uuid4().hex[:12]
    _, before = ledger.generation_and_record(database)
    with _alone(home):
        _, current = ledger.generation_and_record(database)
        if current is not None and current != before:  # another process made one meanwhile
            return current
        try:
            gathered, digests = _gather(database, home, token, previous, cancelled)
            digests |= _derive(home, token, gathered, cancelled)
            record = recorded(home, token, gathered.epoch, digests)
            if not ledger.install(database, record, gathered.position):
                raise CancelledError("everything was embedded anew")
        except BaseException:
            sweep(home, f"version-{token}.*")
            raise
        sweep(home, *PATTERNS, keep=token)
    return record


def sweep(home: Path, *patterns: str, keep: str | None = None) -> None:
    """Delete files of versions, but not those of one; who has them open can still read them."""
    for pattern in patterns:
        for path in home.glob(pattern):
            if keep is None or not path.name.startswith(f"version-{keep}."):
                path.unlink(missing_ok=True)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One version is made at a time, among all processes; on Windows, which has no such locks, within none."""
    if os.name == "nt":
        yield
        return
    import fcntl  # which only POSIX has

    with (home / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _gather(
    database: Database, home: Path, token: str, previous: Version | None, cancelled: Callable[[], bool]
) -> tuple[_Gathered, dict[str, str]]:
    with database.reading():
        settings = ledger.settings(database)
        if previous is not None and previous.epoch != settings.epoch:
            previous = None
        width, position, present = settings.width, ledger.position(database), ledger.all_ids(database)
        sample = ledger.chosen_profiles(database, _spread(present, _SAMPLE).tolist(), width)
        centre = _centre(sample, width) if previous is None else previous.frame.centre
        state = Moments.none(width) if previous is None else Moments(previous.scatter, previous.frame.freedom)
        if previous is not None:
            for gone in ledger.departures(database, previous.position.departure, width):
                if gone.id <= previous.position.adapter:
                    state = state.without(gone.embeddings)
        counted = _spread(present, _COUNTED)
        files = {kind: FileWriter(file_of(home, token, kind)) for kind in (MEANS, WORDS, COUNTS)}
        sizes, lengths, known, examples = [], [], [], 0
        for block, change in _blocks(database, previous, present, centre, width):
            if cancelled():
                raise CancelledError("no longer wanted")
            state = state if change is None else state.plus(change)
            files[MEANS].write(block.means.astype("<f4").tobytes())
            files[WORDS].write(block.wordings.keys.astype("<u4").tobytes())
            files[COUNTS].write(block.wordings.counts.tobytes())
            sizes.append(block.sizes)
            lengths.append(block.wordings.lengths)
            chosen = np.flatnonzero(np.isin(block.ids, counted))
            known.append(block.wordings.chosen(chosen.tolist()))
            examples += int(block.sizes[chosen].sum())
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.concatenate([*lengths, np.zeros(0, np.int64)]))])
    gathered = _Gathered(
        position=position,
        epoch=settings.epoch,
        moments=state,
        ids=present,
        sizes=np.concatenate([*sizes, np.zeros(0, dtype=np.int64)]),
        starts=starts,
        centre=centre,
        sample=sample,
        frequencies=Frequencies.of(Wordings.joined(known), examples),
    )
    return gathered, {kind: file.close() for kind, file in files.items()}


def _blocks(
    database: Database, previous: Version | None, present: NDArray[np.int64], centre: Singles, width: int
) -> Iterator[tuple[_Block, Moments | None]]:
    """All adapters in the order of their row ids, and the moments of those that the version before lacks."""
    if previous is not None:
        stays = np.isin(previous.ids, present)
        for start, means in previous.means.blocks():
            rows = start + np.flatnonzero(stays[start : start + len(means)])
            yield (
                _Block(previous.ids[rows], previous.sizes[rows], means[rows - start], previous.words.take(rows)),
                None,
            )
    after = 0 if previous is None else previous.position.adapter
    for profiles in ledger.profiles(database, after, width):
        change, sizes, own = moments([profile.embeddings for profile in profiles])
        ids = np.array([profile.id for profile in profiles], dtype=np.int64)
        wordings = Wordings.joined([read_wording(profile.prompts) for profile in profiles])
        yield _Block(ids, sizes, (own - centre).astype(np.float32), wordings), change


def _derive(home: Path, token: str, gathered: _Gathered, cancelled: Callable[[], bool]) -> dict[str, str]:
    width = len(gathered.centre)
    rows = Rows(file_of(home, token, MEANS), width)
    fitted, spectrum = _fitted(gathered)
    frame = Frame(
        centre=gathered.centre,
        whitening=spectrum.axes * spectrum.scale(fitted.shrinkage),
        directions=np.zeros((width, 0), dtype=np.float32),
        freedom=max(gathered.moments.freedom, 1),
        shrinkage=fitted.shrinkage,
        temperature=fitted.spread,
    )
    frame = replace(frame, directions=_directions(frame, rows))
    squares = np.concatenate([frame.squares(block) for _, block in _watched(rows, cancelled)])
    structure = _structure(frame, rows, squares, gathered.sample, cancelled)
    arrays: dict[str, NDArray[Any]] = {
        "ids": gathered.ids,
        "sizes": gathered.sizes.astype(np.int32),
        "squares": squares,
        "starts": gathered.starts,
        "scatter": gathered.moments.scatter,
        "centre": frame.centre,
        "whitening": frame.whitening,
        "directions": frame.directions,
        "keys": gathered.frequencies.keys,
        "counts": gathered.frequencies.counts,
    }
    notes = notes_of(gathered.position, frame, fitted, gathered.frequencies.examples, structure)
    _, numbers = write_numbers(file_of(home, token, NUMBERS), arrays, notes)
    vectors = file_of(home, token, VECTORS)
    write_structure(structure, vectors)
    return {NUMBERS: numbers, VECTORS: file_digest(vectors)}


def _fitted(gathered: _Gathered) -> tuple[Fitted, Spectrum]:
    """Everything chosen on the sample under the covariance of the whole pool; the pool's own choice if it is all."""
    groups = [profile.embeddings for profile in gathered.sample]
    statistics = Statistics.of(groups, len(gathered.centre))
    share = statistics.freedom / max(gathered.moments.freedom, 1)
    spectrum = Spectrum.of(replace(statistics, scatter=gathered.moments.scatter * share))
    spectrum = replace(spectrum, freedom=gathered.moments.freedom)
    lexicon = Lexicon.of([profile.prompts for profile in gathered.sample])
    means = np.stack([representation(group, str(id)) for id, group, _ in gathered.sample])
    return fit(means, groups, spectrum, lexicon), spectrum


def _directions(frame: Frame, rows: Rows) -> Singles:
    """Principal directions of the whitened means, in the space of the features, (D, d)."""
    white = frame.whitened(rows.take(_spread(np.arange(len(rows)), _LEARNED)))
    white -= white.mean(axis=0)
    _, axes = np.linalg.eigh(white.T @ white)
    kept = axes[:, ::-1][:, :DIRECTIONS]
    # Turned at random, so that all coordinates vary alike: faiss spends as many bits on each.
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((kept.shape[1],) * 2))
    return np.asarray(frame.whitening @ kept @ turn, dtype=np.float32)


def _structure(
    frame: Frame, rows: Rows, squares: Singles, sample: list[Profile], cancelled: Callable[[], bool]
) -> Structure:
    def blocks() -> Iterator[Singles]:
        for start, block in _watched(rows, cancelled):
            yield frame.reduced(block, squares[start : start + len(block)])

    trained = _spread(np.arange(len(rows)), _TRAINED)
    queries = _queries(sample) - frame.centre
    return build_structure(
        blocks,
        len(rows),
        frame.reduced(rows.take(trained), squares[trained]),
        frame.queries(queries),
        nearest_rows(frame, rows, squares, queries),
    )


def nearest_rows(frame: Frame, rows: Rows, squares: Singles, queries: Singles) -> list[NDArray[np.int64]]:
    """The nearest adapters of centred queries by comparing with all, at the time of the version."""
    turned = queries @ frame.precision  # (n, D)
    best = np.full((len(queries), 0), 0.0)
    places = np.zeros((len(queries), 0), dtype=np.int64)
    for start, block in rows.blocks():
        scores = turned @ block.T - 0.5 * squares[start : start + len(block)]
        here = np.broadcast_to(np.arange(start, start + len(block)), scores.shape)
        best, places = best_of(np.concatenate([best, scores], axis=1), np.concatenate([places, here], axis=1), NEAREST)
    return list(places)


def best_of(
    scores: NDArray[np.float64], places: NDArray[np.int64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The highest scores of each row with their places, both (n, count), in no order."""
    if scores.shape[1] <= count:
        return scores, places
    kept = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(places, kept, axis=1)


def _queries(sample: list[Profile]) -> Singles:
    """Fresh draws: the mean of one adapter with the deviation of an example of another, (n, D)."""
    groups = [profile.embeddings for profile in sample]
    means = [group.mean(axis=0) for group in groups]
    deviations = np.concatenate(
        [
            (group - mean) * np.sqrt(len(group) / max(len(group) - 1, 1))
            for group, mean in zip(groups, means, strict=True)
        ]
    )
    random = np.random.default_rng(0)
    own = random.integers(0, len(groups), _QUERIES)
    drawn = np.stack(means)[own] + deviations[random.integers(0, len(deviations), _QUERIES)]
    halves = np.split(drawn, 2, axis=1)
    return np.concatenate(
        [half / np.maximum(np.linalg.norm(half, axis=1, keepdims=True), 1e-9) for half in halves], axis=1
    ).astype(np.float32)


def _watched(rows: Rows, cancelled: Callable[[], bool]) -> Iterator[tuple[int, Singles]]:
    for start, block in rows.blocks():
        if cancelled():
            raise CancelledError("no longer wanted")
        yield start, block


def _centre(sample: list[Profile], width: int) -> Singles:
    if not sample:
        return np.zeros(width, dtype=np.float32)
    means = np.stack([profile.embeddings.mean(axis=0, dtype=np.float64) for profile in sample])
    return np.asarray(means.mean(axis=0), dtype=np.float32)


def _spread(items: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """So many of the items, or all, evenly spaced."""
    if len(items) <= count:
        return items
    return items[np.linspace(0, len(items) - 1, count).astype(np.int64)]
