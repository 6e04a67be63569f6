"""The command line: thin commands over the public API. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import typer

from loracompose.cli import composing, doctor, indexing, training
from loracompose.cli.errors import Commands
from loracompose.cli.generating import generate

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Find the LoRA adapters that help each prompt, compose them on the fly, and generate.",
)
app.add_typer(indexing.app, name="index")
app.add_typer(training.app, name="train")
app.command()(generate)
app.command()(composing.compose)
app.command()(doctor.doctor)
