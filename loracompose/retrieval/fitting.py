"""All that a generation chooses by holding out its own examples; no other data is ever looked at.

A pool of K adapters has C centres (`centres.py`). Held out and chosen for are centres; means and what tells how well
prompts fit at all are of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.centres import Centres
from loracompose.retrieval.discriminant import Discriminant, Spectrum, Statistics, fit_discriminant, own_columns
from loracompose.retrieval.embedding import edges, instructed, whole
from loracompose.retrieval.hybrid import Hybrid, Queries, fit_weights
from loracompose.retrieval.lexicon import Lexicon
from loracompose.retrieval.phrasing import View, held_out_scores, phrasing_folds
from loracompose.retrieval.shape import shapes
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
    `edges` and of the `shape`; `weights` of the channels, three where a pool has no shapes; `mean_temperature` for
    cosines with means; `calibration`, for each scoring the fit of each held-out example with the adapter that it fits
    best, ascending.
    """

    shrinkage: float
    spread: float
    edges_shrinkage: float
    edges_spread: float
    weights: tuple[float, ...]
    mean_temperature: float
    calibration: Mapping[str, Sequence[float]]
    shape_shrinkage: float = 1.0
    shape_spread: float = 1.0


@dataclass(frozen=True, eq=False)
class Spectra:
    """Of the whole prompts and of their edges."""

    whole: Spectrum
    edges: Spectrum


@dataclass(frozen=True, eq=False)
class Shaped:
    """The spectrum of the shapes of all examples, and the example prompts of each centre."""

    spectrum: Spectrum
    prompts: Sequence[Sequence[str]]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Examples of these centres of a pool as the channels score them when they are held out, and what that needed.

    `seen`: one by one; `anew`: with all of their phrasing (`phrasing.py`). `chosen`: shrinkage and spread of each
    discriminant: of whole prompts, of their edges, and of their shapes where there are any.
    """

    rows: Sequence[int]
    seen: Queries
    anew: Queries
    chosen: Sequence[tuple[float, float]]


def hold_out(examples: Examples, spectra: Spectra, lexicon: Lexicon, shaped: Shaped | None = None) -> HeldOut:
    """Score examples of centres of a pool, each held out, by every channel: of all centres, or of some of many.

    Args:
        examples: features of the examples of all C centres, each (examples, width).
        spectra: of the same examples.
        lexicon: of the same examples.
        shaped: of the same examples; None where the pool has no shapes.
    """
    step = -(-sum(len(group) for group in examples) // _EXAMPLES) or 1
    rows = range(0, len(examples), step)
    groups = [examples[row] for row in rows]
    seen = [(spectra.whole, [whole(group) for group in groups]), (spectra.edges, [edges(group) for group in groups])]
    if shaped is not None:
        seen.append((shaped.spectrum, [shapes(shaped.prompts[row]) for row in rows]))
    chosen = [fit_discriminant(spectrum, vectors, rows) for spectrum, vectors in seen]
    singly = [_held_out(*view, rows, *found) for view, found in zip(seen, chosen, strict=True)]
    profiles = [lexicon.profiles[row] for row in rows]
    views = [_view(vectors, *found) for (_, vectors), found in zip(seen, chosen, strict=True)]
    (*together, words), own = held_out_scores(phrasing_folds(profiles), profiles, views)
    return HeldOut(
        rows,
        Queries(_ordered(singly, lexicon.held_out(rows)), own_columns(groups, rows)),
        Queries(_ordered(together, words), own, UNSEEN),
        chosen,
    )


def fit(
    means: NDArray[np.float32],
    examples: Examples,
    spectra: Spectra,
    lexicon: Lexicon,
    shaped: Shaped | None = None,
    centres: Centres | None = None,
) -> Fitted:
    """Choose everything for a pool of K adapters.

    Args:
        means: their representations, (K, dimension).
        examples: features of their examples, each (examples, width).
        spectra: of the centres of the same examples.
        lexicon: of the centres.
        shaped: of the centres; None leaves the shape out.
        centres: of the pool; None is one an adapter.
    """
    pool = Centres.one_each(len(means)) if centres is None else centres
    return choose(means, examples, hold_out(pool.split(examples), spectra, lexicon, shaped), pool)


def choose(means: NDArray[np.float32], examples: Examples, held: HeldOut, centres: Centres | None = None) -> Fitted:
    """As `fit`, where the examples are already held out."""
    pool = Centres.one_each(len(means)) if centres is None else centres
    rows = np.unique(pool.owner[np.asarray(held.rows, dtype=np.int64)]).tolist()
    under = [instructed(examples[row]) for row in rows]
    weights = fit_weights([held.seen, held.anew])
    cosines, _ = held_out_cosines(means, under, rows)
    total = sum(weight * part for weight, part in zip(weights, held.seen.channels, strict=True))
    calibration = {
        "hybrid": _best(pool.joined(np.asarray(total))),
        "discriminant": _best(pool.joined(held.seen.channels[0])),
        "mean": _best(cosines.astype(np.float64)),
    }
    temperature = fit_temperature(means, under, rows)
    first, second, *third = held.chosen
    return Fitted(*first, *second, weights, temperature, calibration, *(third[0] if third else ()))


def fitted_hybrid(spectra: Spectra, lexicon: Lexicon, shape: Spectrum, fitted: Fitted) -> Hybrid:
    """The hybrid as fitted; the spectra and the lexicon are of all centres of the pool."""
    return Hybrid(
        Discriminant.of(spectra.whole, fitted.shrinkage, fitted.spread),
        Discriminant.of(spectra.edges, fitted.edges_shrinkage, fitted.edges_spread),
        lexicon,
        Discriminant.of(shape, fitted.shape_shrinkage, fitted.shape_spread),
        fitted.weights,
    )


def present_hybrid(statistics: Sequence[Statistics], lexicon: Lexicon, fitted: Fitted) -> Hybrid:
    """The hybrid of a pool as it is now, by what was fitted to it, or to what it was a few changes ago.

    Args:
        statistics: of whole prompts, of their edges and of their shapes.
        lexicon: of the same examples.
        fitted: what was chosen.
    """
    first, second, third = statistics
    return Hybrid(
        Discriminant.directly(first, fitted.shrinkage, fitted.spread),
        Discriminant.directly(second, fitted.edges_shrinkage, fitted.edges_spread),
        lexicon,
        Discriminant.directly(third, fitted.shape_shrinkage, fitted.shape_spread),
        fitted.weights,
    )


def _ordered(vectors: Sequence[Floats], words: Floats) -> list[Floats]:
    """In the order of `CHANNELS`."""
    return [*vectors[:2], words, *vectors[2:]]


def _held_out(spectrum: Spectrum, groups: Examples, rows: Sequence[int], shrinkage: float, spread: float) -> Floats:
    return spectrum.held_out([group @ spectrum.axes for group in groups], rows, shrinkage) / spread


def _view(groups: Examples, shrinkage: float, spread: float) -> View:
    def fits(kept: Examples, queries: NDArray[np.float32]) -> Floats:
        statistics = Statistics.of(kept, queries.shape[1])
        return Discriminant.directly(statistics, shrinkage, spread).fits(queries)

    return View(groups, fits)


def _best(fits: Floats) -> list[float]:
    best: list[float] = np.sort(fits.max(axis=1)).tolist() if len(fits) else []
    return best
