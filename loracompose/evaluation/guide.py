"""Which method when: what the results of an evaluation say for somebody who has to choose, as Markdown.

A document holds one block per table, between the marks of its name (`marked.fill`); every number is made from results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loracompose.composers import COMPOSERS
from loracompose.evaluation.protocols import PROTOCOLS
from loracompose.evaluation.results import Results
from loracompose.evaluation.sensitivity import Curve
from loracompose.evaluation.statistics import Estimate
from loracompose.evaluation.summary import Line, Summary, interval, milliseconds, summarise

# Not to be chosen: no adapter, told the task, trained on rows of all tasks, or blind.
REFERENCES = ("base", "oracle", "few_shot", "lorahub", "multi_task", "random")
PLAIN = "selection"  # what every method has to beat
LEAST = 0.05  # points; smaller gains are shown as 0.0
QUESTIONS = (
    ("the first adapter found, against the base alone", "selection", "base"),
    ("a sum by probability, against the first adapter alone", "mixture", "selection"),
    ("weights by probability, against equal weights", "mixture", "mixture weighting=uniform"),
    (
        "flatter weights for unusual prompts (cautious), against probability",
        "mixture weighting=cautious",
        "mixture",
    ),
    (
        "flatter weights for unusual prompts, against the first adapter alone",
        "mixture weighting=cautious",
        "selection",
    ),
    ("weights by LORAUTER's softmax of cosines, against probability", "mixture weighting=lorauter", "mixture"),
    ("LORAUTER whole, against retrieval and weights by probability", "lorauter", "mixture"),
    ("clustering ranks (LEGO), against summing them", "lego", "mixture"),
    ("clustering ranks, against summing them, equal weights", "lego weighting=uniform", "mixture weighting=uniform"),
    ("averaging A and B apart (fusion), against summing updates", "fusion", "mixture"),
    ("re-compressing the sum to one adapter's rank (linear)", "linear", "mixture"),
    ("8 ranks a token (rank_gating), against all", "rank_gating", "mixture"),
    ("LoRA-Flow's gates on probability's sets, against its weights", "lora_flow", "mixture"),
    ("RAMoLE's router on probability's sets, against its weights", "ramole", "mixture"),
    ("MoLE's gates on probability's sets, against its weights", "mole", "mixture"),
    ("MiLoRA's routing on probability's sets, against its weights", "milora", "mixture"),
    ("PHATGOOSE's gates on probability's sets, against its weights", "phatgoose", "mixture"),
    ("SMoRA's gate at weights by probability, against no gate", "smora", "mixture"),
    ("all adapters of the pool equally, against the first one found", "uniform_all", "selection"),
    ("LoraHub's weights, searched on five rows of the task, against equal ones", "lorahub", "uniform_all"),
)


@dataclass(frozen=True)
class Traits:
    """What a method is, whatever it scores.

    Attributes:
        exports: whether the composition of one prompt is a plain LoRA; None for what composes nothing.
        learns: whether it runs a router that must be trained.
    """

    exports: bool | None
    learns: bool


def traits(label: str) -> Traits:
    """The traits of a method by the first word of its label; a baseline sums adapters, which exports."""
    name = label.split()[0]
    composer = COMPOSERS.get(name)
    if composer is None:
        return Traits(exports=None if name in ("base", "few_shot") else True, learns=False)
    return Traits(composer.scope == "static", hasattr(composer, "initial"))


def guide(results: Results, curves: Sequence[Curve] = ()) -> dict[str, str]:
    """Block name -> Markdown.

    Args:
        results: of the leaderboard.
        curves: of the sensitivity studies; none if they were not made.
    """
    summaries = [summarise(found) for found in results.protocols]
    return {
        "setting": setting(results, summaries),
        "choices": "\n".join(choice(summary) for summary in summaries),
        "questions": questions(summaries),
        "methods": methods(summaries),
        "sensitivity": sensitivity(curves),
    }


def setting(results: Results, summaries: Sequence[Summary]) -> str:
    """What was measured, in a sentence."""
    said = results.settings
    rows = f"{said['rows_per_task']} rows each" if said["rows_per_task"] else "all their rows"
    base = str(said["base"]).rpartition("/")[2]
    return (
        f"Measured on {len(summaries[0].scores.tasks)} tasks, {rows}, in a pool of {len(results.pool)} adapters for "
        f"{base} in {said['dtype']}, greedy decoding. Scores are means over tasks, from 0 to 100, with 95 % intervals; "
        "comparisons are paired by row."
    )


def choice(summary: Summary) -> str:
    """A protocol's best method, those that cannot be told from it, and the least of these."""
    lines = [line for line in summary.lines if line.label.split()[0] not in REFERENCES]
    known = PROTOCOLS.get(summary.name)
    heading = f"- **{summary.name}**{f' ({known.question})' if known else ''}: "
    if not lines:
        return f"{heading}nothing but references was asked."
    best = lines[0]
    alike = [best, *(line for line in lines[1:] if not _apart(summary, best.label, line.label))]
    least = min(alike, key=_cost)
    said = [f"best is `{best.label}`, {interval(best.score)}"]
    others = [f"`{line.label}`" for line in alike[1:]]
    said.append(f"not told apart from it: {', '.join(others)}" if others else "every other method is behind it")
    if len(alike) > 1:
        said.append(f"of these `{least.label}` costs least, {_said_cost(least)}")
    exported = next((line for line in lines if traits(line.label).exports), None)
    if exported is not None and exported is not best:
        said.append(f"the best that exports is `{exported.label}`, {interval(exported.score)}")
    if {"base", "oracle"} <= set(summary.scores.labels):
        ends = [interval(summary.scores.score(label)) for label in ("base", "oracle")]
        said.append(f"the base alone has {ends[0]}, the own adapter {ends[1]}")
    return f"{heading}{'; '.join(said)}."


