"""Would adapters that serve several kinds of prompt be found better by several centres than by one?

    python benchmarks/several_kinds.py FLAN48 TASKS POOL --work DIR -o benchmarks/results/several_kinds.json

Adapters of several kinds are made: tasks are merged by two or three at random, their profiles together as long as one
was. The arguments are those of `retriever_finetuning.py`. Kinds are indexed as those that a card names are
(`loracompose/retrieval/centres.py`). Compared are

- one centre for each adapter, as an index has it whose cards name no kinds,
- kinds found by Ward's clustering of an adapter's embeddings, where its examples tell so: phrasings are held out of
  the pool with and without the split, and their mean log posterior must grow by two standard errors,
- the kinds as they were merged: what could be gained at most.

Nothing is chosen on the prompts that are searched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.cluster import AgglomerativeClustering

import loracompose
from loracompose.benchmarks.kept import KeptEmbedder
from loracompose.benchmarks.retrieval import gains, hits, own_ranks
from loracompose.benchmarks.retrieval_data import RetrievalData, read_arguments, read_retrieval_data, with_profiles
from loracompose.benchmarks.retrieval_scorings import Floats, embed, read_pool
from loracompose.cli.retrieval_tables import rounded
from loracompose.durable import write_whole
from loracompose.retrieval.cards import Card
from loracompose.retrieval.centres import Centres
from loracompose.retrieval.discriminant import Discriminant, Statistics
from loracompose.retrieval.embedding import INSTRUCTION, SentenceTransformerEmbedder, edges, representation, whole
from loracompose.retrieval.fitting import Fitted, Shaped, choose, fitted_hybrid, hold_out
from loracompose.retrieval.lexicon import read_profile
from loracompose.retrieval.phrasing import Fold, View, held_out_scores, phrasing_folds
from loracompose.retrieval.profiles import read_profiles
from loracompose.retrieval.shape import shapes
from loracompose.retrieval.tables import Settings
from loracompose.retrieval.weighting import log_softmax

EXAMPLES = 20
"""Of an adapter, all its kinds together."""

ERRORS = 2.0
"""Standard errors by which held-out phrasings must gain from a split."""

Labels = Sequence[np.ndarray]
"""The kind of each example of each adapter."""


@dataclass(frozen=True, eq=False)
class Merged:
    """Adapters by the texts and features of their examples, a kind after the other, and the prompts to search with."""

    texts: list[list[str]]
    features: list[np.ndarray]
    kinds: Labels
    prompts: Sequence[str]
    queries: np.ndarray
    own: np.ndarray
    parts: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Split:
    """A pool by the examples of each of its centres, which are those of `centres`."""

    texts: list[list[str]]
    features: list[np.ndarray]
    centres: Centres

    @classmethod
    def of(cls, pool: Merged, labels: Labels) -> Split:
        """One centre for each label of each adapter."""
        pool = ordered(pool, labels)
        kinds = [tuple(map(str, np.sort(own))) for own in labels]
        cards = [Card(str(k), examples=tuple(pool.texts[k]), kinds=own) for k, own in enumerate(kinds)]
        centres = Centres.of(cards)
        return cls(centres.split(pool.texts), centres.split(pool.features), centres)

    def posterior(self, fits: Floats) -> Floats:
        """Log p(adapter | prompt), (rows, adapters), from the fits of the centres, (rows, centres)."""
        return log_softmax(self.centres.joined(fits))

    def fit(self) -> tuple[Fitted, Callable[[np.ndarray, Sequence[str]], Floats]]:
        """What an index would fit to these centres, and how it then scores prompts."""
        pool = read_pool(self.texts, self.features)
        held = hold_out(self.features, pool.spectra, pool.lexicon, Shaped(pool.forms, self.texts))
        means = np.stack([representation(group, str(i)) for i, group in enumerate(self.features)])
        fitted = choose(means, self.features, held)
        return fitted, fitted_hybrid(pool.spectra, pool.lexicon, pool.forms, fitted).fits

    def held_out(self, fitted: Fitted, folds: Sequence[Fold]) -> tuple[Floats, np.ndarray]:
        """Fits of examples whose phrasing is held out, (queries, centres), and the centre of each."""
        groups = [list(map(whole, self.features)), list(map(edges, self.features)), list(map(shapes, self.texts))]
        settings = (
            (fitted.shrinkage, fitted.spread),
            (fitted.edges_shrinkage, fitted.edges_spread),
            (fitted.shape_shrinkage, fitted.shape_spread),
        )
        views = [View(group, discriminant(*setting)) for group, setting in zip(groups, settings, strict=True)]
        (*vectors, words), own = held_out_scores(folds, [read_profile(group) for group in self.texts], views)
        channels = [*vectors[:2], words, vectors[2]]
        return np.asarray(sum(w * c for w, c in zip(fitted.weights, channels, strict=True))), own


def discriminant(shrinkage: float, spread: float) -> Callable[[Sequence[np.ndarray], np.ndarray], Floats]:
    """How a view scores queries, given what is kept of each group."""

    def fits(kept: Sequence[np.ndarray], queries: np.ndarray) -> Floats:
        return Discriminant.directly(Statistics.of(kept, queries.shape[1]), shrinkage, spread).fits(queries)

    return fits


def clusters(pool: Merged, count: int) -> Labels:
    """Each adapter's examples in `count` clusters, by all that is embedded of them."""
    return [AgglomerativeClustering(count, linkage="ward").fit_predict(group) for group in pool.features]


