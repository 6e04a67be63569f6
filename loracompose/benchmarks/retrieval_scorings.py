"""Every way to compare a prompt with adapters that a measurement of retrieval sets side by side."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from loracompose.benchmarks.retrieval_data import RetrievalData
from loracompose.retrieval.discriminant import Spectrum, Statistics
from loracompose.retrieval.embedding import Embedder, edges, features, instructed, representation, whole
from loracompose.retrieval.fitting import Fitted, HeldOut, Shaped, Spectra, choose, fitted_hybrid, hold_out
from loracompose.retrieval.hybrid import CHANNELS, Queries, fit_weights
from loracompose.retrieval.lexicon import Lexicon, tokens
from loracompose.retrieval.shape import SHAPE_WIDTH, shapes
from loracompose.retrieval.tables import Settings
from loracompose.retrieval.weighting import log_softmax

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scorings:
    """`fits`: by scoring, (rows, K), whose softmax is the posterior; `known`: fits of held-out examples, to abstain by.

    `query_ms` is the time of one prompt beyond the encoder, `fit_seconds` that of fitting everything.
    """

    fits: Mapping[str, Floats]
    known: Mapping[str, Floats]
    fitted: Fitted
    fit_seconds: float
    query_ms: float


@dataclass(frozen=True, eq=False)
class Pool:
    """What the channels read of a pool of adapters; `forms` is the spectrum of the shapes of their examples."""

    spectra: Spectra
    lexicon: Lexicon
    forms: Spectrum


def read_pool(texts: Sequence[Sequence[str]], groups: Sequence[NDArray[np.float32]]) -> Pool:
    """The pool of adapters whose examples are these texts, with these features, each (examples, width)."""
    spectra = Spectra(
        *(Spectrum.of(Statistics.of([half(g) for g in groups], groups[0].shape[1] // 2)) for half in (whole, edges))
    )
    forms = Spectrum.of(Statistics.of([shapes(group) for group in texts], SHAPE_WIDTH))
    return Pool(spectra, Lexicon.of(texts), forms)


def split(data: RetrievalData, profiles: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """The features of all examples, adapter after adapter, (examples, width), as one array an adapter."""
    return np.split(profiles, np.cumsum([len(group) for group in data.profiles.values()])[:-1])


def embed(texts: Sequence[str], settings: Settings, embedder: Embedder) -> NDArray[np.float32]:
    """Features of the texts, (len(texts), width), made in order of length: less padding."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    made = [features(embedder, [texts[i] for i in order[at : at + 256]], settings) for at in range(0, len(order), 256)]
    found = np.empty((len(texts), settings.width), dtype=np.float32)
    found[order] = np.concatenate(made)
    return found


def score(data: RetrievalData, profiles: NDArray[np.float32], queries: NDArray[np.float32]) -> Scorings:
    """All scorings of the prompts.

    Args:
        data: the profiles and the prompts.
        profiles: features of all examples, adapter after adapter, (examples, width).
        queries: features of the prompts, (rows, width).
    """
    texts = list(data.profiles.values())
    groups = split(data, profiles)
    start = time.perf_counter()
    pool = read_pool(texts, groups)
    means = np.stack([representation(group, name) for name, group in zip(data.profiles, groups, strict=True)])
    held = hold_out(groups, pool.spectra, pool.lexicon, Shaped(pool.forms, texts))
    fitted = choose(means, groups, held)
    hybrid = fitted_hybrid(pool.spectra, pool.lexicon, pool.forms, fitted)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    for i, prompt in enumerate(data.prompts):
        log_softmax(hybrid.fits(queries[i : i + 1], [prompt]))
    milliseconds = 1000 * (time.perf_counter() - start) / len(data.prompts)
    channels = replace(hybrid, weights=(1.0,) * len(CHANNELS)).channels(queries, data.prompts)
    plain = np.stack([group.mean(axis=0) for group in groups])[:, : profiles.shape[1] // 4]
    fits = {
        "random": np.random.default_rng(0).random((len(data.prompts), len(texts))),
        "bm25": bm25(texts, data.prompts),
        "mean, as in the paper's code": (queries[:, : plain.shape[1]] @ plain.T).astype(np.float64) / 0.05,
        "mean": (instructed(queries) @ means.T).astype(np.float64) / fitted.mean_temperature,
        **{" + ".join(names): _sum(names, channels, held) for names in _subsets()},
        "hybrid": hybrid.fits(queries, data.prompts),
    }
    known = {name: np.array(values) for name, values in fitted.calibration.items()}
    return Scorings(fits, {"hybrid": known["hybrid"]}, fitted, seconds, milliseconds)


def bm25(examples: Sequence[Sequence[str]], prompts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> Floats:
    """Okapi BM25 of lower-cased words, an adapter's examples together being one document, (prompts, K)."""
    documents = [Counter(tokens(" ".join(group).lower())) for group in examples]
    lengths = np.array([sum(document.values()) for document in documents])
    frequency = Counter(word for document in documents for word in document)
    scores = np.zeros((len(prompts), len(documents)))
    for i, prompt in enumerate(prompts):
        for word in sorted(set(tokens(prompt.lower())) & set(frequency)):
            counts = np.array([document[word] for document in documents])
            idf = np.log(1 + (len(documents) - frequency[word] + 0.5) / (frequency[word] + 0.5))
            scores[i] += idf * counts * (k1 + 1) / (counts + k1 * (1 - b + b * lengths / lengths.mean()))
    return scores


def _subsets() -> list[tuple[str, ...]]:
    meaning, edge, wording, shape = CHANNELS
    alone = [(name,) for name in CHANNELS]
    return [*alone, (meaning, edge), (meaning, wording), (meaning, shape), (meaning, edge, wording)]


def _sum(names: Sequence[str], channels: Mapping[str, Floats], held: HeldOut) -> Floats:
    """The sum of some channels, with weights fitted to them alone as the hybrid's are."""
    places = [CHANNELS.index(name) for name in names]
    kinds = [Queries([kind.channels[i] for i in places], kind.own, kind.weight) for kind in (held.seen, held.anew)]
    weights = fit_weights(kinds)
    return np.asarray(sum(weight * channels[name] for weight, name in zip(weights, names, strict=True)))
