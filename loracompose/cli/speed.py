"""loracompose bench speed, composing, answers, stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from loracompose.benchmarks.written import significant, write_result
from loracompose.cli import options, tables
from loracompose.cli.quiet import quiet_loading

Output = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")]
Rounds = Annotated[int, typer.Option(help="Measurements of each way.")]
Figure = Annotated[Path | None, typer.Option(help="SVG or PNG file to draw; needs loracompose[bench].")]


def speed(
    base: options.Base = options.DEFAULT_BASE,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    case: Annotated[list[str] | None, typer.Option("--case", help="A case by its name; may be repeated.")] = None,
    rounds: Rounds = 7,
    slow: Annotated[
        bool, typer.Option(help="Time also what runs row by row, and PEFT's SVD, on the first case.")
    ] = True,
    output: Output = None,
    figure: Figure = None,
    as_json: options.AsJson = False,
) -> None:
    """Time a batch of different compositions beside the base model, PEFT's ways and the paper's own code."""
    from loracompose.benchmarks.speed.figure import draw
    from loracompose.benchmarks.speed.measure import CASES, Setting, measure
    from loracompose.models import load_base

    quiet_loading()
    if unknown := sorted(set(case or ()) - set(CASES)):
        raise LookupError(f"no case is called {', '.join(unknown)}; there are: {'; '.join(CASES)}")
    cases = {name: CASES[name] for name in case} if case else CASES
    opened = load_base(base, device=device, dtype=dtype)
    result = measure(opened, cases, Setting(rounds, slow), _tell(as_json), lambda found: _write(found, output))
    if figure is not None:
        draw(result, figure)
    _deliver(result, output, as_json, [speed_table(name, found) for name, found in result["cases"].items()])


def answers(
    index: Annotated[Path, typer.Argument(help="Folder of an index whose cards have examples.")],
    base: options.Base = options.DEFAULT_BASE,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    composer: Annotated[list[str] | None, typer.Option("--composer", "-c", help="A composer; may be repeated.")] = None,
    k: Annotated[int, typer.Option("-k", help="Adapters of a prompt, at equal weights.")] = 3,
    rows: Annotated[int, typer.Option(help="Prompts that run together.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 64,
    rounds: Rounds = 7,
    output: Output = None,
    figure: Figure = None,
    as_json: options.AsJson = False,
) -> None:
    """Time what an answer is made of: finding adapters, composing them, and the model."""
    from loracompose.benchmarks.speed.answers import Asked, measure
    from loracompose.benchmarks.speed.figure import draw_answers
    from loracompose.engine import Engine

    quiet_loading()
    asked = Asked(tuple(composer) if composer else Asked.composers, k, rows, new_tokens, rounds)
    with Engine.from_pretrained(base, index=index, device=device, dtype=dtype) as engine:
        result = measure(engine, asked, _tell(as_json))
    if figure is not None:
        draw_answers(result, figure)
    _deliver(result, output, as_json, [answers_table(result)])


def composing(
    base: options.Base = options.DEFAULT_BASE,
    rounds: Rounds = 7,
    slow_rounds: Annotated[int, typer.Option(help="Measurements of what takes seconds.")] = 3,
    output: Output = None,
    figure: Figure = None,
    as_json: options.AsJson = False,
) -> None:
    """Time composing one set of adapters, LEGO beside scikit-learn's k-means and sums beside PEFT's SVD."""
    from loracompose.benchmarks.speed.composing import measure
    from loracompose.benchmarks.speed.figure import draw_composing
    from loracompose.models import load_base

    quiet_loading()
    with tables.console().status("composing"):
        result = measure(load_base(base, device="cpu", dtype="float32"), rounds=rounds, slow_rounds=slow_rounds)
    if figure is not None:
        draw_composing(result, figure)
    _deliver(result, output, as_json, [composing_table(result)])


def stream(
    pool: Annotated[Path, typer.Argument(help="Folder for the adapters, about 1.5 MB each; kept for the next time.")],
    base: options.Base = options.DEFAULT_BASE,
    size: Annotated[list[int] | None, typer.Option("--size", help="Adapters of a pool; may be repeated.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts of the stream.")] = 1000,
    output: Output = None,
    figure: Figure = None,
    as_json: options.AsJson = False,
) -> None:
    """Serve a stream of prompts, a few adapters popular and most not, from small and large pools on disk.

    Pools of other sizes that the output has already are kept.
    """
    from loracompose.benchmarks.speed.figure import draw_stream
    from loracompose.benchmarks.speed.stream import Stream, measure

    quiet_loading()
    before = json.loads(output.read_text(encoding="utf-8")) if output is not None and output.is_file() else None
    result = measure(base, pool, size or [50, 10_000], Stream(prompts=prompts), _tell(as_json), before)
    if figure is not None:
        draw_stream(result, figure)
    _deliver(result, output, as_json, [stream_table(result)])


def speed_table(name: str, found: Mapping[str, Any]) -> Table:
    """Every way of one case."""
    rows = [
        (
            escape(way),
            _ratio(part["ratio_to_base"]["decode"]),
            _ratio(part["ratio_to_base"]["first_token"]),
            f"{1000 * part['seconds']['setup']['median']:,.0f}",
            f"{1000 * part['once_seconds']:,.0f}" if part["once_seconds"] else "",
            f"{part['ms_a_prompt']:,.0f}",
            "yes" if part["computes"] == "the mixture" else "",
        )
        for way, part in found["ways"].items()
    ]
    columns = ("way", "a step / base", "first token / base", "setup ms", "once ms", "ms a prompt", "the mixture")
    return tables.table(f"{name}; {found['adapters']} adapters", columns, rows, right=(1, 2, 3, 4, 5))


def composing_table(result: Mapping[str, Any]) -> Table:
    """Milliseconds of each method, and the two comparisons."""
    rows = [
        (name, f"{1000 * part['median']:,.1f}", f"{1000 * part['low']:,.1f} to {1000 * part['high']:,.1f}", "")
        for name, part in result["seconds"].items()
    ]
    lego = (
        (f"LEGO's clustering alone, {effort}", part, "scikit-learn", "inertia_ratio")
        for effort, part in result["lego"]["efforts"].items()
    )
    for label, part, other, more in (*lego, ("linear", result["linear"], "PEFT's svd", "difference")):
        spread = f"{1000 * part['seconds']['low']:,.1f} to {1000 * part['seconds']['high']:,.1f}"
        found = f"{part['times_faster']:,.0f} x {other}; {more.replace('_', ' ')} {part[more]:.2g}"
        rows.append((label, f"{1000 * part['seconds']['median']:,.1f}", spread, found))
    title = f"{result['adapters']} adapters, {result['modules']} modules"
    return tables.table(title, ("method", "ms", "quartiles", "beside"), rows, right=(1,))


def answers_table(result: Mapping[str, Any]) -> Table:
    """The stages of every composer, with sets composed anew and composed before."""
    rows = []
    for name, passes in result["composers"].items():
        for label, part in passes.items():
            seconds = (f"{1000 * stage['median']:,.1f}" for stage in part["seconds"].values())
            share = part["share_before_the_model"]
            percent = f"{share['median']:.1%} [dim]({share['low']:.1%} to {share['high']:.1%})[/]"
            rows.append((name, label, *seconds, percent))
    asked = result["asked"]
    title = f"ms a batch of {asked['rows']} prompts, {asked['k']} adapters each, {asked['new_tokens']} tokens an answer"
    columns = ("composer", "sets composed", "retrieve", "load", "compose", "generate", "before the model")
    return tables.table(title, columns, rows, right=(2, 3, 4, 5, 6))


def stream_table(result: Mapping[str, Any]) -> Table:
    """What each pool took."""
    rows = [
        (
            f"{int(size):,}",
            f"{part['prompts_a_second']:.2f}",
            f"{result['seconds_to_smallest'][size]:.2f}",
            f"{part['distinct_adapters']:,}",
            f"{part['reads']:,}",
            f"{part['stages_seconds'].get('load', 0.0):.1f}",
            f"{part['store_mb']:.0f}",
            f"{part['peak_mb']:,.0f}",
        )
        for size, part in result["pools"].items()
    ]
    columns = ("adapters", "prompts/s", "time / smallest", "used", "reads", "load s", "store MB", "peak MB")
    return tables.table(f"{result['stream']['prompts']:,} prompts", columns, rows, right=range(8))


def _ratio(part: Mapping[str, float]) -> str:
    return f"{part['median']:.2f} [dim]({part['low']:.2f} to {part['high']:.2f})[/]"


def _tell(as_json: bool) -> Callable[[str], None]:
    console = tables.console()
    return lambda text: None if as_json else console.print(text, style="dim")


def _deliver(result: Mapping[str, Any], output: Path | None, as_json: bool, made: list[Table]) -> None:
    _write(result, output)
    if as_json:
        tables.show_json(significant(result))
        return
    for table in made:
        tables.console().print(table)


def _write(result: Mapping[str, Any], output: Path | None) -> None:
    if output is not None:
        write_result(result, output)
