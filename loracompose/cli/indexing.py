"""loracompose index build | add | remove | search | list | verify."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from loracompose.cli import options, tables
from loracompose.cli.errors import Commands
from loracompose.cli.quiet import quiet_loading

if TYPE_CHECKING:
    from loracompose.retrieval.explanation import Explanation

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Build, change and search an index of adapters.")
Folder = Annotated[Path, typer.Argument(help="Folder of the index.")]


@app.command()
def build(
    adapters: Annotated[Path, typer.Argument(help="Folder whose subfolders are adapters with a card.json.")],
    index: Folder,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the adapters into the index.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if an adapter cannot be taken.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing index.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Build an index from a folder of adapters; status 1 if it holds none that can be indexed."""
    from loracompose import AdapterIndex

    quiet_loading()
    made = AdapterIndex.build(adapters, index, copy=copy, strict=strict, overwrite=overwrite, progress=not as_json)
    skipped = dict(made.report.skipped) if made.report else {}
    if as_json:
        tables.show_json({"index": str(index), "added": [card.name for card in made.cards], "skipped": skipped})
    else:
        tables.console().print(f"{index}: {len(made)} adapters indexed from {adapters}")
        if skipped:
            rows = [(escape(n), escape(w)) for n, w in skipped.items()]
            tables.console().print(tables.table("left out", ("folder", "why"), rows))
    if not len(made):
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        typer.echo(f"nothing was indexed: {len(skipped)} subfolders looked at in {adapters}. {reasons}", err=True)
        raise typer.Exit(1)


@app.command()
def add(
    index: Folder,
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders.")],
    update: Annotated[bool, typer.Option("--update", help="Replace an adapter of the same name.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Add adapters to an index."""
    from loracompose import AdapterIndex

    quiet_loading()
    opened = AdapterIndex.open(index)
    cards = []
    for folder in adapters:
        card = opened.update(folder) if update and folder.resolve().name in opened else opened.add(folder)
        cards.append(card)
        if not as_json:
            tables.console().print(f"{index}: {escape(card.name)} added, fingerprint {card.fingerprint[:12]}")
    if as_json:
        tables.show_json([{"name": card.name, "fingerprint": card.fingerprint} for card in cards])


@app.command()
def remove(
    index: Folder,
    names: Annotated[list[str], typer.Argument(help="Names in the index.")],
    as_json: options.AsJson = False,
) -> None:
    """Remove adapters from an index; a record of the deletion stays."""
    from loracompose import AdapterIndex

    quiet_loading()
    opened = AdapterIndex.open(index)
    for name in names:
        opened.remove(name)
        if not as_json:
            tables.console().print(f"{index}: {escape(name)} removed")
    if as_json:
        tables.show_json({"removed": names})


@app.command()
def search(
    index: Folder,
    prompts: Annotated[list[str], typer.Argument(help="Prompts.")],
    k: Annotated[int, typer.Option("-k", help="Adapters per prompt.")] = 3,
    tag: Annotated[list[str] | None, typer.Option(help="Only adapters with this tag; may be repeated.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show why, channel by channel.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show the adapters that are found for prompts."""
    from loracompose import AdapterIndex

    quiet_loading()
    if explain:
        if tag:
            raise typer.BadParameter("--explain looks at all adapters; leave out --tag")
        _explain([AdapterIndex.open(index).explain(prompt, k) for prompt in prompts], as_json)
        return
    where = {"tags": tag} if tag else None
    found = AdapterIndex.open(index).search(prompts, k=k, where=where)
    hits = [found.for_prompt(i) for i in range(len(prompts))]
    if as_json:
        tables.show_json(
            [
                {"prompt": p, "found": [{"name": m.card.name, "score": m.score, "weight": m.weight} for m in row]}
                for p, row in zip(prompts, hits, strict=True)
            ]
        )
        return
    for prompt, row in zip(prompts, hits, strict=True):
        rows = [
            (escape(m.card.name), f"{m.score:.3f}", f"{m.weight:.3f}", tables.bar(m.weight), escape(m.card.description))
            for m in row
        ]
        heads = ("adapter", "score", "weight", "", "description")
        tables.console().print(tables.table(escape(prompt), heads, rows, right=(1, 2)))


def _explain(explanations: list[Explanation], as_json: bool) -> None:
    if as_json:
        tables.show_json([tables.explanation_json(explanation) for explanation in explanations])
        return
    for explanation in explanations:
        tables.console().print(tables.explanation_table(explanation))


@app.command(name="list")
def list_adapters(index: Folder, as_json: options.AsJson = False) -> None:
    """List the adapters of an index."""
    from loracompose import AdapterIndex

    quiet_loading()
    cards = AdapterIndex.open(index).cards
    if as_json:
        tables.show_json([{"name": c.name, "description": c.description, "tags": list(c.tags)} for c in cards])
        return
    rows = [(escape(c.name), ", ".join(c.tags), c.license, c.fingerprint[:12], escape(c.description)) for c in cards]
    heads = ("adapter", "tags", "license", "fingerprint", "description")
    tables.console().print(tables.table(f"{len(cards)} adapters", heads, rows))


@app.command()
def verify(index: Folder, as_json: options.AsJson = False) -> None:
    """Check that every adapter is there and unchanged, and that the search structure agrees with the catalog."""
    from loracompose import AdapterIndex

    quiet_loading()
    opened = AdapterIndex.open(index)
    report = opened.verify()
    if as_json:
        tables.show_json({"ok": report.ok, "problems": [asdict(problem) for problem in report.problems]})
    elif report.ok:
        tables.console().print(f"[green]ok[/] {index}: {len(opened)} adapters present and unchanged")
    else:
        rows = [(escape(p.adapter or "the index"), escape(p.what), escape(p.remedy)) for p in report.problems]
        tables.console().print(tables.table(f"{len(rows)} problems", ("where", "what", "remedy"), rows))
    raise typer.Exit(0 if report.ok else 1)
