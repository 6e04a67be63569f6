"""Which faiss structure a version gets, and how wide it looks: by measured recall against exact search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.scale.structure import Breadth, Structure

_FAISS: Any = faiss  # its stubs know the constructors of C++, not those of Python

Singles = NDArray[np.float32]
Rows = NDArray[np.int64]

TARGET = 0.995
"""Recall of the ten best that a structure is chosen for; measured on queries made from examples."""

NEAREST = 10

_FLAT = 8192
"""Vectors up to which comparing with all of them is cheapest."""

_WIDE = 260
"""Length of vectors up to which two coordinates have a code of four bits; of longer ones four have."""

_GRAPH = 32768
"""Vectors up to which a graph is tried; beyond, building it costs hours."""

_TIMED, _BATCH = 128, 32  # queries that a breadth is timed on, and how many at once
_PATIENCE = 2  # shares of the lists in a row that are tried without a gain

_CANDIDATES = (64, 80, 96, 128, 160, 192, 256, 320, 384, 512)
"""Candidates that are fetched and scored exactly."""

_WEIGHED = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Candidates that faiss weighs again by eight bits a coordinate."""

_SHARES = (1 / 64, 1 / 32, 3 / 64, 1 / 16, 3 / 32, 1 / 8, 5 / 32, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 1.0)
"""Shares of the lists that are looked at."""


def build_structure(
    blocks: Callable[[], Iterator[Singles]],
    count: int,
    sample: Singles,
    queries: Singles,
    truth: Sequence[Rows],
    row_seconds: float = 1e-6,
) -> Structure:
    """The cheapest structure that finds what exact search finds.

    Args:
        blocks: reads all reduced vectors in their order.
        count: how many there are.
        sample: some of them, to train on.
        queries: reduced queries.
        truth: for each the rows of the nearest adapters under exact search.
        row_seconds: what fetching and scoring one candidate takes, against which that is weighed which faiss takes.
    """
    best: tuple[tuple[bool, float], Structure] | None = None
    for spec in _specs(count, sample.shape[1]):
        index = _filled(spec, blocks, sample)
        breadth, recall, seconds = _tuned(spec, index, queries, truth, row_seconds)
        reached = recall >= TARGET
        rank = (reached, -seconds if reached else recall)
        if best is None or rank > best[0]:
            best = rank, Structure(spec, index, breadth)
        if reached:
            break
    if best is None:
        raise ValueError("a structure needs at least one vector")
    return best[1]


def found_share(rows: Sequence[Rows], truth: Sequence[Rows]) -> float:
    """Share of the true rows among those found, in the mean."""
    shares = [len(np.intersect1d(found, true)) / len(true) for found, true in zip(rows, truth, strict=True)]
    return float(np.mean(shares)) if shares else 1.0


def _specs(count: int, width: int) -> list[str]:
    """Names of structures, in faiss's own language, in the order in which they are tried."""
    if count <= _FLAT:
        return ["Flat"]
    lists = 1 << max(int(np.log2(2 * np.sqrt(count))), 4)  # few: each costs as much as a hundred vectors
    found = [f"IVF{lists},PQ{width // coded_together(width)}x4fs,Refine(SQ8)"]
    if count <= _GRAPH:
        found.append("HNSW32,SQ8")
    return [*found, f"IVF{lists},SQ8"]


def coded_together(width: int) -> int:
    """How many coordinates of vectors of this length, a multiple of 4, one code of four bits stands for."""
    return 2 if width <= _WIDE else 4


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


def _tuned(
    spec: str, index: Any, queries: Singles, truth: Sequence[Rows], row_seconds: float
) -> tuple[Breadth, float, float]:
    """The cheapest breadth that reaches the target, else the best; its recall, and seconds a query.

    Looking at more lists is tried as long as it may be cheaper than what reached the target with fewer.
    """
    best = Breadth(0, 0), -1.0, np.inf
    worse = 0
    for probes in _probes(spec, index):
        found = _cheapest(spec, index, probes, queries, truth, row_seconds)
        if best[1] < TARGET:
            best = max(best, found, key=lambda tried: tried[1])
        elif found[2] < best[2]:
            best, worse = found, 0
        else:
            worse += 1
        if worse == _PATIENCE:
            break
    return best


def _cheapest(
    spec: str, index: Any, probes: int, queries: Singles, truth: Sequence[Rows], row_seconds: float
) -> tuple[Breadth, float, float]:
    """As `_tuned`, of the breadths with so many probes."""
    again = "Refine" in spec
    sizes = _WEIGHED if again else _CANDIDATES
    most = Breadth(probes, _CANDIDATES[-1], sizes[-1] / _CANDIDATES[-1])
    best = most, found_share(list(Structure(spec, index, most).near(queries)[0]), truth), np.inf
    if best[1] < TARGET:
        return best
    for weighed in sizes:  # of those that are weighed again the nearest are candidates, as few as do
        rows, _ = Structure(spec, index, Breadth(probes, weighed)).near(queries)
        fitting = [count for count in _CANDIDATES if count <= weighed] if again else [weighed]
        recalls = [found_share(list(rows[:, :count]), truth) for count in fitting]
        reached = [(count, recall) for count, recall in zip(fitting, recalls, strict=True) if recall >= TARGET]
        if not reached:
            continue
        count, recall = reached[0]
        breadth = Breadth(probes, count, weighed / count)
        seconds = _seconds(Structure(spec, index, breadth), queries) + row_seconds * count
        if seconds >= best[2]:
            break
        best = breadth, recall, seconds
    return best


def _seconds(structure: Structure, queries: Singles) -> float:
    """Of this thread for one query of a batch."""
    asked = np.array_split(queries[:_TIMED], max(len(queries[:_TIMED]) // _BATCH, 1))
    found = []
    for _ in range(3):
        start = time.thread_time()
        for batch in asked:
            structure.near(batch)
        found.append(time.thread_time() - start)
    return min(found) / max(len(queries[:_TIMED]), 1)


def _probes(spec: str, index: Any) -> list[int]:
    if spec == "Flat":
        return [1]
    if spec.startswith("HNSW"):
        return [128, 256, 512, 1024]
    lists = int(_FAISS.try_extract_index_ivf(index).nlist)
    return sorted({max(int(share * lists), 1) for share in _SHARES})
