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
    texts, ends = [whole(group) for group in sample], [edges(group) for group in sample]
    shrinkage, spread = fit_discriminant(spectra.whole, texts, rows)
    edges_shrinkage, edges_spread = fit_discriminant(spectra.edges, ends, rows)
    meanings = _held_out(spectra.whole, texts, rows, shrinkage, spread)
    channels = [
        meanings,
        _held_out(spectra.edges, ends, rows, edges_shrinkage, edges_spread),
        lexicon.held_out(rows),
    ]
    profiles = [lexicon.profiles[row] for row in rows]
    seen = Queries(channels, own_columns(sample, rows))
    anew = held_out_scores(
        phrasing_folds(profiles),
        profiles,
        sample,
        [
            lambda kept, queries: _fits([whole(g) for g in kept], whole(queries), shrinkage, spread),
            lambda kept, queries: _fits([edges(g) for g in kept], edges(queries), edges_shrinkage, edges_spread),
        ],
    )
    meaning, edge, wording = fit_weights([seen, Queries(*anew, weight=UNSEEN)])
    cosines, _ = held_out_cosines(means, under, rows)
    calibration = {
        "hybrid": _best(meaning * channels[0] + edge * channels[1] + wording * channels[2]),
        "discriminant": _best(meanings),
        "mean": _best(cosines.astype(np.float64)),
    }
    return Fitted(
        shrinkage,
        spread,
        edges_shrinkage,
        edges_spread,
        (meaning, edge, wording),
        fit_temperature(means, under, rows),
        calibration,
    )


def _held_out(spectrum: Spectrum, groups: Examples, rows: Sequence[int], shrinkage: float, spread: float) -> Floats:
    return spectrum.held_out([group @ spectrum.axes for group in groups], rows, shrinkage) / spread


def _fits(kept: Examples, queries: NDArray[np.float32], shrinkage: float, spread: float) -> Floats:
    statistics = Statistics.of(kept, queries.shape[1])
    return Discriminant.directly(statistics, shrinkage, spread).fits(queries)


def _best(fits: Floats) -> list[float]:
    best: list[float] = np.sort(fits.max(axis=1)).tolist() if len(fits) else []
    return best
