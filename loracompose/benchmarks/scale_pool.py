"""Building a synthetic pool: the catalog written in bulk, what searches read derived as for any other index."""

from __future__ import annotations

import resource
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loracompose.benchmarks.synthesis import BLOCK, Profiles, Singles, draw_block, draw_queries, read_profiles
from loracompose.retrieval.catalog import Catalog, Settings
from loracompose.retrieval.embedding import INSTRUCTION, SentenceTransformerEmbedder, features
from loracompose.retrieval.placement import CATALOG_FILE
from loracompose.retrieval.scale.sized import derive

_FEW = 100_000  # adapters up to which each stores four examples, beyond two
_QUERIES = 1024

Rows = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Plan:
    """What is measured: `size` adapters in `folder`, made of the real profiles whose embeddings are in `profiles`."""

    size: int
    folder: Path
    profiles: Path

    @property
    def queries(self) -> Path:
        """Where the prompts to search for are kept between the stages."""
        return self.folder.with_suffix(".npz")

    @property
    def examples(self) -> int:
        """Examples that each adapter stores."""
        return 4 if self.size <= _FEW else 2

    def material(self) -> Profiles:
        """The real profiles."""
        with np.load(self.profiles) as stored:
            return Profiles(stored["features"], stored["owners"], tuple(stored["texts"].tolist()))


def embed_profiles(path: Path, target: Path) -> None:
    """Embed the prompts of real adapters once, with the default encoder."""
    texts, owners = read_profiles(path)
    embedder = SentenceTransformerEmbedder()
    settings = Settings(embedder.name, embedder.revision, embedder.dimension, INSTRUCTION)
    np.savez(target, features=features(embedder, texts, settings), owners=owners, texts=np.array(texts))


def build_pool(plan: Plan) -> dict[str, Any]:
    """Write the catalog in bulk and derive what searches read."""
    profiles = plan.material()
    plan.folder.mkdir(parents=True)
    settings = Settings("synthetic", "1", profiles.features.shape[1] // 4, INSTRUCTION, "hybrid", precision=2)
    Catalog.create(plan.folder / CATALOG_FILE, settings).close()
    inserting = _Clock()
    _insert(plan.folder / CATALOG_FILE, _rows(profiles, plan))
    inserted = inserting.read()
    catalog = Catalog.open(plan.folder / CATALOG_FILE)
    vectors, texts, owners = _queries(profiles, plan)
    np.savez(plan.queries, vectors=vectors, texts=np.array(texts), owners=np.array(owners))
    deriving = _Clock()
    derive(catalog, plan.folder)
    derived = deriving.read()
    catalog.close()
    return {
        "examples": plan.examples,
        "insert_s": inserted[0],
        "insert_cpu_s": inserted[1],
        "derive_s": derived[0],
        "derive_cpu_s": derived[1],
        "build_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bytes": {
            path.suffix.lstrip("."): path.stat().st_size for path in sorted(plan.folder.iterdir()) if path.suffix
        },
    }


class _Clock:
    """Seconds by the clock and of this process since it was made."""

    def __init__(self) -> None:
        self._begun = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]


def _rows(profiles: Profiles, plan: Plan) -> Iterator[tuple[Rows, Rows]]:
    """Rows of adapters and of their examples, by blocks."""
    for first in range(0, plan.size, BLOCK):
        drawn = draw_block(profiles, first // BLOCK, plan.examples, min(BLOCK, plan.size - first))
        blobs = drawn.embeddings.astype("<f2")
        names = [f"{first + row:07d}" for row in range(len(blobs))]
        adapters = [
            (first + row + 1, name, f"pool/{name}", name, "base", "", "", "[]", "[]", "{}", "")
            for row, name in enumerate(names)
        ]
        examples = [
            (first + row + 1, place, text, blobs[row, place].tobytes())
            for row, texts in enumerate(drawn.texts)
            for place, text in enumerate(texts)
        ]
        yield adapters, examples


def _insert(path: Path, rows: Iterator[tuple[Rows, Rows]]) -> None:
    """Fill a new catalog: one transaction a block, without a journal, nothing flushed before the end."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA journal_mode = OFF")
    for adapters, examples in rows:
        connection.executemany("INSERT INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", adapters)
        connection.executemany("INSERT INTO examples VALUES (?, ?, ?, ?)", examples)
        connection.commit()
    connection.execute("UPDATE meta SET value = '1' WHERE key = 'generation'")
    connection.commit()
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()


def _queries(profiles: Profiles, plan: Plan) -> tuple[Singles, list[str], list[str]]:
    """Fresh prompts of adapters all over the pool: features, distinct texts, and names of their adapters."""
    blocks = np.unique(np.linspace(0, (plan.size - 1) // BLOCK, 8).astype(np.int64)).tolist()
    vectors, texts, owners = [], [], []
    for block in blocks:
        drawn = draw_block(profiles, block, plan.examples, min(BLOCK, plan.size - block * BLOCK))
        rows = np.random.default_rng(block).integers(0, len(drawn.truths), -(-_QUERIES // len(blocks)))
        found, worded = draw_queries(profiles, drawn, rows, block)
        vectors.append(found)
        texts += [f"{text} {block}.{place}" for place, text in enumerate(worded)]
        owners += [f"{block * BLOCK + row:07d}" for row in rows.tolist()]
    order = np.random.default_rng(5).permutation(len(texts))
    return np.concatenate(vectors)[order], [texts[row] for row in order], [owners[row] for row in order]