def questions(summaries: Sequence[Summary]) -> str:
    """Pairs of methods that differ in one decision: what it gains under each protocol."""
    heads = ["decision", *(f"{summary.name}: gain [95 %]" for summary in summaries), "says"]
    rows = []
    for text, method, other in QUESTIONS:
        if not all({method, other} <= set(summary.scores.labels) for summary in summaries):
            continue
        gains = [summary.scores.difference(method, other).claimed for summary in summaries]
        rows.append([text, *map(_gain, gains), verdict(gains)])
    return _table(heads, rows)


def verdict(gains: Sequence[Estimate]) -> str:
    """What paired differences under several protocols say together."""
    helps = any(gain.low > LEAST for gain in gains)
    hurts = any(gain.high < -LEAST for gain in gains)
    if helps and hurts:
        return "depends"
    if not helps and not hurts:
        return "undecided"
    return "helps" if helps else "hurts"


def methods(summaries: Sequence[Summary]) -> str:
    """Every method with its scores, its cost and what it is; ▲ and ▼ where it is above or below `selection`."""
    heads = ["method", *(summary.name for summary in summaries), "ms a prompt", "MB added", "exports", "learns"]
    rows = []
    for line in summaries[0].lines:
        scores = [f"{interval(summary.scores.score(line.label))}{_mark(summary, line.label)}" for summary in summaries]
        what = traits(line.label)
        cost = [milliseconds(line.ms), f"{line.added_bytes / 1e6:.2f}"]
        rows.append([f"`{line.label}`", *scores, *cost, _yes(what.exports), _yes(what.learns)])
    return _table(heads, rows)


def sensitivity(curves: Sequence[Curve]) -> str:
    """Each curve with its score at every point, and whether its best and its worst point can be told apart."""
    if not curves:
        return "Not measured yet."
    heads = ["study", "protocol", "method", "score at each point", "best against worst"]
    rows = []
    for curve in curves:
        values = {point: found.value for point, found in zip(curve.points, curve.estimates(), strict=True)}
        best, worst = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
        shown = " · ".join(f"{point}: {value:.1f}" for point, value in values.items())
        gap = _gain(curve.against(best, worst).claimed) if best != worst else "the same"
        rows.append([curve.study, curve.protocol, f"`{curve.label}`", shown, gap])
    return _table(heads, rows)


def _apart(summary: Summary, label: str, other: str) -> bool:
    gap = summary.scores.difference(label, other).claimed
    return gap.low > LEAST or gap.high < -LEAST


def _mark(summary: Summary, label: str) -> str:
    if PLAIN not in summary.scores.labels or label == PLAIN or not _apart(summary, label, PLAIN):
        return ""
    return " ▲" if summary.scores.difference(label, PLAIN).difference.value > 0 else " ▼"


def _cost(line: Line) -> tuple[bool, float, float, str]:
    """Sort key: what need not be trained first, then bytes, then time."""
    return traits(line.label).learns, line.added_bytes, line.ms or 0.0, line.label


def _said_cost(line: Line) -> str:
    time = "" if line.ms is None else f" and {milliseconds(line.ms)} ms"
    return f"{line.added_bytes / 1e6:.2f} MB{time} a prompt"


def _gain(gap: Estimate) -> str:
    value, low, high = (round(number, 1) + 0.0 for number in (gap.value, gap.low, gap.high))  # no -0.0
    return f"{value:+.1f}" if math.isnan(low) else f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
