"""loracompose bench: crash, retrieval, scale; speed, composing and stream stand in `cli.speed`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from loracompose.cli import options, speed, tables
from loracompose.cli.errors import Commands
from loracompose.cli.quiet import quiet_loading
from loracompose.cli.retrieval_tables import retrieval_tables, rounded
from loracompose.durable import write_whole

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Measure, and write the numbers down.")


@app.callback()
def bench() -> None:
    """Measure, and write the numbers down."""


@app.command()
def crash(
    kills: Annotated[int, typer.Option(help="How often the process is killed.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the steps and of the kills by the call.")] = 0,
    by_clock: Annotated[float, typer.Option(help="Share of the kills after a random time, not before a call.")] = 0.5,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Kill a process that changes an index, and see whether the index is whole; status 1 if it was not once."""
    from rich.progress import Progress

    from loracompose.benchmarks.crash import crash_test

    with Progress(disable=as_json) as progress:
        task = progress.add_task("killing", total=kills)
        report = crash_test(kills, seed, by_clock=by_clock, tick=lambda: progress.advance(task))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, json.dumps(report.as_dict(), indent=2) + "\n")
    if as_json:
        tables.show_json(report.as_dict())
    else:
        tables.console().print(tables.crash_table(report))
    raise typer.Exit(1 if report.failures else 0)


@app.command()
def retrieval(
    data: Annotated[Path, typer.Option(help="profiles.jsonl with dev.jsonl, or <task>.train and .test.jsonl.")],
    examples: Annotated[int, typer.Option(help="Prompts of a profile, where profiles are drawn.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    encoder: Annotated[str | None, typer.Option(help="Sentence encoder; the default one if not given.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")] = None,
    figure: Annotated[Path | None, typer.Option(help="SVG or PNG file to draw.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure how often a prompt's own adapter is among the first k, by every channel and plainer ways."""
    from loracompose.benchmarks.retrieval import is_the_papers, measure
    from loracompose.benchmarks.retrieval_data import read_retrieval_data
    from loracompose.benchmarks.retrieval_figure import draw

    quiet_loading()
    found = read_retrieval_data(data, examples=examples, seed=seed)
    with tables.console().status(f"embedding {len(found.prompts):,} prompts"):
        result = measure(found, encoder, paper=is_the_papers(data))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, json.dumps(rounded(result), indent=1) + "\n")
    if figure is not None:
        draw(result, figure)
    if as_json:
        tables.show_json(result)
        return
    for made in retrieval_tables(result):
        tables.console().print(made)


@app.command()
def scale(
    profiles: Annotated[Path, typer.Argument(help="JSON lines with the adapter and prompt of real profiles.")],
    work: Annotated[Path, typer.Argument(help="Folder for the pools: about 12 GB for a million adapters.")],
    sizes: Annotated[list[int] | None, typer.Option("--size", help="Adapters; may be repeated.")] = None,
    keep: Annotated[
        bool, typer.Option(help="Leave the pools in the folder; those that are there are searched, not built.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to write; pools of other sizes in it stay.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="SVG file to draw; needs loracompose[bench].")] = None,
    table: Annotated[Path | None, typer.Option(help="Markdown file whose table of scale is made anew.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Build synthetic pools of growing size; time, memory and recall of searching and changing them."""
    from loracompose.benchmarks.scale import SIZES, measure, result_of
    from loracompose.benchmarks.scale_figure import draw
    from loracompose.benchmarks.scale_report import BLOCK, markdown
    from loracompose.marked import fill

    console = tables.console()
    pools, result = [], result_of([], output)
    for pool in measure(
        profiles, work, sizes or SIZES, keep=keep, tell=lambda text: None if as_json else console.print(text)
    ):
        pools.append(pool)
        result = result_of(pools, output)
        if output is not None:  # after each size, for the next takes long
            output.parent.mkdir(parents=True, exist_ok=True)
            write_whole(output, json.dumps(result, indent=1) + "\n")
    if figure is not None:
        draw(result, figure)
    if table is not None:
        write_whole(table, fill(table.read_text(encoding="utf-8"), {BLOCK: markdown(result)}))
    if as_json:
        tables.show_json(result)
        return
    for pool in pools:
        console.print(json.dumps(pool))


app.command()(speed.speed)
app.command()(speed.composing)
app.command()(speed.answers)
app.command()(speed.stream)
