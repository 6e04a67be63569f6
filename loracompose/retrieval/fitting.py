"""All that a generation chooses by holding out its own examples; no other data is ever looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.discriminant import Discriminant, Spectrum, Statistics, fit_discriminant, own_columns
from loracompose.retrieval.embedding import edges, instructed, whole
from loracompose.retrieval.hybrid import Queries, fit_weights
from loracompose.retrieval.lexicon import Lexicon
from loracompose.retrieval.phrasing import held_out_scores, phrasing_folds
from loracompose.retrieval.weighting import fit_temperature, held_out_cosines

Floats = NDArray[np.float64]
Examples = Sequence[NDArray[np.float32]]

_EXAMPLES = 2048
"""Examples that are held out at most; more change the third digit and cost seconds."""

UNSEEN = 0.03
"""Weight of whole phrasings held out against examples held out one by one: as if that share of prompts were phrased as
no example is. Single examples alone trust the channels that know templates again without bound where a pool is easy."""


@dataclass(frozen=True)
class Fitted:
    """What was chosen: plain numbers, so that a catalog can note them.

    `shrinkage` of the discriminant of whole prompts and `spread`, the temperature of its distances; the same of the
    `edges`; `weights` of the channels; `mean_temperature` for cosines with means; `calibration`, for each scoring the
    best fit of each held-out example, ascending.
    """

    shrinkage: float
    spread: float
    edges_shrinkage: float
    edges_spread: float
    weights: tuple[float, float, float]
    mean_temperature: float
    calibration: Mapping[str, Sequence[float]]


@dataclass(frozen=True, eq=False)
class Spectra:
    """Of the whole prompts and of their edges."""

    whole: Spectrum
    edges: Spectrum

    def discriminants(self, fitted: Fitted) -> tuple[Discriminant, Discriminant]:
        """Of the whole prompts and of their edges, as fitted."""
        return (
            Discriminant.of(self.whole, fitted.shrinkage, fitted.spread),
            Discriminant.of(self.edges, fitted.edges_shrinkage, fitted.edges_spread),
        )


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Examples as the channels score them when they are held out, and what of the discriminants that needed.

    `seen`: one by one; `anew`: with all of their phrasing (`phrasing.py`). `whole`, `edges`: shrinkage and spread.
    """

    seen: Queries
    anew: Queries
    whole: tuple[float, float]
    edges: tuple[float, float]


def hold_out(examples: Examples, rows: Sequence[int], spectra: Spectra, lexicon: Lexicon) -> HeldOut:
    """Score the examples of some adapters of a pool, each held out, by every channel of the hybrid.

    Args:
        examples: features of the examples of these adapters, each (examples, width).
        rows: the row of the pool that each of them is.
        spectra: of the whole pool.
        lexicon: of the whole pool.
    """
    texts, ends = [whole(group) for group in examples], [edges(group) for group in examples]
    of_texts, of_ends = fit_discriminant(spectra.whole, texts, rows), fit_discriminant(spectra.edges, ends, rows)
    channels = [
        _held_out(spectra.whole, texts, rows, *of_texts),
        _held_out(spectra.edges, ends, rows, *of_ends),
        lexicon.held_out(rows),
    ]
    profiles = [lexicon.profiles[row] for row in rows]
    scores, own = held_out_scores(
        phrasing_folds(profiles),
        profiles,
        examples,
        [
            lambda kept, queries: _fits([whole(group) for group in kept], whole(queries), *of_texts),
            lambda kept, queries: _fits([edges(group) for group in kept], edges(queries), *of_ends),
        ],
    )
    return HeldOut(Queries(channels, own_columns(examples, rows)), Queries(scores, own, UNSEEN), of_texts, of_ends)


def fit(means: NDArray[np.float32], examples: Examples, spectra: Spectra, lexicon: Lexicon) -> Fitted:
    """Choose everything for a pool of K adapters.

    Args:
        means: their representations, (K, dimension).
        examples: features of their examples, each (examples, width).
        spectra: of the same examples.
        lexicon: of the same examples.
    """
    step = -(-sum(len(group) for group in examples) // _EXAMPLES) or 1
    rows = range(0, len(examples), step)
    sample = [examples[row] for row in rows]
    under = [instructed(group) for group in sample]
    held = hold_out(sample, rows, spectra, lexicon)
    meaning, edge, wording = fit_weights([held.seen, held.anew])
    texts, ends, words = held.seen.channels
    cosines, _ = held_out_cosines(means, under, rows)
    calibration = {
        "hybrid": _best(meaning * texts + edge * ends + wording * words),
        "discriminant": _best(texts),
        "mean": _best(cosines.astype(np.float64)),
    }
    temperature = fit_temperature(means, under, rows)
    return Fitted(*held.whole, *held.edges, (meaning, edge, wording), temperature, calibration)


def _held_out(spectrum: Spectrum, groups: Examples, rows: Sequence[int], shrinkage: float, spread: float) -> Floats:
    return spectrum.held_out([group @ spectrum.axes for group in groups], rows, shrinkage) / spread


def _fits(kept: Examples, queries: NDArray[np.float32], shrinkage: float, spread: float) -> Floats:
    statistics = Statistics.of(kept, queries.shape[1])
    return Discriminant.directly(statistics, shrinkage, spread).fits(queries)


def _best(fits: Floats) -> list[float]:
    best: list[float] = np.sort(fits.max(axis=1)).tolist() if len(fits) else []
    return best
