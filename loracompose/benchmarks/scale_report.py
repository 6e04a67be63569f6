"""The table of scale in the README, made of its results alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BLOCK = "scale"  # of the document that the table stands in

_COLUMNS = (
    "adapters",
    "search, ms a prompt, of 32",
    "alone",
    "recall@10",
    "add, ms",
    "next search, ms",
    "remove, ms",
    "open, s",
    "build, CPU min",
    "on disk, GB",
    "memory, MiB",
)


def markdown(result: Mapping[str, Any]) -> str:
    """The table of a result of `scale.result_of`: CPU times, medians, and of searches the 99th percentile."""
    head = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    return "\n".join([*head, *(_line(pool) for pool in result["pools"])])


def _line(pool: Mapping[str, Any]) -> str:
    cells = [
        f"{pool['adapters']:,}",
        _search(pool["search_every_channel_batch_of_32"]),
        _search(pool["search_every_channel"]),
        f"{pool['recall_at_10']:.3f}" if "recall_at_10" in pool else "exact",
        *(_short(pool[f"{name}_ms"]["cpu_p50"]) for name in ("add", "search_after_add", "remove")),
        _short(pool["open_s"]),
        _short((pool["insert_cpu_s"] + pool["derive_cpu_s"]) / 60),
        _short(sum(pool["bytes"].values()) / 1e9),
        f"{pool['memory_after_adding_mib']['peak']:,.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _search(times: Mapping[str, float]) -> str:
    return f"{times['cpu_p50_ms']:.2f} ({times['cpu_p99_ms']:.2f})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
