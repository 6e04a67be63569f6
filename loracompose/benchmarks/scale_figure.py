"""A figure of what grows with the pool and what does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the pools of a result of `scale.measure`: time of a search, of a change, memory, and recall."""
    from matplotlib.figure import Figure  # here, for only drawing needs it

    pools: Sequence[Mapping[str, Any]] = result["pools"]
    sizes = [pool["adapters"] for pool in pools]
    figure = Figure(figsize=(10, 3), layout="constrained")
    searches, changes, memory = figure.subplots(1, 3)
    for key, label in (("search_hybrid", "one prompt"), ("search_hybrid_batch_of_32", "a prompt of 32")):
        searches.plot(sizes, [pool[key]["p50_ms"] for pool in pools], "o-", label=f"{label}, median")
        searches.plot(sizes, [pool[key]["p99_ms"] for pool in pools], "o:", label=f"{label}, 99 %")
    for key, label in (("add_ms", "add"), ("remove_ms", "remove"), ("search_after_add_ms", "next search")):
        changes.plot(sizes, [pool[key]["p50"] for pool in pools], "o-", label=label)
    memory.plot(sizes, [pool["memory_mib"]["present"] for pool in pools], "o-", label="while searching")
    memory.plot(sizes, [pool["build_peak_mib"] for pool in pools], "o:", label="peak while deriving")
    for axes, title in ((searches, "search, ms"), (changes, "change, ms (median)"), (memory, "memory, MiB")):
        axes.set(xscale="log", xlabel="adapters", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    searches.set_yscale("log")
    changes.set_yscale("log")
    figure.savefig(path, metadata={"Date": None})
