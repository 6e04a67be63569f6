"""Searching and changing a synthetic pool as users do: time, memory, and recall against comparing with all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracompose.benchmarks.scale_pool import Plan
from loracompose.benchmarks.synthesis import Singles, draw_block
from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.embedding import INSTRUCTION, CallableEmbedder, whole
from loracompose.retrieval.hybrid import CHANNELS
from loracompose.retrieval.index import AdapterIndex
from loracompose.retrieval.placement import CATALOG_FILE
from loracompose.retrieval.scale.parts import WHOLE
from loracompose.retrieval.scale.rows import Scaled
from loracompose.retrieval.scale.scanning import best_of
from loracompose.retrieval.scale.view import View
from loracompose.retrieval.segments import closing, opening

BATCH = 32

_QUERIES, _TIMED, _WARM = 500, 1024, 64
_CHANGES = 30
_NEAREST = 10
_NO_BLOCK = 1_000_000  # of no pool


def search_pool(plan: Plan) -> dict[str, Any]:
    """Open a pool, search it, add adapters to it, search it again, and remove them."""
    with np.load(plan.queries) as stored:
        vectors, texts, owners = stored["vectors"], stored["texts"].tolist(), stored["owners"].tolist()
    _clear(plan)
    catalog = Catalog.open(plan.folder / CATALOG_FILE)
    before = _status_mib()
    start = time.perf_counter()
    with AdapterIndex(plan.folder, catalog, CallableEmbedder(Given(vectors, texts), "synthetic", "1")) as index:
        index.prepare()
        found: dict[str, Any] = {"open_s": time.perf_counter() - start, "load": os.getloadavg()[0]}
        view = index._large.view()
        if view is not None:
            structure = view.version.structure
            found |= {"structure": structure.spec, "breadth": vars(structure.breadth)}
            found["weights"] = list(view.version.fitted.weights)
            found |= _quality(index, view, vectors, texts, owners)
        for scoring in ("hybrid", "discriminant"):
            found["search_" + scoring] = _timed(index, texts, scoring, 1)
            found[f"search_{scoring}_batch_of_{BATCH}"] = _timed(index, texts, scoring, BATCH)
        with every_channel(index):
            found["search_every_channel"] = _timed(index, texts, "hybrid", 1)
            found[f"search_every_channel_batch_of_{BATCH}"] = _timed(index, texts, "hybrid", BATCH)
        found |= {"memory_mib": _status_mib(), "memory_before_mib": before}
        found["add_imports_ms"] = _milliseconds(_import_what_adding_needs)[0]
        changed = _Changing(index, plan)
        found |= changed.added()
        found["memory_after_adding_mib"] = _status_mib()
        view = index._large.view()
        if view is not None:
            found["after_adding"] = {
                **_quality(index, view, vectors, texts, owners),
                "error_bound": max(drift.remainder for drift in view.drifts),
                "search_hybrid": _timed(index, texts, "hybrid", 1),
                f"search_hybrid_batch_of_{BATCH}": _timed(index, texts, "hybrid", BATCH),
            }
        found |= changed.removed()
    return found


@contextmanager
def every_channel(index: AdapterIndex) -> Iterator[None]:
    """Let every channel have a weight, which not every synthetic pool gives it: one without costs a search nothing."""
    view = index._large.view()
    if view is None:  # a small pool asks them all anyway
        yield
        return
    pool, weights = index._large._opened(), (1.0,) * len(CHANNELS)
    fitted = replace(view.version.fitted, weights=weights)
    pool._view = replace(view, version=replace(view.version, fitted=fitted))
    try:
        yield
    finally:
        pool._view = view


def exact_rows(view: View, vectors: Singles, count: int) -> NDArray[np.int64]:
    """Row ids of the nearest adapters of prompts, (n, count), by comparing with all under the current statistics."""
    centred = view.version.parts[WHOLE].frame.centred(whole(vectors))
    turned = np.stack([query.vector for query in view.metrics[WHOLE].turned(centred)])  # (n, D)
    best, ids = np.zeros((len(vectors), 0)), np.zeros((len(vectors), 0), dtype=np.int64)
    for places, means, squares in view.blocks():
        scores = turned @ means.T - 0.5 * view.metrics[WHOLE].squares(Scaled.of(means), squares)
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


class _Changing:
    """Adds adapters from folders, each followed by a search, and removes them again."""

    def __init__(self, index: AdapterIndex, plan: Plan) -> None:
        self._index, self._made = index, _added(plan)
        self._drawn = draw_block(plan.material(), _NO_BLOCK, plan.examples, _CHANGES)

    def added(self) -> dict[str, Any]:
        """What adding costs."""
        adding, after = [], []
        for row, texts in enumerate(self._drawn.texts):
            new = _adapter_folder(self._made / f"added-{row}", texts)
            known = Given(self._drawn.embeddings[row], texts)
            self._index.embedder.function.known |= known.known  # type: ignore[attr-defined]
            adding.append(_milliseconds(partial(self._index.add, new)))
            after.append(_milliseconds(partial(self._index.search, texts[:1])))
        return {"changes": len(adding), "add_ms": _spread(adding), "search_after_add_ms": _spread(after)}

    def removed(self) -> dict[str, Any]:
        """What removing them costs."""
        removing, after = [], []
        for row, texts in enumerate(self._drawn.texts):
            removing.append(_milliseconds(partial(self._index.remove, f"added-{row}")))
            after.append(_milliseconds(partial(self._index.search, texts[:1])))
        shutil.rmtree(self._made)
        return {"remove_ms": _spread(removing), "search_after_remove_ms": _spread(after)}


def _import_what_adding_needs() -> None:
    """PEFT with all that it imports: once a process, and seconds."""
    import loracompose.retrieval.entering  # noqa: F401


def _added(plan: Plan) -> Path:
    return plan.folder.with_name(f"{plan.folder.name}-added")


def _clear(plan: Plan) -> None:
    """Remove what an interrupted measurement has left."""
    shutil.rmtree(_added(plan), ignore_errors=True)
    catalog = Catalog.open(plan.folder / CATALOG_FILE)
    for row in range(_CHANGES):
        if f"added-{row}" in catalog:
            catalog.remove(f"added-{row}")
    catalog.close()


def _quality(index: AdapterIndex, view: View, vectors: Singles, texts: Sequence[str], owners: Any) -> dict[str, float]:
    truth = exact_rows(view, vectors[:_QUERIES], _NEAREST)
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


def _spread(times: Sequence[tuple[float, float]]) -> dict[str, float]:
    walls, used = zip(*times, strict=True)
    return {
        "first": walls[0],
        "p50": float(np.median(walls)),
        "max": max(walls),
        "cpu_p50": float(np.median(used)),
        "cpu_max": max(used),
    }


def _milliseconds(action: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of this thread alone."""
    start, begun = time.perf_counter(), time.thread_time()
    action()
    return 1000 * (time.perf_counter() - start), 1000 * (time.thread_time() - begun)


def _status_mib() -> dict[str, float]:
    """Memory of this process, in MiB; empty where unknown.

    `peak` and `present` count everything, `own` of it what belongs to the process alone, and `mapped` the parts of
    files that it maps, which the system may take back and which processes share.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return {}
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    wanted = {"VmHWM": "peak", "VmRSS": "present", "RssAnon": "own", "RssFile": "mapped"}
    return {name: int(lines[key].split()[0]) / 1024 for key, name in wanted.items() if key in lines}
