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
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.database import Database
from loracompose.retrieval.discriminant import Spectrum, Statistics
from loracompose.retrieval.embedding import edges, representation, whole
from loracompose.retrieval.fitting import Fitted, Spectra, fit
from loracompose.retrieval.lexicon import Lexicon
from loracompose.retrieval.scale import ledger
from loracompose.retrieval.scale.ledger import Position, Profile, Record
from loracompose.retrieval.scale.metric import Frame, Singles
from loracompose.retrieval.scale.rows import FileWriter, Rows, file_digest
from loracompose.retrieval.scale.statistics import Moments, moments
from loracompose.retrieval.scale.structure import NEAREST, Structure, build_structure, write_structure
from loracompose.retrieval.scale.version import (
    COUNTS,
    EDGES,
    MEANS,
    NUMBERS,
    PATTERNS,
    VECTORS,
    WORDS,
    Half,
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


_HALVES = (whole, edges)

T = TypeVar("T")


class CancelledError(Exception):
    """The version is not wanted any more."""


@dataclass(frozen=True, eq=False)
class _Gathered:
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


def make_version(
    database: Database, home: Path, previous: Version | None = None, cancelled: Callable[[], bool] = lambda: False
) -> Record:
    """Make a version of the present generation, and make it current.

    Args:
        database: the catalog's file, by a connection of its own: it is read for minutes.
        home: the index folder.
        previous: the version to go on from; only if it is current still, for the departures since another one that
            its successor knew are forgotten.
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
        if previous is not None and (current is None or current.token != previous.token):
            previous = None
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
        departed: list[Profile] = []
        if previous is not None:
            departed = ledger.departures(database, previous.position.departure, settings.width)
        width, position, present = settings.width, ledger.position(database), ledger.all_ids(database)
        sample = ledger.chosen_profiles(database, _spread(present, _SAMPLE).tolist(), width)
        if previous is None:
            centres = _both(lambda half: _centre([half(profile.embeddings) for profile in sample], width // 2))
            state = _both(lambda half: Moments.none(width // 2))
        else:
            centres = previous.halves[0].frame.centre, previous.halves[1].frame.centre
            first, second = (Moments(half.scatter, half.frame.freedom) for half in previous.halves)
            state = first, second
            for gone in departed:
                if gone.id <= previous.position.adapter:
                    state = state[0].without(whole(gone.embeddings)), state[1].without(edges(gone.embeddings))
        counted = _spread(present, _COUNTED)
        files = {kind: FileWriter(file_of(home, token, kind)) for kind in (MEANS, EDGES, WORDS, COUNTS)}
        sizes, lengths, known, examples = [], [], [], 0
        for block, change in _blocks(database, previous, present, centres, width):
            if cancelled():
                raise CancelledError("no longer wanted")
            state = state if change is None else (state[0].plus(change[0]), state[1].plus(change[1]))
            for kind, means in zip((MEANS, EDGES), block.means, strict=True):
                files[kind].write(means.astype("<f4").tobytes())
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
        centres=centres,
        sample=sample,
        frequencies=Frequencies.of(Wordings.joined(known), examples),
    )
    return gathered, {kind: file.close() for kind, file in files.items()}


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
            yield (
                _Block(previous.ids[rows], previous.sizes[rows], kept, previous.words.take(rows)),
                None,
            )
    after = 0 if previous is None else previous.position.adapter
    for profiles in ledger.profiles(database, after, width):
        change, sizes, own = moments([whole(profile.embeddings) for profile in profiles])
        change_edges, _, own_edges = moments([edges(profile.embeddings) for profile in profiles])
        ids = np.array([profile.id for profile in profiles], dtype=np.int64)
        wordings = Wordings.joined([read_wording(profile.prompts) for profile in profiles])
        first_means = (own - centres[0]).astype(np.float32)
        means_pair = first_means, (own_edges - centres[1]).astype(np.float32)
        yield _Block(ids, sizes, means_pair, wordings), (change, change_edges)


def _derive(home: Path, token: str, gathered: _Gathered, cancelled: Callable[[], bool]) -> dict[str, str]:
    fitted, spectra = _fitted(gathered)
    chosen = (fitted.shrinkage, fitted.spread), (fitted.edges_shrinkage, fitted.edges_spread)
    halves = []
    for number, kind in enumerate((MEANS, EDGES)):
        rows = Rows(file_of(home, token, kind), len(gathered.centres[number]))
        frame = _frame(gathered, number, (spectra.whole, spectra.edges)[number], *chosen[number])
        if kind == MEANS:  # which faiss searches
            frame = replace(frame, directions=_directions(frame, rows))
        parts = [frame.squares(block) for _, block in _watched(rows, cancelled)]
        squares = np.concatenate([*parts, np.zeros(0, dtype=np.float32)])
        halves.append(Half(frame, gathered.moments[number].scatter, rows, squares))
    structure = _structure(halves[0], gathered.sample, cancelled)
    arrays: dict[str, NDArray[Any]] = {
        "ids": gathered.ids,
        "sizes": gathered.sizes.astype(np.int32),
        "starts": gathered.starts,
        "keys": gathered.frequencies.keys,
        "counts": gathered.frequencies.counts,
        **halves[0].arrays(MEANS),
        **halves[1].arrays(EDGES),
    }
    notes = notes_of(gathered.position, halves, fitted, gathered.frequencies.examples, structure)
    _, numbers = write_numbers(file_of(home, token, NUMBERS), arrays, notes)
    vectors = file_of(home, token, VECTORS)
    write_structure(structure, vectors)
    return {NUMBERS: numbers, VECTORS: file_digest(vectors)}


def _frame(gathered: _Gathered, number: int, spectrum: Spectrum, shrinkage: float, temperature: float) -> Frame:
    """The frame of one half, as yet without the directions that faiss searches."""
    return Frame(
        centre=gathered.centres[number],
        whitening=spectrum.axes * spectrum.scale(shrinkage),
        directions=np.zeros((len(gathered.centres[number]), 0), dtype=np.float32),
        freedom=max(gathered.moments[number].freedom, 1),
        shrinkage=shrinkage,
        temperature=temperature,
    )


def _fitted(gathered: _Gathered) -> tuple[Fitted, Spectra]:
    """Everything chosen on the sample under the covariances of the whole pool; the pool's own choice if it is all."""
    groups = [profile.embeddings for profile in gathered.sample]
    spectra = Spectra(*(_spectrum(groups, half, state) for half, state in zip(_HALVES, gathered.moments, strict=True)))
    lexicon = Lexicon.of([profile.prompts for profile in gathered.sample])
    means = np.stack([representation(group, str(id)) for id, group, _ in gathered.sample])
    return fit(means, groups, spectra, lexicon), spectra


def _spectrum(groups: list[Singles], half: Callable[[Singles], Singles], state: Moments) -> Spectrum:
    """The means of the sample under the covariance of the whole pool."""
    statistics = Statistics.of([half(group) for group in groups], len(state.scatter))
    share = statistics.freedom / max(state.freedom, 1)
    return replace(Spectrum.of(replace(statistics, scatter=state.scatter * share)), freedom=state.freedom)


def _directions(frame: Frame, rows: Rows) -> Singles:
    """Principal directions of the whitened means, in the space of the features, (D, d)."""
    white = frame.whitened(rows.take(_spread(np.arange(len(rows)), _LEARNED)))
    white -= white.mean(axis=0)
    _, axes = np.linalg.eigh(white.T @ white)
    kept = axes[:, ::-1][:, :DIRECTIONS]
    # Turned at random, so that all coordinates vary alike: faiss spends as many bits on each.
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((kept.shape[1],) * 2))
    return np.asarray(frame.whitening @ kept @ turn, dtype=np.float32)


def _structure(half: Half, sample: list[Profile], cancelled: Callable[[], bool]) -> Structure:
    frame, rows, squares = half.frame, half.means, half.squares

    def blocks() -> Iterator[Singles]:
        for start, block in _watched(rows, cancelled):
            yield frame.reduced(block, squares[start : start + len(block)])

    trained = _spread(np.arange(len(rows)), _TRAINED)
    queries = frame.centred(_queries([whole(profile.embeddings) for profile in sample]))
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


def _queries(groups: list[Singles]) -> Singles:
    """Fresh draws: the mean of one adapter with the deviation of an example of another, (n, D)."""
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


def _centre(groups: list[Singles], width: int) -> Singles:
    if not groups:
        return np.zeros(width, dtype=np.float32)
    means = np.stack([group.mean(axis=0, dtype=np.float64) for group in groups])
    return np.asarray(means.mean(axis=0), dtype=np.float32)


def _both(make: Callable[[Callable[[Singles], Singles]], T]) -> tuple[T, T]:
    """Of whole prompts and of their edges."""
    return make(whole), make(edges)


def _spread(items: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """So many of the items, or all, evenly spaced."""
    if len(items) <= count:
        return items
    return items[np.linspace(0, len(items) - 1, count).astype(np.int64)]
