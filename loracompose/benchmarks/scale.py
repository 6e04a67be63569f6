"""How an index behaves as the pool grows: synthetic pools of a thousand to a million adapters, on one thread.

Each pool is built in one process and searched in another, so that memory is that of searching alone. Nothing is
embedded: the encoder's time is left out on purpose.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracompose.benchmarks.synthesis import (
    BLOCK,
    Drawn,
    Profiles,
    Singles,
    draw_block,
    draw_queries,
    read_profiles,
)
from loracompose.retrieval.catalog import Catalog, Settings
from loracompose.retrieval.embedding import (
    INSTRUCTION,
    CallableEmbedder,
    SentenceTransformerEmbedder,
    features,
)
from loracompose.retrieval.index import AdapterIndex
from loracompose.retrieval.placement import CATALOG_FILE
from loracompose.retrieval.scale.making import best_of
from loracompose.retrieval.scale.sized import derive
from loracompose.retrieval.scale.view import View
from loracompose.retrieval.segments import closing, opening

SIZES = (1_000, 10_000, 100_000, 1_000_000)
EXAMPLES = 4
_QUERIES, _TIMED, _CHANGES, _WARM = 500, 2000, 30, 100
_NEAREST = 10
_BATCH = 32


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


def measure(
    profiles: Path, work: Path, sizes: Sequence[int] = SIZES, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Build and search a pool of each size; what it wrote is deleted again.

    Args:
        profiles: JSON lines with "adapter" and "prompt" of real adapters.
        work: a folder for the pools; a million adapters take about 15 GB.
        sizes: numbers of adapters.
        tell: is told what goes on.
    """
    work.mkdir(parents=True, exist_ok=True)
    embedded = work / "profiles.npz"
    if not embedded.is_file():
        tell("embedding the real profiles")
        embed_profiles(profiles, embedded)
    pools = []
    for size in sizes:
        plan = Plan(size, work / f"pool-{size}", embedded)
        shutil.rmtree(plan.folder, ignore_errors=True)
        try:
            pools.append({"adapters": size, **_apart(build_pool, plan), **_apart(search_pool, plan)})
        finally:
            shutil.rmtree(plan.folder, ignore_errors=True)
            plan.queries.unlink(missing_ok=True)
        tell(json.dumps(pools[-1]))
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread",
        "examples_stored": EXAMPLES,
        "encoder": "left out: embeddings are synthetic",
        "pools": pools,
    }


def merged(result: dict[str, Any], before: Path) -> dict[str, Any]:
    """The result, with the pools of an earlier one whose sizes it lacks, and numbers of four digits."""
    pools = {pool["adapters"]: pool for pool in result["pools"]}
    if before.is_file():
        for pool in json.loads(before.read_text(encoding="utf-8"))["pools"]:
            pools.setdefault(pool["adapters"], pool)
    return {**result, "pools": [_rounded(pools[size]) for size in sorted(pools)]}


def embed_profiles(path: Path, target: Path) -> None:
    """Embed the prompts of real adapters once, with the default encoder."""
    texts, owners = read_profiles(path)
    embedder = SentenceTransformerEmbedder()
    settings = Settings(embedder.name, embedder.revision, embedder.dimension, INSTRUCTION)
    np.savez(target, features=features(embedder, texts, settings), owners=owners, texts=np.array(texts))


