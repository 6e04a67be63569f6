"""Errors of the library as one readable line and exit status 2, without a traceback."""

from __future__ import annotations

import sqlite3
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup


class Commands(TyperGroup):
    """A group of commands that reports the library's own errors instead of showing a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (ValueError, LookupError, TypeError, OSError, ModuleNotFoundError, sqlite3.Error) as error:
            text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
            Console(stderr=True, soft_wrap=True, emoji=False).print(
                f"[bold red]error[/] {escape(text)}", highlight=False
            )
            raise typer.Exit(2) from error
