"""loracompose train smora."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from loracompose.cli import options, tables
from loracompose.cli.options import DEFAULT_BASE
from loracompose.cli.quiet import quiet_loading


def smora(
    data: Annotated[list[Path], typer.Argument(help='JSONL files: {"prompt": ..., "response": ...} per line.')],
    output: Annotated[Path, typer.Option("--output", "-o", help="Adapter folder; its name is the adapter's name.")],
    router: Annotated[Path | None, typer.Option(help="Router folder; OUTPUT.router if not given.")] = None,
    base: options.Base = DEFAULT_BASE,
    dev: Annotated[list[Path] | None, typer.Option(help="JSONL to measure the loss on; may be repeated.")] = None,
    rank: Annotated[int, typer.Option("--rank", "-r", help="Ranks of every module.")] = 64,
    active: Annotated[int, typer.Option(help="k, ranks that act per token.")] = 8,
    block: Annotated[int, typer.Option(help="b, ranks that share a gate.")] = 1,
    normalised: Annotated[bool, typer.Option(help="Scale the gates of a token to a fixed sum.")] = True,
    balance: Annotated[float | None, typer.Option(help="u, balancing step; 0.5 / steps if not given.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha; twice k if not given.")] = None,
    targets: Annotated[str, typer.Option(help="Adapted modules, by the ends of their names.")] = "q_proj,v_proj",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of AdamW.")] = 2e-3,
    max_length: Annotated[int, typer.Option(help="Rows of more tokens are left out.")] = 512,
    seed: Annotated[int, typer.Option(help="Of factors, router and order.")] = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between dev losses; 0 measures it at the end.")] = 0,
    description: Annotated[str, typer.Option(help="For the card.")] = "",
    restart: Annotated[bool, typer.Option("--restart", help="Forget an interrupted run.")] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Train one adapter of many ranks and the router that lets few of them act on a token."""
    from loracompose.training.adapter import CardText
    from loracompose.training.recipe import Recipe
    from loracompose.training.smora import train_smora
    from loracompose.training.smora_settings import SmoraSettings

    quiet_loading()
    report = train_smora(
        data,
        output,
        router=router,
        base=base,
        recipe=Recipe(
            rank=rank,
            alpha=alpha,
            target_modules=tuple(name.strip() for name in targets.split(",") if name.strip()),
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            max_length=max_length,
            seed=seed,
            dtype=dtype,
            eval_every=eval_every,
        ),
        settings=SmoraSettings(active=active, block=block, normalised=normalised, balance=balance),
        card=CardText(description=description),
        dev=dev or (),
        device=device,
        resume=not restart,
        progress=not as_json,
    )
    if as_json:
        folders = {"output": str(report.output), "router": str(report.router)}
        tables.show_json({**asdict(report), **folders, "dev_loss": report.dev_loss})
        return
    out = tables.console()
    left = f", {report.left_out} longer than {max_length} tokens left out" if report.left_out else ""
    out.print(f"{report.output}: {report.steps} steps on {report.examples} examples{left}, {report.seconds:.0f} s")
    dev_loss = "" if report.dev_loss is None else f", dev loss {report.dev_loss:.3f}"
    out.print(f"loss {report.losses[0]:.3f} → {report.losses[-1]:.3f}{dev_loss}")
    first, last = report.violation[0], report.violation[-1]
    out.print(f"fullest rank above the mean load by {first:.0%} → {last:.0%}; router in {report.router}")