def evidence(pool: Merged, labels: Labels, fitted: Fitted) -> np.ndarray:
    """What splitting gains in mean log posterior of held-out phrasings, for each adapter, in standard errors.

    The phrasings are those within kinds; the same examples are held out in both cases. `fitted` is of one centre each.
    """
    many = Split.of(pool, labels)
    one = Split.of(ordered(pool, labels), whole_adapters(pool))
    folds = phrasing_folds([read_profile(group) for group in many.texts])
    apart, kind = many.held_out(many.fit()[0], folds)
    together, own = one.held_out(fitted, [joined(fold, many) for fold in folds])
    rows = np.arange(len(own))
    grown = many.posterior(apart)[rows, many.centres.owner[kind]] - log_softmax(together)[rows, own]
    by_adapter = [grown[own == k] for k in range(len(pool.texts))]
    return np.array([part.mean() / (part.std(ddof=1) / np.sqrt(len(part))) for part in by_adapter])


def joined(fold: Fold, split: Split) -> Fold:
    """A fold of centres as one of adapters, whose examples are those of their centres in turn."""
    owner = split.centres.owner
    sizes = [len(group) for group in split.texts]
    before = np.cumsum(sizes) - sizes
    starts = before - before[np.searchsorted(owner, owner)]  # within the adapter

    def of(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        moved = [part + start for part, start in zip(parts, starts, strict=True)]
        return tuple(
            np.concatenate([moved[i] for i in np.flatnonzero(owner == k)]) for k in range(int(owner.max()) + 1)
        )

    return Fold(of(fold.kept), of(fold.held))


def ordered(pool: Merged, labels: Labels) -> Merged:
    """The pool with the examples of each adapter in the order of their labels."""
    order = [np.argsort(own, kind="stable") for own in labels]
    return replace(
        pool,
        texts=[[texts[i] for i in rows] for texts, rows in zip(pool.texts, order, strict=True)],
        features=[group[rows] for group, rows in zip(pool.features, order, strict=True)],
    )


def whole_adapters(pool: Merged) -> Labels:
    """One kind each."""
    return [np.zeros(len(texts), dtype=np.int64) for texts in pool.texts]


def merge(data: RetrievalData, features: np.ndarray, size: int, seed: int = 0) -> Merged:
    """Adapters of `size` tasks each, drawn by the seed; tasks that are left over are left out."""
    flat = [text for group in data.profiles.values() for text in group]
    starts = np.cumsum([0, *map(len, data.profiles.values())])
    random = np.random.default_rng(seed)
    order = random.permutation(len(data.profiles))[: len(data.profiles) // size * size].reshape(-1, size)
    texts, groups, kinds = [], [], []
    for tasks in order:
        rows = [starts[t] + np.sort(random.permutation(starts[t + 1] - starts[t])[: EXAMPLES // size]) for t in tasks]
        texts.append([flat[i] for i in np.concatenate(rows)])
        groups.append(features[np.concatenate(rows)])
        kinds.append(np.repeat(np.arange(size), [len(part) for part in rows]))
    place = np.full(len(data.profiles), -1)
    place[order] = np.arange(len(order))[:, None]
    own = place[data.own]
    asked = np.flatnonzero(own >= 0)
    return Merged(
        texts,
        groups,
        kinds,
        [data.prompts[i] for i in asked],
        features[len(flat) + asked],
        own[asked],
        {name: part[asked] for name, part in data.parts.items()},
    )


def measure(pool: Merged, size: int) -> dict[str, Any]:
    """What each way finds."""
    one, split = whole_adapters(pool), clusters(pool, max(size, 2))
    gained = evidence(pool, split, Split.of(pool, one).fit()[0])
    found = [many if gain > ERRORS else few for many, few, gain in zip(split, one, gained, strict=True)]
    ways = {"one centre": one, "kinds found": found}
    if size > 1:
        ways["kinds known"] = pool.kinds
    result: dict[str, Any] = {}
    before: dict[str, np.ndarray] = {}
    for name, labels in ways.items():
        centres = Split.of(pool, labels)
        logs = centres.posterior(centres.fit()[1](pool.queries, pool.prompts))
        result[name] = {"adapters split": sum(int(own.max() > 0) for own in labels), "parts": {}}
        for part, here in pool.parts.items():
            own = pool.own[here]
            ranks = own_ranks(logs[here], own)
            result[name]["parts"][part] = {
                "hit": hits(logs[here], own),
                "gain": gains(ranks, before.setdefault(part, ranks)),
                "nll": -float(logs[here][np.arange(len(own)), own].mean()),
            }
    return result


def main() -> None:
    args = read_arguments(__doc__)
    embedder = KeptEmbedder(SentenceTransformerEmbedder(batch_size=16), args.work / "embeddings")
    settings = Settings(embedder.name, embedder.revision, embedder.dimension, INSTRUCTION)
    tasks = with_profiles(read_retrieval_data(args.tasks), read_profiles(args.pool))
    result: dict[str, Any] = {"loracompose": loracompose.__version__, "encoder": embedder.name, "pools": {}}
    for name, data in (("flan48", read_retrieval_data(args.flan48)), ("tasks", tasks)):
        flat = [text for group in data.profiles.values() for text in group]
        features = embed([*flat, *data.prompts], settings, embedder)
        for size in (1, 2, 3):
            pool = merge(data, features, size)
            found = measure(pool, size)
            rows = {part: int(here.sum()) for part, here in pool.parts.items()}
            entry = {"adapters": len(pool.texts), "rows": rows, "ways": found}
            result["pools"].setdefault(name, {})[str(size)] = entry
            write_whole(args.output, json.dumps(rounded(result), indent=1) + "\n")
            for way, of in found.items():
                shares = {part: round(numbers["hit"]["1"]["share"], 1) for part, numbers in of["parts"].items()}
                print(name, size, way, of["adapters split"], "split", shares, flush=True)


if __name__ == "__main__":
    main()
