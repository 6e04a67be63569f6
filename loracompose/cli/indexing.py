"""loracompose index build | add | remove | search | list | verify | compact | snapshot | restore."""

from __future__ import annotations

from collections.abc import Sequence
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
    from loracompose.retrieval.verification import Problem, VerifyReport

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Build, change and search an index of adapters.")
Folder = Annotated[Path, typer.Argument(help="Folder of the index.")]


@app.command()
def build(
    adapters: Annotated[Path, typer.Argument(help="Folder whose subfolders are adapters with a card.json.")],
    index: Folder,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the adapters into the index.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if an adapter cannot be taken.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing index.")] = False,
    encoder: Annotated[
        str | None,
        typer.Option(help="Sentence encoder, a folder or a Hub name; NAME:bfloat16, or :bfloat16 for the default one."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Build an index from a folder of adapters; status 1 if it holds none that can be indexed."""
    from loracompose import AdapterIndex

    quiet_loading()
    made = AdapterIndex.build(
        adapters, index, embedder=encoder, copy=copy, strict=strict, overwrite=overwrite, progress=not as_json
    )
    skipped = dict(made.report.skipped) if made.report else {}
    if as_json:
        tables.show_json({"index": str(index), "added": [card.name for card in made.cards], "skipped": skipped})
    else:
        tables.console().print(
            f"{escape(str(index))}: {len(made)} adapters indexed from {escape(str(adapters))}", soft_wrap=True
        )
        if made.report and made.report.resumed:
            tables.console().print(
                f"{made.report.resumed} of them had been embedded by a build that was interrupted", soft_wrap=True
            )
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
    from loracompose.retrieval.admission import absolute

    quiet_loading()
    opened = AdapterIndex.open(index)
    cards = []
    for folder in adapters:
        known = absolute(folder).name in opened
        card = opened.update(folder) if update and known else opened.add(folder)
        cards.append(card)
        if not as_json:
            tables.console().print(
                f"{escape(str(index))}: {escape(card.name)} added, fingerprint {card.fingerprint[:12]}", soft_wrap=True
            )
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

    opened = AdapterIndex.open(index)
    for name in names:
        opened.remove(name)
        if not as_json:
            tables.console().print(f"{escape(str(index))}: {escape(name)} removed", soft_wrap=True)
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

    cards = AdapterIndex.open(index).cards
    if as_json:
        tables.show_json([{"name": c.name, "description": c.description, "tags": list(c.tags)} for c in cards])
        return
    rows = [
        (*map(escape, (c.name, ", ".join(c.tags), c.license)), c.fingerprint[:12], escape(c.description)) for c in cards
    ]
    heads = ("adapter", "tags", "license", "fingerprint", "description")
    tables.console().print(tables.table(f"{len(cards)} adapters", heads, rows))


@app.command()
def verify(
    index: Folder,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be derived again or found.")] = False,
    look_in: Annotated[
        list[Path] | None,
        typer.Option(help="With --repair: a folder of adapters that may have moved; may be repeated."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Check every adapter and everything derived from it by content; status 1 if something is wrong, still."""
    from loracompose import AdapterIndex
    from loracompose.retrieval.verification import VerifyReport

    if look_in and not repair:
        raise typer.BadParameter("--look-in belongs to --repair")
    quiet_loading()
    with AdapterIndex.open(index) as opened:
        repaired = opened.repair(look_in=look_in or ()) if repair else None
        report = VerifyReport(len(opened), repaired.remaining) if repaired else opened.verify()
    _show_problems(str(index), report, repaired.mended if repaired else (), as_json)


@app.command()
def compact(index: Folder, as_json: options.AsJson = False) -> None:
    """Give back the space of what was removed, and of what a killed process left."""
    from loracompose import AdapterIndex

    with AdapterIndex.open(index) as opened:
        report = opened.compact()
    if as_json:
        tables.show_json(asdict(report))
        return
    sizes = f"{report.bytes_before / 1e6:.1f} MB before, {report.bytes_after / 1e6:.1f} MB now"
    tables.console().print(f"{escape(str(index))}: {sizes}, {len(report.deleted)} leftovers deleted", soft_wrap=True)


@app.command()
def snapshot(
    index: Folder,
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    as_json: options.AsJson = False,
) -> None:
    """Copy an index as it is at one moment, while others use it; status 1 if a copied adapter was gone."""
    from loracompose import AdapterIndex

    with AdapterIndex.open(index) as opened:
        report = opened.snapshot(folder)
    if as_json:
        tables.show_json({**asdict(report), "folder": str(report.folder)})
    else:
        tables.console().print(
            f"{escape(str(folder))}: {report.adapters} adapters, {report.bytes / 1e6:.1f} MB", soft_wrap=True
        )
    for name in report.missing:
        typer.echo(f"{name} is recorded, but its copy in the index is gone: loracompose index verify {index}", err=True)
    raise typer.Exit(1 if report.missing else 0)


@app.command()
def restore(
    folder: Annotated[Path, typer.Argument(help="Folder of a snapshot.")],
    index: Annotated[Path, typer.Argument(help="Folder of the index, which is replaced if it is there.")],
    as_json: options.AsJson = False,
) -> None:
    """Put the index of a snapshot in its place once the snapshot is proved whole."""
    from loracompose import AdapterIndex

    report = AdapterIndex.restore(folder, index)
    _show_problems(str(index), report, (), as_json)


def _show_problems(index: str, report: VerifyReport, mended: Sequence[Problem], as_json: bool) -> None:
    if as_json:
        lists = {"problems": report.problems, **({"mended": mended} if mended else {})}
        found = {name: [asdict(problem) for problem in problems] for name, problems in lists.items()}
        tables.show_json({"ok": report.ok, **found})
    else:
        if mended:
            tables.console().print(tables.problem_table(f"{len(mended)} mended", mended))
        if report.ok:
            tables.console().print(
                f"[green]ok[/] {escape(index)}: {report.checked} adapters present and unchanged", soft_wrap=True
            )
        else:
            tables.console().print(tables.problem_table(f"{len(report.problems)} problems", report.problems))
    raise typer.Exit(0 if report.ok else 1)
