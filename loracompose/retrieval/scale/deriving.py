"""The second pass of making a version: what is fitted, the frames of all parts, and the structure that is searched.

Hyper-parameters are fitted on a sample of the pool, under the covariance of all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.discriminant import Spectrum, Statistics
from loracompose.retrieval.embedding import representation
from loracompose.retrieval.fitting import Fitted, Shaped, Spectra, fit
from loracompose.retrieval.lexicon import Lexicon
from loracompose.retrieval.scale.choosing import NEAREST, build_structure, coded_together
from loracompose.retrieval.scale.drift import Floats
from loracompose.retrieval.scale.gathering import CancelledError, Gathered, spread
from loracompose.retrieval.scale.ledger import Profile
from loracompose.retrieval.scale.metric import Frame, Singles, stored_width
from loracompose.retrieval.scale.parts import SHAPE, WHOLE
from loracompose.retrieval.scale.rows import HeldRows, Rows, file_digest
from loracompose.retrieval.scale.scanning import best_of
from loracompose.retrieval.scale.statistics import Moments
from loracompose.retrieval.scale.structure import Structure, write_structure
from loracompose.retrieval.scale.version import (
    EDGES,
    MEANS,
    NUMBERS,
    SHAPES,
    VECTORS,
    Part,
    file_of,
    notes_of,
    write_numbers,
)

DIRECTIONS = 511
"""Principal directions of the whitened means that faiss gets at most. Of a million adapters the nearest ten are among
64 candidates by so many directions, and among 512 by half of them: those it misses are few but far off in the rest."""

_LEARNED = 32768  # means that directions are found from
_TRAINED = 65536  # means that faiss is trained on
_QUERIES = 512  # that recall is measured on: its standard error is then about 0.0015
_FETCHED = 128  # rows at once, and times, that fetching is timed by


def derive_files(home: Path, token: str, gathered: Gathered, cancelled: Callable[[], bool]) -> dict[str, str]:
    """Write the files of numbers and of vectors of a version whose means are written; returns their digests."""
    fitted, spectra = _fitted(gathered)
    chosen = (
        (fitted.shrinkage, fitted.spread),
        (fitted.edges_shrinkage, fitted.edges_spread),
        (fitted.shape_shrinkage, fitted.shape_spread),
    )
    first, second = (
        Rows(file_of(home, token, kind), len(centre))
        for kind, centre in zip((MEANS, EDGES), gathered.centres, strict=False)
    )
    means: tuple[Rows | HeldRows, ...] = (first, second, HeldRows(gathered.shapes))
    parts = []
    for number, rows in enumerate(means):
        frame = _frame(gathered, number, spectra[number], *chosen[number])
        if number == WHOLE:  # which faiss searches
            frame = replace(frame, directions=_directions(frame, rows))
        found = [frame.squares(block) for _, block in _watched(rows, cancelled)]
        squares = np.concatenate([*found, np.zeros(0, dtype=np.float32)])
        parts.append(Part(frame, gathered.moments[number].scatter, rows, squares))
    structure = _structure(parts[WHOLE], gathered.sample, cancelled)
    arrays: dict[str, NDArray[Any]] = {
        "ids": gathered.ids,
        "sizes": gathered.sizes.astype(np.int32),
        "starts": gathered.starts,
        "keys": gathered.frequencies.keys,
        "counts": gathered.frequencies.counts,
        SHAPES: gathered.shapes,
        **parts[0].arrays(MEANS),
        **parts[1].arrays(EDGES),
        **parts[2].arrays(SHAPES),
    }
    notes = notes_of(gathered.position, parts, fitted, gathered.frequencies.examples, structure)
    _, numbers = write_numbers(file_of(home, token, NUMBERS), arrays, notes)
    vectors = file_of(home, token, VECTORS)
    write_structure(structure, vectors)
    return {NUMBERS: numbers, VECTORS: file_digest(vectors)}


def _frame(gathered: Gathered, number: int, spectrum: Spectrum, shrinkage: float, temperature: float) -> Frame:
    """The frame of one part, as yet without the directions that faiss searches."""
    return Frame(
        centre=gathered.centres[number],
        whitening=spectrum.axes * spectrum.scale(shrinkage),
        directions=np.zeros((len(gathered.centres[number]), 0), dtype=np.float32),
        freedom=max(gathered.moments[number].freedom, 1),
        shrinkage=shrinkage,
        temperature=temperature,
    )


def _fitted(gathered: Gathered) -> tuple[Fitted, list[Spectrum]]:
    """Everything chosen on the sample under the covariances of the whole pool; the pool's own choice if it is all."""
    sample = gathered.sample
    parts = zip(*(profile.parts for profile in sample), strict=True)
    spectra = [_spectrum(groups, state) for groups, state in zip(parts, gathered.moments, strict=True)]
    prompts = [profile.prompts for profile in sample]
    means = np.stack([representation(profile.embeddings, str(profile.id)) for profile in sample])
    shaped = Shaped(spectra[SHAPE], prompts)
    examples = [profile.embeddings for profile in sample]
    return fit(means, examples, Spectra(*spectra[:SHAPE]), Lexicon.of(prompts), shaped), spectra


