"""A figure of what grows with the pool and what does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the pools of a result of `scale.result_of`: CPU time of a search, of a change, memory."""
    from matplotlib.figure import Figure  # here, for only drawing needs it

    pools: Sequence[Mapping[str, Any]] = result["pools"]
    sizes = [pool["adapters"] for pool in pools]
    figure = Figure(figsize=(10, 3), layout="constrained")
    searches, changes, memory = figure.subplots(1, 3)
    for key, label in (("search_hybrid", "one prompt"), ("search_hybrid_batch_of_32", "a prompt of 32")):
        for part, style in (("50", "o-"), ("99", "o:")):
            values = [pool[key][f"cpu_p{part}_ms"] for pool in pools]
            searches.plot(sizes, values, style, label=f"{label}, {part} %")
    for key, label in (("add_ms", "add"), ("remove_ms", "remove"), ("search_after_add_ms", "next search")):
        changes.plot(sizes, [pool[key]["cpu_p50"] for pool in pools], "o-", label=label)
    memory.plot(sizes, [pool["memory_mib"]["present"] for pool in pools], "o-", label="while searching")
    memory.plot(sizes, [pool["memory_after_adding_mib"]["peak"] for pool in pools], "o--", label="peak, with adding")
    memory.plot(sizes, [pool["build_peak_mib"] for pool in pools], "o:", label="peak while building")
    titles = "search, CPU ms", "change, CPU ms (median)", "memory, MiB"
    for axes, title in zip((searches, changes, memory), titles, strict=True):
        axes.set(xscale="log", yscale="log", xlabel="adapters", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
