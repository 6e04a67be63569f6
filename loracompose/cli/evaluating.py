"""loracompose eval make | run | report."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from loracompose.cli import options, tables
from loracompose.cli.errors import Commands
from loracompose.cli.options import DEFAULT_BASE
from loracompose.cli.quiet import quiet_loading

if TYPE_CHECKING:
    from loracompose.evaluation.results import Results
    from loracompose.evaluation.summary import Summary
    from loracompose.evaluation.tasks import TaskRow

METHODS = ("base", "oracle", "random", "uniform_all", "selection", "mixture", "mixture weighting=uniform")
PROTOCOLS = ("in-domain", "masked")
INTERRUPTED = 130

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Compare methods on tasks: make, run, report.")


@app.command()
def make(
    output: Annotated[Path, typer.Argument(help="Folder for TASK.SPLIT.jsonl.")],
    reasoning_gym: Annotated[
        str | None, typer.Option(help="Generators of reasoning-gym, such as leg_counting,spell_backward.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="A Hugging Face dataset: name on the Hub, or a folder.")] = None,
    config: Annotated[str | None, typer.Option(help="Of the dataset.")] = None,
    source_split: Annotated[
        str | None, typer.Option(help="As the dataset calls it; that of --split if left out.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Name of the task; that of its adapter.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Tasks of one kind share it; the task itself if left out.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="accuracy, token_f1, chrf, bleu or rougeL; accuracy if left out.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A phrasing with fields in braces, 'Review: {text}'; may be repeated.")
    ] = None,
    response: Annotated[
        str | None, typer.Option(help="The answer, with fields in braces; {label} if left out.")
    ] = None,
    split: Annotated[str, typer.Option(help="Splits to write.")] = "test",
    n: Annotated[int, typer.Option("-n", help="Rows of a task.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    as_json: options.AsJson = False,
) -> None:
    """Make task files from a public dataset or from reasoning-gym's generators."""
    from loracompose.evaluation.conversion import Recipe, from_dataset, from_reasoning_gym
    from loracompose.evaluation.tasks import write_tasks

    if (reasoning_gym is None) == (dataset is None):
        raise ValueError("say where tasks come from: either --reasoning-gym NAMES or --dataset NAME")
    rows: list[TaskRow] = []
    if dataset is None:
        of_dataset = {
            "--config": config,
            "--source-split": source_split,
            "--task": task,
            "--cluster": cluster,
            "--metric": metric,
            "--prompt": prompt or None,
            "--response": response,
        }
        if idle := [name for name, value in of_dataset.items() if value is not None]:
            raise ValueError(f"{', '.join(idle)}: only of --dataset; a generator of reasoning-gym brings its own")
        for name in str(reasoning_gym).split(","):
            rows += from_reasoning_gym(name.strip(), split, n, seed)
    elif task is None:
        raise ValueError("--dataset needs --task, the name of the task")
    else:
        recipe = Recipe(task, cluster or task, metric or "accuracy", tuple(prompt or ()), response or "{label}")
        rows += from_dataset(dataset, recipe, source_split or split, n, seed, config)
    files = write_tasks(rows, output, split)
    if as_json:
        tables.show_json({"rows": len(rows), "files": [str(file) for file in files]})
    else:
        tables.console().print(f"{len(rows)} rows in {', '.join(escape(str(file)) for file in files)}")


