"""Write the tables of docs/learned_methods.md from the leaderboard and the shipped routers.

python benchmarks/learned_report.py [LEADERBOARD.json]
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from loracompose.durable import write_whole
from loracompose.evaluation.guide import LEAST
from loracompose.evaluation.results import read_results
from loracompose.evaluation.statistics import Estimate, Scores
from loracompose.marked import fill

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "learned_methods.md"
LEADERBOARD = ROOT / "benchmarks" / "results" / "leaderboard.json"
BLOCK = "results"
UNIFORM = "mixture weighting=uniform"

ROUTERS = (
    ("gates per rank (SMoRA's form for pools)", "smora"),
    ("a router per token (RAMoLE)", "ramole"),
    ("a gate a block (MoLE)", "mole"),
    ("a dynamic gate per layer (LoRA-Flow)", "lora_flow"),
    ("routing once a prompt (MiLoRA)", "milora"),
    ("gates trained adapter by adapter (PHATGOOSE)", "phatgoose"),
    ("one learned weight a module (CAT)", "cat"),
    ("a head on the base's states (X-LoRA)", "xlora"),
)
CLAIMS = (
    *((f"{what} beats equal weights, on equal sets", f"{name} weighting=uniform", UNIFORM) for what, name in ROUTERS),
    *((f"{what} beats the posterior's weights, on its sets", name, "mixture") for what, name in ROUTERS),
    ("a dynamic gate beats the best static choice (LoRA-Flow)", "lora_flow", "selection"),
)

WITHOUT_LEARNING = (
    ("sharp weights beat equal weights (posterior)", "mixture", UNIFORM),
    (
        "weights by similarity beat equal weights (LORAUTER's, on the shared sets)",
        "mixture weighting=lorauter",
        UNIFORM,
    ),
    ("tasks known by validation rows route better than adapters by examples (LORAUTER in full)", "lorauter", "mixture"),
    (
        "composing several beats the best one alone (LoraRetriever's mixture, here by the posterior)",
        "mixture",
        "selection",
    ),
    ("adding outputs beats averaging factors (LoraRetriever: mixture over fusion)", "mixture", "fusion"),
    ("clustering ranks beats averaging factors (LoRA-LEGO)", "lego", "fusion"),
    ("clustering ranks beats the plain sum (LoRA-LEGO)", "lego", "mixture"),
    ("few active ranks lose nothing (rank gating)", "rank_gating", "mixture"),
    ("routing tokens by singular directions beats equal weights (Arrow)", "arrow weighting=uniform", UNIFORM),
    ("retrieval beats the mean of the whole pool", "mixture", "uniform_all"),
    ("separate adapters, composed, beat one trained on all tasks", "mixture", "multi_task"),
    ("an adapter retrieved beats three solved examples in the prompt", "selection", "few_shot"),
    ("trimming and electing signs beats the plain sum (TIES, equal weights)", "ties weighting=uniform", UNIFORM),
    ("dropping and rescaling beats the plain sum (DARE, equal weights)", "dare weighting=uniform", UNIFORM),
    ("trimming alone beats the plain sum (equal weights)", "magnitude_prune weighting=uniform", UNIFORM),
    (
        "aligning by a common SVD beats TIES alone (KnOTS, equal weights)",
        "knots weighting=uniform",
        "ties weighting=uniform",
    ),
)


def report(leaderboard: Path = LEADERBOARD) -> str:
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
    found = read_results(leaderboard)
    scores = {
        protocol.name: Scores.of(
            [row.task for row in protocol.rows], {method.label: method.scores for method in protocol.methods}
        )
        for protocol in found.protocols
    }
    lines += ["", *claims(CLAIMS, scores), "", "Methods that learn nothing, by the same rule:", ""]
    return "\n".join([*lines, *claims(WITHOUT_LEARNING, scores)])


def claims(said: tuple[tuple[str, str, str], ...], scores: dict[str, Scores]) -> list[str]:
    """A table of claims whose two methods were both measured."""
    lines = ["| claim | " + " | ".join(f"{name}: gain [95 %]" for name in scores) + " | here |"]
    lines.append("|---" * (len(scores) + 2) + "|")
    for claim, method, other in said:
        if any({method, other} - set(protocol.labels) for protocol in scores.values()):
            continue
        gaps = {name: protocol.difference(method, other).claimed for name, protocol in scores.items()}
        cells = [
            f"{gap.value:+.1f}" if math.isnan(gap.low) else f"{gap.value:+.1f} [{gap.low:.1f}, {gap.high:.1f}]"
            for gap in gaps.values()
        ]
        lines.append(f"| {claim} | {' | '.join(cells)} | {verdict(gaps)} |")
    return lines


def verdict(gaps: dict[str, Estimate]) -> str:
    """Confirmed or refuted, protocol by protocol, where an interval is on one side of 0 by more than `LEAST`.

    There is no interval where fewer than 16 rows differ.
    """
    words = {
        name: "confirmed" if gap.low > LEAST else "refuted" if gap.high < -LEAST else "undecided"
        for name, gap in gaps.items()
    }
    said = set(words.values())
    return said.pop() if len(said) == 1 else ", ".join(f"{word} {name}" for name, word in words.items())


def main() -> None:
    """Put the tables between the marks."""
    text = DOCUMENT.read_text(encoding="utf-8")
    write_whole(DOCUMENT, fill(text, {BLOCK: report(*map(Path, sys.argv[1:]))}))


if __name__ == "__main__":
    main()
