"""Explanations in a large pool: those of the candidates, by the scores that the search gives them."""

from __future__ import annotations

import numpy as np

from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.centres import Centres
from loracompose.retrieval.explanation import Explanation, explain_candidates
from loracompose.retrieval.lexicon import Lexicon
from loracompose.retrieval.scale.metric import Singles
from loracompose.retrieval.scale.parts import parts_of
from loracompose.retrieval.scale.searching import WORDED, channels
from loracompose.retrieval.scale.view import View


def explain_view(view: View, catalog: Catalog, features: Singles, prompt: str, k: int) -> Explanation:
    """As `explain`, among the candidates; n-grams are those that speak for an adapter against the other candidates."""
    (query,) = view.queries(parts_of(features, [prompt]))
    (places,) = view.near([query])
    fits = view.fits(query, places)
    places = places[np.argsort(-fits, kind="stable")[: max(WORDED, k)]]
    places = places[np.argsort(view.ids(places))]
    entries = {entry.id: entry for entry in catalog.entries(view.ids(places).tolist())}
    kept = np.array([id in entries for id in view.ids(places).tolist()], dtype=np.bool_)
    places = places[kept]
    found = [entries[id] for id in view.ids(places).tolist()]
    (asked,) = view.version.frequencies.asked([prompt])
    shares = np.stack(channels(view, query, asked, places, view.fits(query, places)))
    best = shares.sum(axis=0).max(keepdims=True) if len(places) else np.array([-np.inf])
    return explain_candidates(
        prompt,
        features,
        cards=[entry.card for entry in found],
        examples=lambda row: catalog.embeddings(found[row].id),
        centres=Centres.one_each(len(found)),  # a large pool takes all examples of an adapter for one kind
        shares=shares,
        lexicon=Lexicon.of([entry.card.examples for entry in found]),
        typicality=float(view.typicality("hybrid", best)[0]),
        k=k,
    )