@app.command()
def run(
    tasks: Annotated[Path, typer.Argument(help="Folder of *.test.jsonl, or one JSONL file.")],
    index: Annotated[Path, typer.Option("--index", "-i", help="Folder of an index.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file of the results.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-x",
            help="A line of the table, such as 'lego k=5 weighting=uniform set.k=16' or 'smora router=FOLDER'; may "
            "be repeated, and adds to --plan.",
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="TOML with methods = [...], protocols = [...], rows, seed, max_new_tokens.")
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option("--protocol", "-p", help="in-domain, masked, cluster-masked, unseen or mixed; may be repeated."),
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="Rows of a task; 0 takes all.")] = None,
    only: Annotated[str | None, typer.Option(help="Names of tasks; all if not given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the rows drawn.")] = None,
    split: Annotated[str, typer.Option(help="Which files of the folder.")] = "test",
    cache: Annotated[
        Path | None, typer.Option(help="Answers kept between runs; beside the results if not given.")
    ] = None,
    base: options.Base = DEFAULT_BASE,
    batch_size: Annotated[int, typer.Option(help="Prompts that run together.")] = 32,
    timed_rows: Annotated[int, typer.Option(help="Rows each method is timed on, anew; 0 leaves times out.")] = 8,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Answer the tasks with every method and score the answers; an interrupted run continues where it stopped."""
    from loracompose.engine import Engine
    from loracompose.evaluation.cache import AnswerCache
    from loracompose.evaluation.harness import Plan, evaluate
    from loracompose.evaluation.protocols import get_protocol
    from loracompose.evaluation.results import write_results
    from loracompose.evaluation.specification import parse_methods
    from loracompose.evaluation.summary import as_json as summary_json
    from loracompose.evaluation.summary import summarise
    from loracompose.evaluation.tasks import read_tasks

    quiet_loading()
    said = read_plan(plan) if plan else {}
    rows = read_tasks(tasks, split)
    rows_per_task = said.get("rows", 5) if n is None else n
    lines = [*said.get("methods", () if method else METHODS), *(method or ())]
    chosen = Plan(
        methods=parse_methods(lines),
        protocols=tuple(get_protocol(name) for name in protocol or said.get("protocols", PROTOCOLS)),
        tasks=None if only is None else tuple(name.strip() for name in only.split(",")),
        n=rows_per_task or None,
        seed=said.get("seed", 0) if seed is None else seed,
        unseen_template=said.get("unseen_template", 5),
        max_new_tokens=said.get("max_new_tokens", 128),
        batch_size=batch_size,
        timed_rows=timed_rows,
    )
    shots, validation = (
        read_tasks(tasks, other) if other != split and tasks.is_dir() and list(tasks.glob(f"*.{other}.jsonl")) else ()
        for other in ("train", "dev")
    )
    kept = cache or output.with_suffix(".answers.sqlite")
    with Engine.from_pretrained(base, index=index, device=device, dtype=dtype) as engine, AnswerCache(kept) as answers:
        try:
            results = evaluate(engine, rows, chosen, answers, shots, progress=not as_json, validation=validation)
        except KeyboardInterrupt:
            typer.echo(f"interrupted: {len(answers)} answers are kept in {kept}; run it again to continue", err=True)
            raise typer.Exit(INTERRUPTED) from None
    summaries = [summarise(found) for found in results.protocols]
    write_results(results, output, summary_json(summaries))
    _show(results, summaries, as_json)
    if not as_json:
        tables.console().print(f"{escape(str(output))}; answers in {escape(str(kept))}")


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="JSON file that `eval run` wrote.")],
    html: Annotated[Path | None, typer.Option(help="Write one HTML file with tables and figures.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Put the table between the markers of this document.")] = None,
    block: Annotated[str, typer.Option(help="Name of the block that --readme fills.")] = "leaderboard",
    guide: Annotated[Path | None, typer.Option(help="Fill the blocks of this document: which method when.")] = None,
    curves: Annotated[
        list[Path] | None, typer.Option(help="JSON file of sensitivity studies, for --guide; may be repeated.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show results, write the HTML report, or bring the tables of documents up to date."""
    from loracompose.durable import write_whole
    from loracompose.evaluation import guide as choosing
    from loracompose.evaluation.report import write_report
    from loracompose.evaluation.results import read_results
    from loracompose.evaluation.sensitivity import read_curves
    from loracompose.evaluation.summary import markdown, summarise
    from loracompose.marked import fill

    if curves and guide is None:
        raise ValueError("--curves go into the document of --guide: say which")
    found = read_results(results)
    summaries = [summarise(protocol) for protocol in found.protocols]
    if html is not None:
        write_report(found, html)
    if readme is not None:
        document = readme.read_text(encoding="utf-8")
        write_whole(readme, fill(document, {block: markdown(found, summaries)}))
    if guide is not None:
        blocks = choosing.guide(found, [curve for file in curves or () for curve in read_curves(file)[1]])
        write_whole(guide, fill(guide.read_text(encoding="utf-8"), blocks))
    _show(found, summaries, as_json)
    if not as_json:
        for file in (html, readme, guide):
            if file is not None:
                tables.console().print(f"written: {escape(str(file))}")


def read_plan(file: Path) -> dict[str, Any]:
    """The settings of a TOML file.

    Raises:
        ValueError: it is no TOML, or has a key that means nothing here.
    """
    known = ("methods", "protocols", "rows", "seed", "unseen_template", "max_new_tokens")
    try:
        said = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is no TOML: {error}") from error
    if unknown := [key for key in said if key not in known]:
        raise ValueError(f"{file} has the key {unknown[0]!r}; a plan has {', '.join(known)}")
    return said


def _show(results: Results, summaries: list[Summary], as_json: bool) -> None:
    from loracompose.evaluation.summary import as_json as summary_json
    from loracompose.evaluation.summary import interval, milliseconds

    if as_json:
        tables.show_json(summary_json(summaries))
        return
    out = tables.console()
    for found, summary in zip(results.protocols, summaries, strict=True):
        rows = [
            (
                escape(line.label),
                escape(interval(line.score)),
                "" if line.normalised is None else f"{line.normalised.value:.0f}",
                milliseconds(line.ms),
                f"{line.added_bytes / 1e6:.2f}",
            )
            for line in summary.lines
        ]
        title = f"{found.name}: {len(found.rows)} rows of {len(summary.scores.tasks)} tasks, own adapter found first "
        heads = ("method", "score", "% of oracle", "ms a prompt", "MB added")
        out.print(tables.table(f"{title}{summary.found_first:.0f} %", heads, rows, right=(1, 2, 3, 4)))
