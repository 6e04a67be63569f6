"""The faiss structure of a version: which one, and how wide it looks, by measured recall against exact search."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

_FAISS: Any = faiss  # its stubs know the constructors of C++, not those of Python

Singles = NDArray[np.float32]
Rows = NDArray[np.int64]

TARGET = 0.995
"""Recall of the ten best that a structure is chosen for; measured on queries made from examples."""

NEAREST = 10

_FLAT = 8192
"""Vectors up to which comparing with all of them is cheapest."""

_GRAPH = 32768
"""Vectors up to which a graph is tried; beyond, building it costs hours."""

_TIMED = 32
_ROW_SECONDS = 0.5e-6
"""Of fetching and rescoring one candidate, to weigh candidates against what faiss takes."""

_WEIGHED_SECONDS = 0.3e-6
"""Of one candidate that faiss weighs again by eight bits a coordinate."""

_CANDIDATES = (64, 96, 128, 192, 256, 384, 512)

_SHARES = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 1.0)
"""Shares of the lists that are looked at."""


@dataclass(frozen=True)
class Breadth:
    """How wide a structure looks: lists or graph nodes visited, candidates wanted, and how many more it weighs."""

    probes: int
    candidates: int
    factor: int = 1

    def at_least(self, candidates: int) -> Breadth:
        """Wider, in proportion, so that there are this many candidates."""
        times = -(-max(candidates, self.candidates) // max(self.candidates, 1))
        return Breadth(times * self.probes, max(candidates, self.candidates), self.factor)

    def doubled(self) -> Breadth:
        """Twice as wide."""
        return Breadth(2 * self.probes, 2 * self.candidates, self.factor)


@dataclass(frozen=True, eq=False)
class Structure:
    """A faiss index over the reduced vectors of a version, row i being adapter i, and how wide it looks."""

    spec: str
    index: Any
    breadth: Breadth

    def near(self, queries: Singles, breadth: Breadth | None = None) -> tuple[Rows, Singles]:
        """Rows of candidates, (n, candidates), and squared distances; row -1 where there are no more."""
        wanted = self.breadth if breadth is None else breadth
        count = min(wanted.candidates, self.index.ntotal)
        if not count:
            return np.zeros((len(queries), 0), dtype=np.int64), np.zeros((len(queries), 0), dtype=np.float32)
        options = self._usual if wanted is self.breadth else _parameters(self.spec, wanted)
        distances, rows = self.index.search(queries, count, params=options)
        return rows, distances

    @cached_property
    def _usual(self) -> Any:
        return _parameters(self.spec, self.breadth)  # to make them takes a fifth of a search


def build_structure(
    blocks: Callable[[], Iterator[Singles]], count: int, sample: Singles, queries: Singles, truth: Sequence[Rows]
) -> Structure:
    """The cheapest structure that finds what exact search finds.

    Args:
        blocks: reads all reduced vectors in their order.
        count: how many there are.
        sample: some of them, to train on.
        queries: reduced queries.
        truth: for each the rows of the nearest adapters under exact search.
    """
    best: tuple[tuple[bool, float], Structure] | None = None
    for spec in _specs(count, sample.shape[1]):
        index = _filled(spec, blocks, sample)
        breadth, recall, seconds = _tuned(spec, index, queries, truth)
        reached = recall >= TARGET
        rank = (reached, -seconds if reached else recall)
        if best is None or rank > best[0]:
            best = rank, Structure(spec, index, breadth)
        if reached:
            break
    if best is None:
        raise ValueError("a structure needs at least one vector")
    return best[1]


def write_structure(structure: Structure, path: Path) -> None:
    """Write the faiss index to a file, durably."""
    faiss.write_index(structure.index, str(path))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_structure(spec: str, path: Path, breadth: Breadth) -> Structure:
    """A structure from the file of its faiss index; only of a file that we wrote."""
    try:
        return Structure(spec, faiss.read_index(str(path)), breadth)
    except RuntimeError as error:  # which faiss raises for a missing file as well
        if not path.exists():
            raise FileNotFoundError(f"{path} is gone") from error
        raise


def found_share(rows: Sequence[Rows], truth: Sequence[Rows]) -> float:
    """Share of the true rows among those found, in the mean."""
    shares = [len(np.intersect1d(found, true)) / len(true) for found, true in zip(rows, truth, strict=True)]
    return float(np.mean(shares)) if shares else 1.0


def _specs(count: int, width: int) -> list[str]:
    """Names of structures, in faiss's own language, in the order in which they are tried."""
    if count <= _FLAT:
        return ["Flat"]
    lists = 1 << max(int(np.log2(2 * np.sqrt(count))), 4)  # few: each costs as much as a hundred vectors
    found = [f"IVF{lists},PQ{width // 2}x4fs,Refine(SQ8)"]
    if count <= _GRAPH:
        found.append("HNSW32,SQ8")
    return [*found, f"IVF{lists},SQ8"]