def _spectrum(groups: Sequence[Singles], state: Moments) -> Spectrum:
    """The means of the sample under the covariance of the whole pool."""
    statistics = Statistics.of(groups, len(state.scatter))
    share = statistics.freedom / max(state.freedom, 1)
    return replace(Spectrum.of(replace(statistics, scatter=state.scatter * share)), freedom=state.freedom)


def _directions(frame: Frame, rows: Rows | HeldRows) -> Singles:
    """Principal directions of the whitened means, in the space of the features, (D, d)."""
    white = frame.whitened(rows.take(spread(np.arange(len(rows)), _LEARNED)).rows)
    white -= white.mean(axis=0)
    _, axes = np.linalg.eigh(white.T @ white)
    return np.asarray(frame.whitening @ arranged(axes[:, ::-1][:, :DIRECTIONS]), dtype=np.float32)


def arranged(axes: Floats) -> Floats:
    """Axes (D, d), those first that vary most, so that each of the codes of four bits has its share of what varies.

    A code stands for a few neighbouring coordinates. Each gets one of the leading axes, which are turned at random
    among themselves, so that all of them vary alike; the others between them vary little and cost no code of their own.
    """
    lead = np.arange(0, axes.shape[1], coded_together(stored_width(axes.shape[1])))
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((len(lead),) * 2))
    found = np.empty_like(axes)
    found[:, lead] = axes[:, : len(lead)] @ turn
    found[:, np.setdiff1d(np.arange(axes.shape[1]), lead)] = axes[:, len(lead) :]
    return found


def _structure(part: Part, sample: list[Profile], cancelled: Callable[[], bool]) -> Structure:
    frame, rows, squares = part.frame, part.means, part.squares

    def blocks() -> Iterator[Singles]:
        for start, block in _watched(rows, cancelled):
            yield frame.reduced(block, squares[start : start + len(block)])

    trained = spread(np.arange(len(rows)), _TRAINED)
    queries = frame.centred(_queries([profile.parts[WHOLE] for profile in sample]))
    return build_structure(
        blocks,
        len(rows),
        frame.reduced(rows.take(trained).rows, squares[trained]),
        frame.queries(queries),
        nearest_rows(frame, rows, squares, queries),
        _row_seconds(frame, rows),
    )


def _row_seconds(frame: Frame, rows: Rows | HeldRows) -> float:
    """Of this thread, to fetch one row among many and to compare it with a prompt."""
    chosen = np.random.default_rng(0).integers(0, len(rows), (_FETCHED, _FETCHED))
    vector = frame.precision[0]
    start = time.thread_time()
    for some in chosen:
        rows.take(some).times(vector)
    return (time.thread_time() - start) / chosen.size


def nearest_rows(frame: Frame, rows: Rows | HeldRows, squares: Singles, queries: Singles) -> list[NDArray[np.int64]]:
    """The nearest adapters of centred queries by comparing with all, at the time of the version."""
    turned = queries @ frame.precision  # (n, D)
    best = np.full((len(queries), 0), 0.0)
    places = np.zeros((len(queries), 0), dtype=np.int64)
    for start, block in rows.blocks():
        scores = turned @ block.T - 0.5 * squares[start : start + len(block)]
        here = np.broadcast_to(np.arange(start, start + len(block)), scores.shape)
        best, places = best_of(np.concatenate([best, scores], axis=1), np.concatenate([places, here], axis=1), NEAREST)
    return list(places)


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


def _watched(rows: Rows | HeldRows, cancelled: Callable[[], bool]) -> Iterator[tuple[int, Singles]]:
    for start, block in rows.blocks():
        if cancelled():
            raise CancelledError("no longer wanted")
        yield start, block
