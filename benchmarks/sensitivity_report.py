"""Draw docs/sensitivity.svg and write docs/sensitivity.md from benchmarks/results/sensitivity.json.

python benchmarks/sensitivity_report.py

What stands in the document outside of its two marks is left as it is.
"""

# ruff: noqa: E501  lines of a document are as long as they are

from __future__ import annotations

from pathlib import Path

from loracompose.durable import write_whole
from loracompose.evaluation.sensitivity import STUDIES, Curve, read_curves, study_of
from loracompose.evaluation.sensitivity_figure import sensitivity
from loracompose.evaluation.summary import interval
from loracompose.marked import fill, marks

ROOT = Path(__file__).parent.parent
BLOCK = "sensitivity"
DOCUMENT = f"""# What moves the scores: settings, pool, seeds, one harmful adapter

One setting moves, all else stays, on the same rows ([sensitivity.json](../benchmarks/results/sensitivity.json); the
studies stand in `loracompose/evaluation/sensitivity.py`, `benchmarks/sensitivity.py` runs them). Two rows of each of twelve
tasks (five for the size of the pool), in bfloat16: bars and brackets are 95 % intervals of a bootstrap over rows, paired
where two points are compared. That is few: fewer than 16 rows differ between most points, and by the rule of
[which_method.md](which_method.md) nothing is decided then. So these curves point somewhere and prove little. In-domain a
second adapter at equal weights halves the score (on 11 rows that differ), where the posterior's weights do not care how
many are retrieved; one random adapter of tenfold size, retrieved for its card, takes most of what methods that weigh
retrieved adapters equally have (8 rows), where the posterior loses little in-domain; masked it seems to harm all that
retrieve, since its card claims the task. *Own seeds*: nine of the 21 adapters trained again, each from a seed of its own,
where the others share their A at step 0; whether that helps methods that add or cluster raw factors is not shown: few
rows differ, and the signs disagree with [lego_units.md](lego_units.md). The harmful adapter claims every task in its
card; its values are random and ten times as large as another's, or it was trained on responses of other rows. The curves
of `lego` were measured with output reweighting (a factor √(r/k)), which it has since only where every cluster counts
once: with few ranks kept its updates were larger, and with many smaller, than they would be now.

![scores along each axis](sensitivity.svg)

{marks(BLOCK)[0]}
{marks(BLOCK)[1]}
"""


def table(curves: list[Curve]) -> str:
    """One line a curve: its best and worst point, and the last against the first with the paired interval."""
    lines = ["| study | protocol | method | best at | worst at | last point against the first |", "|---" * 6 + "|"]
    for curve in curves:
        found = list(zip(curve.points, curve.estimates(), strict=True))
        best, worst = max(found, key=lambda at: at[1].value), min(found, key=lambda at: at[1].value)
        ends = curve.against(curve.points[-1], curve.points[0]).claimed
        cells = (
            study_of(curve.study).axis,
            curve.protocol,
            curve.label,
            f"{best[0]}: {interval(best[1])}",
            f"{worst[0]}: {interval(worst[1])}",
            f"{curve.points[-1]} − {curve.points[0]}: {interval(ends)}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Draw and write."""
    _, curves = read_curves(ROOT / "benchmarks" / "results" / "sensitivity.json")
    write_whole(ROOT / "docs" / "sensitivity.svg", sensitivity(curves, STUDIES))
    document = ROOT / "docs" / "sensitivity.md"
    text = document.read_text(encoding="utf-8") if document.exists() else DOCUMENT
    write_whole(document, fill(text, {BLOCK: table(curves)}))


if __name__ == "__main__":
    main()