def build_pool(plan: Plan) -> dict[str, Any]:
    """Write the catalog in bulk and derive what searches read."""
    profiles = _profiles(plan.profiles)
    plan.folder.mkdir(parents=True)
    width = profiles.features.shape[1]
    settings = Settings("synthetic", "1", width // 4, INSTRUCTION, "hybrid", precision=2)
    start = time.perf_counter()
    catalog = Catalog.create(plan.folder / CATALOG_FILE, settings)
    _insert(catalog.path, _rows(profiles, plan.size))
    inserted = time.perf_counter()
    vectors, texts, owners = _queries(profiles, plan.size)
    np.savez(plan.queries, vectors=vectors, texts=np.array(texts), owners=np.array(owners))
    begun = time.perf_counter()
    used = time.process_time()
    derive(catalog, plan.folder)
    done = time.perf_counter()
    catalog.close()
    return {
        "insert_s": inserted - start,
        "derive_s": done - begun,
        "derive_cpu_s": time.process_time() - used,
        "build_peak_mib": _peak_mib(),
        "bytes": {path.suffix.lstrip("."): path.stat().st_size for path in sorted(plan.folder.iterdir())},
    }


def search_pool(plan: Plan) -> dict[str, Any]:
    """Open a pool, search it, change it, and search it again."""
    with np.load(plan.queries) as stored:
        vectors, texts, owners = stored["vectors"], stored["texts"].tolist(), stored["owners"].tolist()
    embedder = Given(vectors, texts)
    catalog = Catalog.open(plan.folder / CATALOG_FILE)
    before = _status_mib()
    start = time.perf_counter()
    index = AdapterIndex(plan.folder, catalog, CallableEmbedder(embedder, "synthetic", "1"))
    index.prepare()
    opened = time.perf_counter() - start
    view = index._large.view()
    found: dict[str, Any] = {"open_s": opened, "load": os.getloadavg()[0]}
    if view is not None:
        structure = view.version.structure
        found |= {"structure": structure.spec, "breadth": vars(structure.breadth)}
        found |= _quality(index, view, vectors, texts, owners)
    for scoring in ("hybrid", "discriminant"):
        found["search_" + scoring] = _timed(index, texts, scoring, 1)
        found[f"search_{scoring}_batch_of_{_BATCH}"] = _timed(index, texts, scoring, _BATCH)
    found |= {"memory_mib": _status_mib(), "memory_before_mib": before}
    found |= _changes(index, _profiles(plan.profiles), plan.folder)
    view = index._large.view()
    if view is not None:
        found |= {
            "after_changes": _quality(index, view, vectors, texts, owners),
            "remainder": max(drift.remainder for drift in view.drifts),
        }
    index.close()
    return found


def exact_rows(view: View, queries: Singles, count: int) -> NDArray[np.int64]:
    """Row ids of the nearest adapters of prompts, (n, count), by comparing with all under the current statistics."""
    metric = view.metrics[0]
    turned = queries @ metric.precision
    best, ids = np.zeros((len(queries), 0)), np.zeros((len(queries), 0), dtype=np.int64)
    for places, means, squares in view.blocks():
        current = metric.scale * squares - (means @ metric.leaning) ** 2 @ metric.shares
        scores = turned @ means.T - 0.5 * current
        wide = np.broadcast_to(view.ids(places), scores.shape)
        best, ids = best_of(np.concatenate([best, scores], axis=1), np.concatenate([ids, wide], axis=1), count)
    return np.asarray(np.take_along_axis(ids, np.argsort(-best, axis=1), axis=1))


class Given:
    """An embedder that knows the views of the texts already; where two texts share an edge, the last one's counts."""

    def __init__(self, features: Singles, texts: Sequence[str]) -> None:
        views = (lambda text: text, lambda text: INSTRUCTION + text, opening, closing)
        self.known: dict[str, Singles] = {}
        for view, rows in reversed(list(zip(views, np.split(features, len(views), axis=1), strict=True))):
            self.known |= {view(text): row for text, row in zip(texts, rows, strict=True)}

    def __call__(self, texts: list[str]) -> Singles:
        """Their vectors, (len(texts), dimension)."""
        return np.stack([self.known[text] for text in texts])


def _quality(index: AdapterIndex, view: View, vectors: Singles, texts: Sequence[str], owners: Any) -> dict[str, float]:
    truth = exact_rows(view, view.centred(vectors[:_QUERIES])[0], _NEAREST)
    shares, own = [], []
    for row, text in enumerate(texts[:_QUERIES]):
        found = index.search([text], _NEAREST, scoring="discriminant")
        names = {card.name for card in found.cards}
        expected = {entry.card.name for entry in index.catalog.entries(truth[row].tolist())}
        shares.append(len(names & expected) / len(expected))
        own.append(found.for_prompt(0)[0].card.name == owners[row])
    return {"recall_at_10": float(np.mean(shares)), "own_first": float(np.mean(own))}


def _timed(index: AdapterIndex, texts: Sequence[str], scoring: Any, batch: int) -> dict[str, float]:
    """Milliseconds a prompt, by the clock and of this thread alone: where others use the machine, they differ."""
    walls, used = [], []
    for turn in range((_WARM + _TIMED) // batch):
        asked = [texts[(turn * batch + place) % len(texts)] for place in range(batch)]
        start, begun = time.perf_counter(), time.thread_time()
        index.search(asked, scoring=scoring)
        walls.append(1000 * (time.perf_counter() - start) / batch)
        used.append(1000 * (time.thread_time() - begun) / batch)
    warm = _WARM // batch
    return {
        f"{name}p{part}_ms": float(np.percentile(values[warm:], part))
        for name, values in (("", walls), ("cpu_", used))
        for part in (50, 99)
    }


def _changes(index: AdapterIndex, profiles: Profiles, folder: Path) -> dict[str, Any]:
    """Add and remove adapters as users do, from folders, each followed by a search."""
    drawn = draw_block(profiles, 1_000_000, EXAMPLES)  # of no pool
    made = folder.parent / "added"
    shutil.rmtree(made, ignore_errors=True)
    adding, after_add, removing, after_remove = [], [], [], []
    for row in range(_CHANGES):
        new = _adapter_folder(made / f"added-{row}", drawn.texts[row])
        known = Given(drawn.embeddings[row], drawn.texts[row])
        index.embedder.function.known |= known.known  # type: ignore[attr-defined]
        adding.append(_milliseconds(partial(index.add, new)))
        after_add.append(_milliseconds(partial(index.search, [drawn.texts[row][0]])))
    for row in range(_CHANGES):
        removing.append(_milliseconds(partial(index.remove, f"{row:07d}" if row % 2 else f"added-{row}")))
        after_remove.append(_milliseconds(partial(index.search, [drawn.texts[row][0]])))
    shutil.rmtree(made)
    named = {"add": adding, "search_after_add": after_add, "remove": removing, "search_after_remove": after_remove}
    return {f"{name}_ms": {"p50": float(np.median(values)), "max": max(values)} for name, values in named.items()}


def _adapter_folder(folder: Path, examples: Sequence[str]) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{stem}A.weight": torch.ones(8, 64), f"{stem}B.weight": torch.ones(64, 8)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 8, "lora_alpha": 16}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    (folder / "card.json").write_text(json.dumps({"examples": list(dict.fromkeys(examples))}))
    return folder


def _rows(profiles: Profiles, size: int) -> Iterator[tuple[int, list[tuple[Any, ...]], list[tuple[Any, ...]]]]:
    for first in range(0, size, BLOCK):
        drawn = draw_block(profiles, first // BLOCK, EXAMPLES)
        count = min(BLOCK, size - first)
        blobs = drawn.embeddings[:count].astype("<f2")
        names = [f"{first + row:07d}" for row in range(count)]
        adapters = [
            (first + row + 1, name, f"pool/{name}", name, "base", "", "", "[]", "{}", "")
            for row, name in enumerate(names)
        ]
        examples = [
            (first + row + 1, place, drawn.texts[row][place], blobs[row, place].tobytes())
            for row in range(count)
            for place in range(EXAMPLES)
        ]
        yield first, adapters, examples


def _insert(path: Path, rows: Iterator[tuple[int, list[tuple[Any, ...]], list[tuple[Any, ...]]]]) -> None:
    """Fill a new catalog: one transaction a block, nothing flushed before the end."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA synchronous = OFF")
    for _, adapters, examples in rows:
        connection.executemany("INSERT INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", adapters)
        connection.executemany("INSERT INTO examples VALUES (?, ?, ?, ?)", examples)
        connection.commit()
    connection.execute("UPDATE meta SET value = '1' WHERE key = 'generation'")
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def _queries(profiles: Profiles, size: int) -> tuple[Singles, list[str], list[str]]:
    """Fresh prompts of adapters all over the pool: features, distinct texts, and names of their adapters."""
    blocks = np.unique(np.linspace(0, (size - 1) // BLOCK, 8).astype(np.int64)).tolist()
    vectors, texts, owners = [], [], []
    for block in blocks:
        drawn: Drawn = draw_block(profiles, block, EXAMPLES)
        count = min(BLOCK, size - block * BLOCK)
        rows = np.random.default_rng(block).integers(0, count, -(-1024 // len(blocks)))
        found, worded = draw_queries(profiles, drawn, rows, block)
        vectors.append(found)
        texts += [f"{text} {block}.{place}" for place, text in enumerate(worded)]
        owners += [f"{block * BLOCK + row:07d}" for row in rows.tolist()]
    order = np.random.default_rng(5).permutation(len(texts))
    return np.concatenate(vectors)[order], [texts[row] for row in order], [owners[row] for row in order]


def _profiles(path: Path) -> Profiles:
    with np.load(path) as stored:
        return Profiles(stored["features"], stored["owners"], tuple(stored["texts"].tolist()))


def _apart(stage: Callable[[Plan], dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """Run a stage in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_one_thread) as executor:
        return executor.submit(stage, plan).result()


def _one_thread() -> None:
    import faiss
    import torch

    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _milliseconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - start)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _status_mib() -> dict[str, float]:
    """Memory of this process: peak and present, its own and that of mapped files, in MiB; empty where unknown."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return {}
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    wanted = {"VmHWM": "peak", "VmRSS": "present", "RssAnon": "own", "RssFile": "mapped"}
    return {name: int(lines[key].split()[0]) / 1024 for key, name in wanted.items() if key in lines}
