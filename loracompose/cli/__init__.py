"""The command line: thin commands over the public API. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

from typing import Annotated

import typer

from loracompose import __version__
from loracompose.cli import benchmarks, composing, doctor, evaluating, indexing, training
from loracompose.cli.errors import Commands
from loracompose.cli.generating import generate
from loracompose.cli.serving import serve


def show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Find the LoRA adapters that help each prompt, compose them on the fly, and generate.",
)


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Find the LoRA adapters that help each prompt, compose them on the fly, and generate."""


app.add_typer(indexing.app, name="index")
app.add_typer(training.app, name="train")
app.add_typer(benchmarks.app, name="bench")
app.add_typer(evaluating.app, name="eval")
app.command()(generate)
app.command()(composing.compose)
app.command()(serve)
app.command()(doctor.doctor)
