"""The report: one HTML file that opens without a server, with tables, figures and how they came about."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from loracompose.durable import write_whole
from loracompose.evaluation import figures
from loracompose.evaluation.protocols import PROTOCOLS
from loracompose.evaluation.results import ProtocolResult, Results
from loracompose.evaluation.summary import Summary, interval, milliseconds, summarise

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>loracompose: leaderboard</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }}
h1, h2 {{ line-height: 1.2 }} h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #ccc }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e5e5e5 }}
th:first-child, td:first-child, td.text {{ text-align: left }} td small {{ color: #555 }}
figure {{ margin: 1.5rem 0; overflow-x: auto }} figcaption {{ color: #444 }} img {{ max-width: none }}
code {{ background: #f3f3f3; padding: 0 .25em }} nav a {{ margin-right: 1em }}
</style></head><body>
<h1>Which way of composing adapters helps?</h1>
{body}
</body></html>
"""

READING = """<p>Each score is the mean over tasks of the mean over rows, from 0 to 100. Brackets hold 95&nbsp;%
intervals of a bootstrap that draws rows anew within each task, the same rows for all methods. <i>% of oracle</i>: 0 is
the base model, 100 the row's own adapter. <i>hit</i> and <i>miss</i>: mean over the rows whose own adapter was, or was
not, found first, so that errors of retrieval and of composition can be told apart. <i>beats</i>, <i>loses to</i>: the
number of methods that differ by more than the paired interval. All methods of a protocol get the same retrieved sets.
<i>ms a prompt</i>: 16 tokens in one batch, adapters read and sets composed before, where methods were timed.
<i>MB added</i>: the ranks that ran for a prompt beside the base model, and what the composer has learned.</p>"""


def write_report(results: Results, file: str | Path) -> None:
    """Write the report, whole or not at all.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, html(results))


def html(results: Results) -> str:
    """The report as text."""
    summaries = [summarise(found) for found in results.protocols]
    links = "".join(f'<a href="#{escape(s.name)}">{escape(s.name)}</a>' for s in summaries)
    parts = [_settings(results), f"<nav>{links}</nav>", READING]
    parts += [_protocol(found, s) for found, s in zip(results.protocols, summaries, strict=True)]
    parts.append(_methods(results))
    return PAGE.format(body="\n".join(parts))


def _settings(results: Results) -> str:
    said = {**results.settings, "adapters": len(results.pool), **results.versions}
    items = " · ".join(f"{escape(str(key))} {escape(str(value))}" for key, value in said.items())
    return f"<p><small>{items}</small></p>"


def _protocol(found: ProtocolResult, summary: Summary) -> str:
    known = PROTOCOLS.get(found.name)
    about = f"{known.question}; " if known else ""
    drawings = [
        ("leaderboard with 95 % intervals", figures.leaderboard(summary)),
        ("score of every method on every task", figures.task_heat_map(summary)),
        ("row minus column, tasks won:lost; bold where the interval leaves out 0", figures.wins(summary)),
        ("adapter found first, by task", figures.confusion(found)),
    ]
    if any(line.ms is not None for line in summary.lines):
        drawings.append(("quality against cost", figures.quality_and_cost(summary)))
    return "\n".join(
        [
            f'<h2 id="{escape(found.name)}">{escape(found.name)}</h2>',
            f"<p>{about}{len(found.rows)} rows of {len(summary.scores.tasks)} tasks; the own adapter was found first "
            f"for {summary.found_first:.1f}&nbsp;%; {found.retrieval_ms:.0f} ms of retrieval a prompt.</p>",
            _table(summary),
            *(_drawing(f"{found.name}: {caption}", svg) for caption, svg in drawings),
        ]
    )


def _table(summary: Summary) -> str:
    heads = ("method", "score", "% of oracle", "hit", "miss", "ms a prompt", "MB added", "beats", "loses to")
    comparisons = summary.comparisons()
    rows = []
    for line in summary.lines:
        sure = [
            c.difference.value
            for (first, _), c in comparisons.items()
            if first == line.label and c.claimed.excludes_zero
        ]
        cells = (
            f"<code>{escape(line.label)}</code>",
            interval(line.score),
            "" if line.normalised is None else interval(line.normalised),
            "" if line.hit is None else f"{line.hit:.1f}",
            "" if line.miss is None else f"{line.miss:.1f}",
            milliseconds(line.ms),
            f"{line.added_bytes / 1e6:.2f}",
            str(sum(value > 0 for value in sure)),
            str(sum(value < 0 for value in sure)),
        )
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    return _grid(heads, rows)


def _methods(results: Results) -> str:
    composers = {method.label: method.composer for found in results.protocols for method in found.methods}
    rows = [
        f"<td><code>{escape(label)}</code></td><td class='text'><code>{escape(composer or 'none')}</code></td>"
        for label, composer in composers.items()
    ]
    return "<h2>Methods</h2>" + _grid(("label", "composer"), rows)


def _grid(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _drawing(caption: str, svg: str) -> str:
    # an image of its own, so that the identifiers inside two drawings cannot meet
    data = base64.b64encode(svg.encode()).decode()
    alt = escape(caption, quote=True)
    image = f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
