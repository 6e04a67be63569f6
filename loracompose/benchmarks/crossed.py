"""What an index fits to its examples, fitted instead to examples that neither index nor encoder has seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from loracompose.benchmarks.retrieval_data import RetrievalData
from loracompose.benchmarks.retrieval_scorings import read_pool, split
from loracompose.retrieval.discriminant import SHRINKAGES, Discriminant, Spectrum
from loracompose.retrieval.embedding import edges, whole
from loracompose.retrieval.fitting import Fitted
from loracompose.retrieval.hybrid import Queries, fit_weights
from loracompose.retrieval.lexicon import ngram_keys
from loracompose.retrieval.shape import shapes
from loracompose.retrieval.weighting import likeliest_temperature

EVERY = 4
"""Every fourth example is held out."""


def without_fourths(data: RetrievalData) -> RetrievalData:
    """The profiles without every fourth of their examples, and these as the prompts to search with."""
    last = EVERY - 1
    kept = {n: tuple(p for i, p in enumerate(g) if i % EVERY != last) for n, g in data.profiles.items()}
    out = [group[last::EVERY] for group in data.profiles.values()]
    own = np.repeat(np.arange(len(out)), [len(group) for group in out])
    prompts = tuple(prompt for group in out for prompt in group)
    return RetrievalData(kept, prompts, own, np.zeros(len(own), dtype=np.bool_))


def fitted_on(
    fitted: Fitted, data: RetrievalData, examples: NDArray[np.float32], prompts: NDArray[np.float32]
) -> Fitted:
    """The same with shrinkage, temperatures and weights under which the prompts choose their own adapters best.

    Args:
        fitted: what is replaced; the rest stays.
        data: profiles, and prompts that are not in them.
        examples: features of the examples, adapter after adapter, (examples, width).
        prompts: features of the prompts, (rows, width).
    """
    pool = read_pool(list(data.profiles.values()), split(data, examples))
    seen = (
        (pool.spectra.whole, whole(prompts)),
        (pool.spectra.edges, edges(prompts)),
        (pool.forms, shapes(data.prompts)),
    )
    chosen = [_likeliest(spectrum, queries, data.own) for spectrum, queries in seen]
    meaning, edge, shape = (
        Discriminant.of(spectrum, *found).fits(queries) for (spectrum, queries), found in zip(seen, chosen, strict=True)
    )
    words = np.stack([pool.lexicon.scores(ngram_keys(prompt)) for prompt in data.prompts])
    return replace(
        fitted,
        shrinkage=chosen[0][0],
        spread=chosen[0][1],
        edges_shrinkage=chosen[1][0],
        edges_spread=chosen[1][1],
        shape_shrinkage=chosen[2][0],
        shape_spread=chosen[2][1],
        weights=fit_weights([Queries([meaning, edge, words, shape], data.own)]),
    )


def _likeliest(spectrum: Spectrum, queries: NDArray[np.float32], own: NDArray[np.int64]) -> tuple[float, float]:
    """Shrinkage and temperature of a discriminant under which queries choose their own adapters best."""
    best = (-np.inf, 1.0, 1.0)
    for shrinkage in SHRINKAGES:
        fits = Discriminant.of(spectrum, shrinkage, 1.0).fits(queries)
        temperature, likelihood = likeliest_temperature(fits, own)
        best = max(best, (likelihood, shrinkage, temperature))
    return best[1:]
