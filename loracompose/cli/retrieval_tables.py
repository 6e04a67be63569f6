"""What `loracompose bench retrieval` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from loracompose.cli.tables import table


def rounded(value: object) -> object:
    """The same JSON with numbers of four decimals."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def retrieval_tables(result: Mapping[str, Any]) -> list[Table]:
    """What a measurement of retrieval found: a table for each part of the rows, and one of what abstaining buys."""
    made = []
    for part, count in result["rows"].items():
        rows = [
            (
                escape(name),
                *(_hit(hit) for hit in parts[part]["hit"].values()),
                f"{parts[part]['calibration_error']:.3f}",
            )
            for name, parts in result["scorings"].items()
        ]
        rows += [
            (escape(name), *(f"{share:.1f}" for share in row.values()), "") for name, row in result["paper"].items()
        ]
        heads = ("scoring", "@1", "@3", "@5", "@8", "calibration error")
        title = f"{part}: {count:,} prompts, {result['adapters']} adapters of {result['examples']} examples"
        made.append(table(title, heads, rows, right=(1, 2, 3, 4, 5)))
    abstained = [
        (part, alpha, f"{entry['abstained']:.1f}", f"{entry['hit']:.1f}")
        for part, found in result["scorings"]["hybrid"].items()
        for alpha, entry in found["abstention"].items()
    ]
    columns = ("rows", "alpha", "% to the base", "% right of the others")
    made.append(table("conformal abstention of the hybrid", columns, abstained, right=(1, 2, 3)))
    per_prompt = f"{result['query_ms_beyond_encoder']:.2f} ms a prompt beyond the encoder"
    made[-1].caption = f"fitted in {result['fit_seconds']:.2f} s; {per_prompt}"
    return made


def _hit(hit: Mapping[str, float]) -> str:
    return f"{hit['share']:.1f} [{hit['low']:.1f}, {hit['high']:.1f}]"
