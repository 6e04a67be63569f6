"""loracompose doctor."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from loracompose.cli import options, tables
from loracompose.cli.options import DEFAULT_BASE

STYLE = {"ok": "green", "warning": "yellow", "problem": "bold red"}


Calibrate = Annotated[
    bool, typer.Option("--calibrate", help="Measure how fast this machine reads and multiplies, and keep it.")
]


def doctor(
    index: options.Index = None,
    base: options.Base = DEFAULT_BASE,
    calibrate: Calibrate = False,
    as_json: options.AsJson = False,
) -> None:
    """Say what is installed, what is missing, whether an index is healthy, and how to mend what is not."""
    from loracompose.composers import COMPOSERS
    from loracompose.diagnosis import calibrate_here, diagnose

    if calibrate:
        calibrate_here()
    findings = diagnose(base, index)
    broken = any(finding.state == "problem" for finding in findings)
    if as_json:
        tables.show_json({"findings": [asdict(finding) for finding in findings], "composers": sorted(COMPOSERS)})
    else:
        rows = [
            (escape(f.subject), f"[{STYLE[f.state]}]{f.state}[/]", escape(f.detail), escape(f.remedy)) for f in findings
        ]
        out = tables.console()
        out.print(tables.table(None, ("what", "state", "found", "remedy"), rows))
        methods = [(name, c.scope, "yes" if c.exact else "", c.source) for name, c in COMPOSERS.items()]
        out.print(tables.table("composers", ("name", "scope", "exact", "source"), methods))
    raise typer.Exit(1 if broken else 0)