def _filled(spec: str, blocks: Callable[[], Iterator[Singles]], sample: Singles) -> Any:
    index = _FAISS.index_factory(sample.shape[1], spec)
    _quicken(index)
    if not index.is_trained:
        index.train(sample)
    for block in blocks():
        index.add(block)
    return index


def _quicken(index: Any) -> None:
    inverted = _FAISS.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.cp.niter = 8
        inverted.cp.max_points_per_centroid = 64
        inverted.cp.min_points_per_centroid = 1


def _tuned(spec: str, index: Any, queries: Singles, truth: Sequence[Rows]) -> tuple[Breadth, float, float]:
    """The cheapest breadth that reaches the target, else the best; its recall, and seconds a query.

    Looking at more lists is tried as long as it may be cheaper than what reached the target with fewer.
    """
    best = Breadth(0, 0), -1.0, np.inf
    for probes in _probes(spec, index):
        breadths = _breadths(spec, probes)
        widest = found_share(list(Structure(spec, index, breadths[-1]).near(queries)[0]), truth)
        if widest < TARGET:
            best = max(best, (breadths[-1], widest, np.inf), key=lambda tried: tried[1])
            continue
        for breadth in breadths:
            structure = Structure(spec, index, breadth)
            recall = found_share(list(structure.near(queries)[0]), truth)
            if recall >= TARGET:
                break
        seconds = _seconds(structure, queries)
        if best[1] >= TARGET and seconds >= best[2]:
            return best
        best = breadth, recall, seconds
    return best


def _seconds(structure: Structure, queries: Singles) -> float:
    """Of this thread for one query, and for rescoring its candidates."""
    asked = queries[:_TIMED]
    start = time.thread_time()
    for query in asked:
        structure.near(query[None])
    return (time.thread_time() - start) / max(len(asked), 1) + _ROW_SECONDS * structure.breadth.candidates


def _probes(spec: str, index: Any) -> list[int]:
    if spec == "Flat":
        return [1]
    if spec.startswith("HNSW"):
        return [128, 256, 512, 1024]
    lists = int(_FAISS.try_extract_index_ivf(index).nlist)
    return sorted({max(int(share * lists), 1) for share in _SHARES})


def _breadths(spec: str, probes: int) -> list[Breadth]:
    """Breadths with so many probes, those first that cost less; the last one finds most."""
    factors = (1, 2, 4) if "Refine" in spec else (1,)
    found = [Breadth(probes, candidates, factor) for candidates in _CANDIDATES for factor in factors]
    return sorted(found, key=lambda one: one.candidates * (_ROW_SECONDS + one.factor * _WEIGHED_SECONDS))


def _parameters(spec: str, breadth: Breadth) -> Any:
    if spec == "Flat":
        return None
    if spec.startswith("HNSW"):
        return _FAISS.SearchParametersHNSW(efSearch=max(breadth.probes, breadth.candidates))
    inner = _FAISS.SearchParametersIVF(nprobe=breadth.probes)
    if "Refine" not in spec:
        return inner
    return _FAISS.IndexRefineSearchParameters(k_factor=float(breadth.factor), base_index_params=inner)
