"""The leaderboard: what the results of a protocol say, as plain values, and as a table in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loracompose.evaluation.results import ProtocolResult, Results
from loracompose.evaluation.statistics import Comparison, Estimate, Scores

BLOCK = "leaderboard"  # of the document that the table stands in


@dataclass(frozen=True)
class Line:
    """A method's line.

    Attributes:
        label: its name.
        score: mean over tasks.
        normalised: 0 is the base, 100 the row's own adapter; None if these do not differ.
        hit: score on the rows whose own adapter was found first; None if there are none.
        miss: score on the others. Both are means over rows.
        ms: milliseconds a prompt; None if it was not timed.
        added_bytes: a prompt.
    """

    label: str
    score: Estimate
    normalised: Estimate | None
    hit: float | None
    miss: float | None
    ms: float | None
    added_bytes: int


@dataclass(frozen=True, eq=False)
class Summary:
    """A protocol's leaderboard, best first, with the scores behind it.

    Attributes:
        name: of the protocol.
        found_first: percent of rows whose own adapter was found first.
        lines: the methods.
        scores: of all rows and methods.
    """

    name: str
    found_first: float
    lines: tuple[Line, ...]
    scores: Scores

    def comparisons(self) -> dict[tuple[str, str], Comparison]:
        """Every method against every other, in the order of the lines."""
        labels = [line.label for line in self.lines]
        return {(a, b): self.scores.difference(a, b) for a in labels for b in labels if a != b}


def summarise(found: ProtocolResult) -> Summary:
    """The leaderboard of a protocol."""
    tasks = [row.task for row in found.rows]
    scores = Scores.of(tasks, {method.label: method.scores for method in found.methods})
    first = [place == 1 for place in found.place]
    lines = []
    for method in found.methods:
        hits = [score for score, hit in zip(method.scores, first, strict=True) if hit]
        misses = [score for score, hit in zip(method.scores, first, strict=True) if not hit]
        lines.append(
            Line(
                method.label,
                scores.score(method.label),
                scores.normalised(method.label) if {"base", "oracle"} <= set(scores.labels) else None,
                _mean(hits),
                _mean(misses),
                method.ms,
                method.added_bytes,
            )
        )
    lines.sort(key=lambda line: (-line.score.value if not math.isnan(line.score.value) else math.inf, line.label))
    return Summary(found.name, 100 * sum(first) / len(first), tuple(lines), scores)


def as_json(summaries: Sequence[Summary]) -> dict[str, Any]:
    """The leaderboards for readers of the JSON file, numbers rounded to hundredths."""
    return {
        summary.name: {
            "found_first": round(summary.found_first, 2),
            "methods": [_rounded(asdict(line)) for line in summary.lines],
        }
        for summary in summaries
    }


def markdown(results: Results, summaries: Sequence[Summary]) -> str:
    """One table over all protocols: the score with its interval, and the share of the oracle's gain."""
    settings = results.settings
    rows = f"{settings['rows_per_task']} rows" if settings["rows_per_task"] else "all rows"
    tasks = len(summaries[0].scores.tasks)
    heads = ["method"]
    for summary in summaries:
        heads += [f"{summary.name} score", "% of oracle"]
    order = [line.label for line in summaries[0].lines]
    lines = [f"| {' | '.join([*heads, 'ms a prompt', 'MB added'])} |", "|---" * (len(heads) + 2) + "|"]
    by_label = [{line.label: line for line in summary.lines} for summary in summaries]
    for label in order:
        cells = [f"`{label}`"]
        for table in by_label:
            cells += [interval(table[label].score), _share(table[label].normalised)]
        cost = by_label[0][label]
        lines.append(f"| {' | '.join([*cells, milliseconds(cost.ms), f'{cost.added_bytes / 1e6:.2f}'])} |")
    title = (
        f"Mean over {tasks} tasks, {rows} a task, greedy, {settings['base']} in {settings['dtype']}; in brackets the "
        "95 % interval of a paired bootstrap over rows. % of oracle: 0 is the base model, 100 the row's own adapter."
    )
    return "\n".join([title, "", *lines])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def interval(estimate: Estimate) -> str:
    """A number with its interval, if it has one."""
    ends = "" if math.isnan(estimate.low) else f" [{estimate.low:.1f}, {estimate.high:.1f}]"
    return f"{estimate.value:.1f}{ends}"


def milliseconds(ms: float | None) -> str:
    """A time without decimals, or nothing."""
    return "" if ms is None else f"{ms:.0f}"


def _share(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.0f}"


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(inside) for key, inside in value.items()}
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 2)
    return value
