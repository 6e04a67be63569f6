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
DOCUMENT = f"""# What moves the scores: settings, pool, seeds, ranks, one harmful adapter

One setting moves, all else stays, on the same rows ([sensitivity.json](../benchmarks/results/sensitivity.json); the
studies stand in `loracompose/evaluation/sensitivity.py`, `benchmarks/sensitivity.py` runs them). Sixteen rows of each of twelve
tasks (of five for the size of the pool), in bfloat16: bars and brackets are 95 % intervals of a bootstrap over rows, paired
where two points are compared; where fewer than 16 rows differ none is given, by the rule of [which_method.md](which_method.md).

- **How many adapters.** Where the prompt's own adapter is in the pool, every further one at equal weights costs, a second one
  most of all; the posterior's weights do not care how many are retrieved. Where it is not, more adapters help a little.
- **Ranks.** LEGO gains from ranks up to about 16, with and without the own adapter. How many ranks act on a token decides nothing.
- **Flat weights** (a high temperature) cost in-domain and nothing where the own adapter is hidden.
- **A harmful adapter whose card claims every task.** Random values of tenfold size, retrieved for the card, take most of
  what equal weights of three have, in-domain and masked; the posterior is not told apart in-domain, and masked loses as much as the others,
  where that card fits best. Weighing the whole pool equally is hardly hurt: it is one of 22. One that was trained on responses of
  other rows costs nothing in-domain; masked, `selection` and `mixture` lose to it.
- **Seeds.** Nine of the 21 adapters trained again, each from a seed of its own, where the others share their A at step 0: no method
  is told apart, those that add or cluster raw factors included.
- **Unequal ranks.** The pool has ranks 4, 8 and 16. *The same, by SVD*: every update as it is, its singular directions as ranks;
  *4 each*: the four largest of these alone. No method is told apart from itself on the pool as it is: what unequal ranks cost is
  too little to be seen here, even where A and B are added as they stand (`fusion`).

![scores along each axis](sensitivity.svg)

{marks(BLOCK)[0]}
{marks(BLOCK)[1]}
"""


def table(curves: list[Curve]) -> str:
    """One line a curve: its best and worst point, and the last against the first with the paired interval.

    Where the points have no order, each of the others is held against the first.
    """
    lines = ["| study | protocol | method | best at | worst at | against the first point |", "|---" * 6 + "|"]
    for curve in curves:
        found = list(zip(curve.points, curve.estimates(), strict=True))
        best, worst = max(found, key=lambda at: at[1].value), min(found, key=lambda at: at[1].value)
        first, *others = curve.points
        shown = others if any(isinstance(point, str) for point in others) else others[-1:]
        gaps = (f"{point} − {first}: {interval(curve.against(point, first).claimed)}" for point in shown)
        cells = (
            study_of(curve.study).axis,
            curve.protocol,
            curve.label,
            f"{best[0]}: {interval(best[1])}",
            f"{worst[0]}: {interval(worst[1])}",
            "<br>".join(gaps),
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
