"""All that a generation chooses by holding out its own examples, one at a time; no other data is ever looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.discriminant import Spectrum, fit_discriminant, own_columns
from loracompose.retrieval.embedding import instructed
from loracompose.retrieval.hybrid import fit_weights
from loracompose.retrieval.lexicon import Lexicon
from loracompose.retrieval.weighting import fit_temperature, held_out_cosines

_EXAMPLES = 2048
"""Examples that are held out at most; more change the third digit and cost seconds."""


@dataclass(frozen=True)
class Fitted:
    """What was chosen: plain numbers, so that a catalog can note them.

    `shrinkage` of the discriminant and `spread`, the temperature of its distances; `meaning` and `wording`, the weights
    of both channels; `mean_temperature` for cosines with means; `calibration`, for each scoring the best fit of
    each held-out example, ascending.
    """

    shrinkage: float
    spread: float
    meaning: float
    wording: float
    mean_temperature: float
    calibration: Mapping[str, Sequence[float]]


def fit(
    means: NDArray[np.float32], examples: Sequence[NDArray[np.float32]], spectrum: Spectrum, lexicon: Lexicon
) -> Fitted:
    """Choose everything for a pool of K adapters.

    Args:
        means: their representations, (K, dimension).
        examples: embeddings of their examples, each (examples, width).
        spectrum: of the same examples.
        lexicon: of the same examples.
    """
    step = -(-sum(len(group) for group in examples) // _EXAMPLES) or 1
    rows = range(0, len(examples), step)
    sample = [examples[row] for row in rows]
    under = [instructed(group) for group in sample]
    shrinkage, spread = fit_discriminant(spectrum, sample, rows)
    meanings = spectrum.held_out([group @ spectrum.axes for group in sample], rows, shrinkage) / spread
    wordings = lexicon.held_out(rows)
    meaning, wording = fit_weights([meanings, wordings], own_columns(sample, rows))
    cosines, _ = held_out_cosines(means, under, rows)
    calibration = {
        "hybrid": _best(meaning * meanings + wording * wordings),
        "discriminant": _best(meanings),
        "mean": _best(cosines.astype(np.float64)),
    }
    return Fitted(shrinkage, spread, meaning, wording, fit_temperature(means, under, rows), calibration)


def _best(fits: NDArray[np.float64]) -> list[float]:
    best: list[float] = np.sort(fits.max(axis=1)).tolist() if len(fits) else []
    return best
