"""loracompose train adapter."""

from __future__ import annotations

import typer

from loracompose.cli.errors import Commands

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Train what an index needs.")
