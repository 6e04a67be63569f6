"""loracompose generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracompose.cli import options, tables
from loracompose.cli.options import DEFAULT_BASE
from loracompose.cli.quiet import quiet_loading

if TYPE_CHECKING:
    from loracompose.engine import Engine


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; one batch of different compositions.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help='JSONL with a "prompt" per line.')] = None,
    index: options.Index = None,
    base: options.Base = DEFAULT_BASE,
    composer: options.ComposerName = "mixture",
    settings: options.Settings = None,
    router: options.Router = None,
    k: Annotated[int | None, typer.Option("-k", help="Adapters to retrieve for a prompt; 3 if not given.")] = None,
    adapters: Annotated[
        str | None, typer.Option(help='One set for all prompts instead of retrieval: "a,b" or "a=0.7,b=0.3" or "".')
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 64,
    batch_size: Annotated[int | None, typer.Option(help="Prompts that run together; 32 if not given.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens that run together, answers included; prompts of like length share them.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the adapters, scores and weights.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer to one prompt as it is written.")] = False,
    beams: Annotated[int | None, typer.Option(help="Beam search of this width; greedy if not given.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Of sampling.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Answer prompts, each with the adapters found for it."""
    from loracompose.engine import Engine

    quiet_loading()
    asked: list[Any] = [*(prompts or []), *(read_prompts(file) if file else [])]
    if not asked:
        raise ValueError("there is no prompt: pass prompts as arguments or a JSONL file with --file")
    chosen = options.parse_composer(composer, settings, router)
    engine = Engine.from_pretrained(base, index=index, composer=chosen, device=device, dtype=dtype)
    given = None if adapters is None else options.parse_set(adapters)
    decoding = decoding_settings(beams, sample, temperature, seed)
    if stream:
        given_too = {"--explain": explain, "--batch-size": batch_size, "--batch-tokens": batch_tokens}
        if idle := [name for name, value in given_too.items() if value is not None and value is not False]:
            raise ValueError(f"{', '.join(idle)}: --stream prints the text of one answer and nothing else")
        show_stream(engine, asked, as_json, {"k": k, "adapters": given, "max_new_tokens": max_new_tokens, **decoding})
        return
    sets = None if given is None else [given] * len(asked)
    progress = not as_json and len(asked) > 1
    answers = engine.generate(
        asked,
        k=k,
        adapters=sets,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        progress=progress,
        **decoding,
    )
    if as_json:
        tables.show_json([answer.as_dict() for answer in answers])
        return
    for number, answer in enumerate(answers, 1):
        tables.console().print(tables.generation_panel(answer, number, explain))


def decoding_settings(beams: int | None, sample: bool, temperature: float | None, seed: int | None) -> dict[str, Any]:
    """What the model's `generate` is told about decoding.

    Raises:
        ValueError: a setting of sampling without --sample.
    """
    if not sample and (temperature is not None or seed is not None):
        raise ValueError("--temperature and --seed belong to sampling: add --sample")
    settings: dict[str, Any] = {"do_sample": sample}
    if beams is not None:
        settings["num_beams"] = beams
    if temperature is not None:
        settings["temperature"] = temperature
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    return settings


def show_stream(engine: Engine, asked: list[Any], as_json: bool, settings: dict[str, Any]) -> None:
    """Print one answer as it is written."""
    if len(asked) != 1 or as_json:
        raise ValueError(f"--stream prints the text of one answer, got {len(asked)} prompts{' and --json' * as_json}")
    for piece in engine.stream(asked[0], **settings):
        typer.echo(piece, nl=False)
    typer.echo()


def read_prompts(file: Path) -> list[Any]:
    """The prompts of a JSONL file.

    Raises:
        ValueError: a line that is no JSON object with a "prompt"; the message names it.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):  # JSON may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict) or "prompt" not in row:
            raise ValueError(f'{file}:{number}: expected an object with a "prompt", got {line[:80]}')
        found.append(row["prompt"])
    return found
