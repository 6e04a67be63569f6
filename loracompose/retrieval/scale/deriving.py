"""The second pass of making a version: what is fitted, the frames of both halves, and the structure that is searched.

Hyper-parameters are fitted on a sample of the pool, under the covariance of all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.discriminant import Spectrum, Statistics
from loracompose.retrieval.embedding import representation, whole
from loracompose.retrieval.fitting import Fitted, Spectra, fit
from loracompose.retrieval.lexicon import Lexicon
from loracompose.retrieval.scale.gathering import CancelledError, Gathered, spread
from loracompose.retrieval.scale.ledger import Profile
from loracompose.retrieval.scale.metric import Frame, Singles
from loracompose.retrieval.scale.rows import Rows, file_digest
from loracompose.retrieval.scale.scanning import best_of
from loracompose.retrieval.scale.statistics import Moments
from loracompose.retrieval.scale.structure import NEAREST, Structure, build_structure, write_structure
from loracompose.retrieval.scale.version import (
    EDGES,
    HALVES,
    MEANS,
    NUMBERS,
    VECTORS,
    Half,
    file_of,
    notes_of,
    write_numbers,
)

DIRECTIONS = 255
"""Principal directions of the whitened means that faiss gets at most."""

_LEARNED = 32768  # means that directions are found from
_TRAINED = 131072  # means that faiss is trained on
_QUERIES = 256  # that recall is measured on


def derive_files(home: Path, token: str, gathered: Gathered, cancelled: Callable[[], bool]) -> dict[str, str]:
    """Write the files of numbers and of vectors of a version whose means are written; returns their digests."""
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


def _frame(gathered: Gathered, number: int, spectrum: Spectrum, shrinkage: float, temperature: float) -> Frame:
    """The frame of one half, as yet without the directions that faiss searches."""
    return Frame(
        centre=gathered.centres[number],
        whitening=spectrum.axes * spectrum.scale(shrinkage),
        directions=np.zeros((len(gathered.centres[number]), 0), dtype=np.float32),
        freedom=max(gathered.moments[number].freedom, 1),
        shrinkage=shrinkage,
        temperature=temperature,
    )


def _fitted(gathered: Gathered) -> tuple[Fitted, Spectra]:
    """Everything chosen on the sample under the covariances of the whole pool; the pool's own choice if it is all."""
    groups = [profile.embeddings for profile in gathered.sample]
    spectra = Spectra(*(_spectrum(groups, half, state) for half, state in zip(HALVES, gathered.moments, strict=True)))
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
    white = frame.whitened(rows.take(spread(np.arange(len(rows)), _LEARNED)).rows)
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

    trained = spread(np.arange(len(rows)), _TRAINED)
    queries = frame.centred(_queries([whole(profile.embeddings) for profile in sample]))
    return build_structure(
        blocks,
        len(rows),
        frame.reduced(rows.take(trained).rows, squares[trained]),
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
