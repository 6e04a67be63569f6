"""What people look at: tables and panels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Protocol

import typer
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from loracompose.benchmarks.crash import CrashReport
    from loracompose.retrieval.explanation import Explanation
    from loracompose.retrieval.verification import Problem
    from loracompose.trace import Generation

BAR = 12  # cells of a full weight bar


def console() -> Console:
    """Where commands print."""
    return Console(highlight=False, emoji=False)  # prompts and cards are shown as they are


def show_json(value: Any) -> None:
    """JSON on standard output, for machines."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> Table:
    """A plain table; `right` lists the columns that hold numbers."""
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def bar(weight: float) -> str:
    """A weight between 0 and 1 as a bar."""
    full = round(min(1.0, abs(weight)) * BAR)
    return f"[cyan]{'━' * full}[/][dim]{'─' * (BAR - full)}[/]"


def generation_panel(answer: Generation, number: int, explain: bool) -> Panel:
    """One answer: the prompt, the text, and which adapters made it."""
    prompt = answer.prompt if isinstance(answer.prompt, str) else answer.prompt[-1]["content"]
    parts: list[Any] = [Text(prompt, style="dim")]
    if explain:
        parts += [Text(), uses_table(answer), Text()]
    for text in answer.texts:
        parts.append(Text("→ ", style="bold green") + Text(text.strip(), style="bold"))
    parts += [Text(note, style="yellow") for note in answer.notes]
    return Panel(Group(*parts), title=f"[bold]{number}[/]", title_align="left", box=box.ROUNDED)


def uses_table(answer: Generation) -> Table | Text:
    """The adapters of one answer with score and weight."""
    if not answer.adapters:
        return Text("base model alone, no adapter", style="yellow")
    grid = Table(box=None, pad_edge=False, header_style="dim")
    grid.add_column("adapter", min_width=16)
    grid.add_column("score", justify="right")
    grid.add_column("weight", justify="right")
    grid.add_column("")
    for use in answer.adapters:
        score = "" if use.score is None else f"{use.score:.3f}"
        grid.add_row(escape(use.name), score, f"{use.weight:.3f}", bar(use.weight))
    return grid


def explanation_table(explanation: Explanation) -> Table:
    """Candidates with the share of each channel, the decisive one in bold, and what speaks for them.

    Where an adapter serves several kinds of prompt, its kind stands under its name.
    """
    channels = list(explanation.candidates[0].channels) if explanation.candidates else []
    rows = []
    for found in explanation.candidates:
        shares = [
            f"[bold]{share:+.2f}[/]" if name == found.decisive else f"{share:+.2f}"
            for name, share in found.channels.items()
        ]
        words = ", ".join(escape(text.replace("\n", "⏎")) for text in found.wordings)
        nearest = "\n".join(
            f"{near.similarity:.2f} {escape(shorten(near.prompt, 60, placeholder=' …'))}" for near in found.nearest
        )
        name = "\n".join(escape(text) for text in (found.card.name, found.kind) if text)
        rows.append((name, f"{found.probability:.3f}", *shares, words, nearest))
    title = f"{escape(explanation.prompt)}\ntypicality {explanation.typicality:.3f}"
    heads = ("adapter", "probability", *channels, "speaks for it", "nearest examples")
    return table(title, heads, rows, right=range(1, 2 + len(channels)))


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """The same for machines."""
    found = [
        {
            "name": candidate.card.name,
            "kind": candidate.kind,
            "score": candidate.score,
            "probability": candidate.probability,
            "channels": dict(candidate.channels),
            "decisive": candidate.decisive,
            "wordings": list(candidate.wordings),
            "nearest": [{"prompt": near.prompt, "similarity": near.similarity} for near in candidate.nearest],
        }
        for candidate in explanation.candidates
    ]
    return {"prompt": explanation.prompt, "typicality": explanation.typicality, "found": found}


def problem_table(title: str, problems: Iterable[Problem]) -> Table:
    """What is wrong with an index, or was, with what mends it."""
    rows = [(escape(p.adapter or "the index"), escape(p.what), escape(p.remedy)) for p in problems]
    return table(title, ("where", "what", "remedy"), rows)


def crash_table(report: CrashReport) -> Table:
    """What a crash test did, by the kind of step, and under it what failed."""
    rows = [
        (kind, str(done), str(report.in_flight[kind]), str(report.survived[kind]))
        for kind, done in report.acknowledged.items()
    ]
    heads = ("step", "acknowledged", "in flight when killed", "of these took effect")
    outcome = f"[bold red]{len(report.failures)} failures[/]" if report.failures else "[green]no failure[/]"
    made = table(f"{report.kills} kills, {report.operations} steps, {outcome}", heads, rows, right=(1, 2, 3))
    made.caption = "\n".join(escape(failure) for failure in report.failures)
    return made


class Trained(Protocol):
    """What every report of a training says."""

    @property
    def examples(self) -> int: ...  # noqa: D102
    @property
    def left_out(self) -> int: ...  # noqa: D102
    @property
    def losses(self) -> Sequence[float]: ...  # noqa: D102
    @property
    def dev_loss(self) -> float | None: ...  # noqa: D102


def examples_told(report: Trained, max_length: int) -> str:
    """How many examples a training saw, and how many were too long for it."""
    left = f", {report.left_out} longer than {max_length} tokens left out" if report.left_out else ""
    return f"{report.examples} examples{left}"


def losses_told(report: Trained) -> str:
    """The first and the last loss of a training, and the dev loss if there is one."""
    dev_loss = "" if report.dev_loss is None else f", dev loss {report.dev_loss:.3f}"
    return f"loss {report.losses[0]:.3f} → {report.losses[-1]:.3f}{dev_loss}"
