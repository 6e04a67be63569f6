"""A figure of what grows with the pool and what does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the pools of a result of `scale.result_of`: CPU time of a search, of a change, memory."""
    from matplotlib.figure import Figure  # here, for only drawing needs it
    from matplotlib.ticker import LogLocator, NullFormatter

    pools: Sequence[Mapping[str, Any]] = result["pools"]
    sizes = [pool["adapters"] for pool in pools]
    figure = Figure(figsize=(10, 3), layout="constrained")
    searches, changes, memory = figure.subplots(1, 3)
    for colour, key, label in (("C0", "", "one prompt"), ("C1", "_batch_of_32", "a prompt of 32")):
        for part, style in (("50", "o-"), ("99", "o:")):
            values = [pool["search_every_channel" + key][f"cpu_p{part}_ms"] for pool in pools]
            searches.plot(sizes, values, style, color=colour, label=f"{label}, {part} %")
    for key, label in (("add_ms", "add"), ("remove_ms", "remove"), ("search_after_add_ms", "next search")):
        changes.plot(sizes, [pool[key]["cpu_p50"] for pool in pools], "o-", label=label)
    memory.plot(sizes, [pool["memory_mib"]["present"] for pool in pools], "o-", label="while searching")
    memory.plot(sizes, [pool["memory_after_adding_mib"]["peak"] for pool in pools], "o--", label="peak, with adding")
    memory.plot(sizes, [pool["build_peak_mib"] for pool in pools], "o:", label="peak while building")
    titles = "search, CPU ms", "change, CPU ms (median)", "memory, MiB"
    for axes, title in zip((searches, changes, memory), titles, strict=True):
        axes.set(xscale="log", yscale="log", xlabel="adapters", title=title)
        axes.grid(alpha=0.3)
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top * (top / bottom) ** 0.45)  # room for the legend
        axes.legend(fontsize=7, loc="upper right" if axes is changes else "upper left")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if axes is not changes else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    figure.savefig(path, metadata={"Date": None})
