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
    targets: options.Targets = "q_proj,v_proj",
    epochs: options.Epochs = 1.0,
    steps: options.Steps = None,
    batch_size: options.BatchSize = 16,
    learning_rate: options.LearningRate = 2e-3,
    max_length: options.MaxLength = 512,
    seed: Annotated[int, typer.Option(help="Of factors, router and order.")] = 0,
    eval_every: options.EvalEvery = 0,
    description: Annotated[str, typer.Option(help="For the card.")] = "",
    restart: options.Restart = False,
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
            target_modules=options.parse_targets(targets),
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
    out.print(
        f"{report.output}: {report.steps} steps on {tables.examples_told(report, max_length)}, {report.seconds:.0f} s"
    )
    out.print(tables.losses_told(report))
    first, last = report.violation[0], report.violation[-1]
    out.print(f"fullest rank above the mean load by {first:.0%} → {last:.0%}; router in {report.router}")
