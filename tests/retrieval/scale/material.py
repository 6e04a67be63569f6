"""Catalogs of many small adapters without folders, and what an exact comparison with all of them gives."""

from __future__ import annotations

import random

import numpy as np

from loracompose.retrieval.cards import Card
from loracompose.retrieval.catalog import Catalog, Settings
from loracompose.retrieval.embedding import CallableEmbedder, features
from loracompose.retrieval.index import AdapterIndex
from loracompose.retrieval.placement import CATALOG_FILE

DIMENSION = 12
WORDS = [f"w{number}" for number in range(60)]
_PROJECTION = np.random.default_rng(7).standard_normal((len(WORDS) + 1, DIMENSION)).astype(np.float32)


def embed(texts):
    """A random projection of the words of a text; what is no word of ours is one more."""
    counts = np.zeros((len(texts), len(WORDS) + 1), dtype=np.float32)
    for row, text in zip(counts, texts, strict=True):
        for word in text.split():
            row[int(word[1:]) if word in WORDS else -1] += 1
    return counts @ _PROJECTION


EMBEDDER = CallableEmbedder(embed, "projection", "1")


def texts(seed, count=4):
    """Prompts of one kind: mostly the same few words."""
    draw = random.Random(seed)
    own = draw.sample(WORDS, 4)
    return tuple(" ".join(draw.choices(own, k=5) + draw.choices(WORDS, k=3)) for _ in range(count))


def card(seed, **other):
    return Card(f"a{seed:05d}", examples=texts(seed), tags=(f"t{seed % 3}",), fingerprint=str(seed), **other)


def enter(catalog, seed, **other):
    new = card(seed, **other)
    catalog.add(new, f"pool/{new.name}", features(EMBEDDER, new.examples, catalog.settings))


def make_index(folder, seeds, *, exact_limit, scoring="hybrid", **settings):
    """An index of these adapters, opened."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = Settings("projection", "1", DIMENSION, "do: ", scoring, exact_limit=exact_limit, **settings)
    catalog = Catalog.create(folder / CATALOG_FILE, chosen)
    with catalog.writing():
        for seed in seeds:
            enter(catalog, seed)
    return AdapterIndex(folder, catalog, EMBEDDER)


PROMPTS = [texts(seed, 1)[0] for seed in (3, 11, 1001, 1002)]
