"""Write the tables of encoders, of their dtype and of several centres in docs/retrieval.md from what was measured.

    loracompose bench retrieval --data FLAN48 -o benchmarks/results/retrieval_flan48.json
    loracompose bench retrieval --data FLAN48 --encoder :bfloat16 \\
        -o benchmarks/results/retrieval_flan48_bfloat16.json
    python benchmarks/retriever_finetuning.py FLAN48 TASKS POOL --work DIR \\
        -o benchmarks/results/retriever_finetuning.json
    python benchmarks/several_kinds.py FLAN48 TASKS POOL --work DIR -o benchmarks/results/several_kinds.json
    python benchmarks/retriever_report.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loracompose.durable import write_whole
from loracompose.marked import fill

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "retrieval.md"

ENCODERS = {"0": "untouched", "40": "40 % of the adapters", "100": "all adapters"}
PAPER = "LoraRetriever, "
SIZES = {"1": "one task", "2": "two tasks", "3": "three tasks"}


def results(name: str) -> dict[str, Any]:
    """What one measurement wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def encoders() -> str:
    """What was held out of the profiles, under every recipe, then test rows, and the paper's."""
    result = results("retriever_finetuning")
    rows = [lines_of("held-out examples", title, result["choice"][title], "all") for title in result["choice"]]
    for share in sorted(result["flan48"], key=int):
        rows.append(lines_of("test prompts", ENCODERS[share], result["flan48"][share], "all"))
    for part in ("seen", "unseen"):
        for share in sorted(result.get("tasks", {}), key=int):
            rows.append(lines_of(f"21 tasks, {part} phrasings", ENCODERS[share], result["tasks"][share], part))
    lines = [
        "| searched | encoder trained on | scoring | @1 | @3 | @5 | @8 | @1 against untouched | log likelihood |",
        "|---|---|---|---|---|---|---|---|---|",
        *(line for lines in rows for line in lines),
    ]
    for name, shares in result["paper"].items():
        cells = [*(f"{share:.1f}" for share in shares), "", ""]
        lines.append(f"| *all test prompts* | *{name.removeprefix(PAPER)}* | *the paper's* | {' | '.join(cells)} |")
    return "\n".join(lines)


def lines_of(searched: str, title: str, entry: Mapping[str, Any], part: str) -> list[str]:
    """A line for each scoring under one encoder."""
    lines = []
    for scoring, parts in entry["scorings"].items():
        of = parts[part]
        cells = [f"{hit['share']:.1f}" for hit in of["hit"].values()]
        cells += [gain(of) if entry["training"] else "", f"{-of['nll']:.2f}"]
        lines.append(f"| {searched} | {title} | {scoring} | {' | '.join(cells)} |")
    return lines


def kinds() -> str:
    """One row a number of merged tasks and way to index them."""
    pools = results("several_kinds")["pools"]
    lines = [
        "| an adapter serves | indexed by | LoraRetriever's tasks | gains | 21 tasks: seen | gains | unseen | gains |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, title in SIZES.items():
        for way, flan48 in pools["flan48"][size]["ways"].items():
            tasks = pools["tasks"][size]["ways"][way]["parts"]
            found = (flan48["parts"]["all"], tasks["seen"], tasks["unseen"])
            cells = [cell for part in found for cell in (first(part), "" if way == "one centre" else gain(part))]
            lines.append(f"| {title} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def first(part: Mapping[str, Any]) -> str:
    """The share of prompts whose own adapter comes first."""
    return f"{part['hit']['1']['share']:.1f}"


def gain(part: Mapping[str, Any]) -> str:
    """What that share gains, with its paired 95 % interval."""
    of = part["gain"]["1"]
    return f"{of['points']:+.1f} [{of['low']:+.1f}, {of['high']:+.1f}]"


def dtypes() -> str:
    """What is found on LoraRetriever's tasks with the encoder in float32 and in bfloat16."""
    lines = ["| encoder in | scoring | @1 | @3 | @5 | @8 |", "|---|---|---|---|---|---|"]
    for dtype, name in {"float32": "retrieval_flan48", "bfloat16": "retrieval_flan48_bfloat16"}.items():
        found = results(name)
        for scoring in ("mean", "meaning", "edges", "hybrid"):
            hits = found["scorings"][scoring]["all"]["hit"].values()
            cells = " | ".join(f"{hit['share']:.1f} [{hit['low']:.1f}, {hit['high']:.1f}]" for hit in hits)
            lines.append(f"| {dtype} | {scoring} | {cells} |")
    return "\n".join(lines)


BLOCKS = {"encoder dtype": dtypes, "fine-tuned encoders": encoders, "several kinds": kinds}


def filled(text: str) -> str:
    """The text of the document with the tables made anew."""
    return fill(text, {name: make() for name, make in BLOCKS.items()})


def main() -> None:
    """Fill the document."""
    write_whole(DOCUMENT, filled(DOCUMENT.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
