"""Write the tables of docs/learned_methods.md from the leaderboard and the shipped routers.

python benchmarks/learned_report.py
"""

from __future__ import annotations

import json
from pathlib import Path

from loracompose.evaluation.results import read_results
from loracompose.evaluation.statistics import Scores

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "learned_methods.md"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->"
UNIFORM = "mixture weighting=uniform"

CLAIMS = (
    ("finer gates beat equal weights (SMoRA's form for pools, at retrieval's weights)", "smora", UNIFORM),
    ("a learned rank gate beats the same weights without it", "smora", "mixture"),
    ("a router beats equal weights (RAMoLE)", "ramole", UNIFORM),
    ("a router beats equal weights (MoLE, a gate a block)", "mole", UNIFORM),
    ("a dynamic gate beats equal weights (LoRA-Flow)", "lora_flow", UNIFORM),
    ("a dynamic gate beats the best static choice (LoRA-Flow)", "lora_flow", "selection"),
    ("routing once a prompt beats equal weights (MiLoRA)", "milora", UNIFORM),
    ("gates trained adapter by adapter beat equal weights (PHATGOOSE)", "phatgoose", UNIFORM),
)


def report() -> str:
    """Both tables in Markdown."""
    lines = [
        "| router | steps | rows | parameters | seconds | dev loss, half-way and at the end |",
        "|---|---|---|---|---|---|",
    ]
    for file in sorted((ROOT / "index" / "routers").glob("*/router.json")):
        record = json.loads(file.read_text(encoding="utf-8"))["training"]
        losses = " → ".join(f"{loss:.2f}" for loss in record["dev_losses"].values())
        numbers = f"{record['steps']} | {record['examples']} | {record['parameters']:,} | {record['seconds']:.0f}"
        lines.append(f"| `{file.parent.name}` | {numbers} | {losses} |")
    found = read_results(ROOT / "benchmarks" / "results" / "leaderboard.json")
    scores = {
        protocol.name: Scores.of(
            [row.task for row in protocol.rows], {method.label: method.scores for method in protocol.methods}
        )
        for protocol in found.protocols
    }
    lines += ["", "| claim | " + " | ".join(f"{name}: gain [95 %]" for name in scores) + " | here |"]
    lines.append("|---" * (len(scores) + 2) + "|")
    for claim, method, other in CLAIMS:
        gaps = [protocol.difference(method, other).difference for protocol in scores.values()]
        cells = [f"{gap.value:+.1f} [{gap.low:.1f}, {gap.high:.1f}]" for gap in gaps]
        lines.append(f"| {claim} | {' | '.join(cells)} | {verdict(gaps)} |")
    return "\n".join(lines) + "\n"


def verdict(gaps: list) -> str:
    """Confirmed or refuted where every interval is on one side of 0, by a tenth of a point at least."""
    if all(gap.low > 0.1 for gap in gaps):
        return "confirmed"
    if all(gap.high < -0.1 for gap in gaps):
        return "refuted"
    return "undecided"


def main() -> None:
    """Put the tables between the marks."""
    text = DOCUMENT.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    DOCUMENT.write_text(head + BEGIN + report() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
