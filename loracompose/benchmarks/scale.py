"""How an index behaves as the pool grows: synthetic pools of a thousand to a million adapters, on one thread.

Each pool is built in one process and searched in another, so that memory is that of searching alone. Nothing is
embedded: the encoder's time is left out on purpose. A pool that is kept is not built again: what searching and changing
leave behind is what was there before.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from loracompose.adapters.folder import write_json
from loracompose.benchmarks.scale_pool import Plan, build_pool, embed_profiles
from loracompose.benchmarks.scale_search import search_pool
from loracompose.benchmarks.written import significant

SIZES = (1_000, 10_000, 100_000, 1_000_000)


def measure(
    profiles: Path,
    work: Path,
    sizes: Sequence[int] = SIZES,
    *,
    keep: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Build and search a pool of each size; yields its numbers.

    Args:
        profiles: JSON lines with "adapter" and "prompt" of real adapters.
        work: a folder for the pools.
        sizes: numbers of adapters.
        keep: leave the pools there, and do not build those that are; otherwise they are deleted, those too that were
            kept.
        tell: is told what goes on.
    """
    work.mkdir(parents=True, exist_ok=True)
    embedded = work / "profiles.npz"
    if not embedded.is_file():
        tell("embedding the real profiles")
        embed_profiles(profiles, embedded)
    for size in sizes:
        plan = Plan(size, work / f"pool-{size}", embedded)
        built = plan.folder.with_suffix(".json")
        try:
            if not (keep and built.is_file()):
                tell(f"building a pool of {size:,} adapters")
                _delete(plan, built)
                write_json(built, _apart(build_pool, plan))
            tell(f"searching a pool of {size:,} adapters")
            numbers = json.loads(built.read_text(encoding="utf-8"))
            yield {"adapters": size, **numbers, **_apart(search_pool, plan)}
        finally:
            if not keep:
                _delete(plan, built)


def result_of(pools: Sequence[Mapping[str, Any]], before: Path | None = None) -> dict[str, Any]:
    """What is written: the machine, and these pools; from an earlier file those of other sizes; four digits."""
    known = {} if before is None or not before.is_file() else json.loads(before.read_text(encoding="utf-8"))
    found = {pool["adapters"]: pool for pool in [*known.get("pools", []), *pools]}
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread",
        "encoder": "left out: embeddings are synthetic",
        "times": "by the clock; cpu: of the process or thread alone, which differs where others use the machine",
        "pools": [significant(found[size]) for size in sorted(found)],
    }


def _delete(plan: Plan, built: Path) -> None:
    shutil.rmtree(plan.folder, ignore_errors=True)
    plan.queries.unlink(missing_ok=True)
    built.unlink(missing_ok=True)


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
