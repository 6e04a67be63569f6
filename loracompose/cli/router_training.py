"""loracompose train router."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from loracompose.cli import options, tables
from loracompose.cli.options import DEFAULT_BASE
from loracompose.cli.quiet import quiet_loading

if TYPE_CHECKING:
    from loracompose.training.router import RouterReport


def router(
    data: Annotated[Path, typer.Argument(help="Folder of *.train.jsonl files, one a task, or one JSONL file.")],
    adapters: Annotated[Path, typer.Option("--adapters", "-a", help="An index, or a folder of adapters.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    method: Annotated[str, typer.Option(help="A composer that learns, such as lora_flow.")],
    base: options.Base = DEFAULT_BASE,
    dev: Annotated[Path | None, typer.Option(help="The same of *.dev.jsonl files, to measure the loss on.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the method, such as task=sst2; may be repeated.")
    ] = None,
    members: Annotated[str, typer.Option(help="A row's adapters: all, own, random or retrieved.")] = "all",
    k: Annotated[int, typer.Option("-k", help="Adapters of a row, for random and retrieved.")] = 3,
    hide_own: Annotated[float, typer.Option(help="How often a row must do without its own adapter.")] = 0.0,
    adapter_dropout: Annotated[float, typer.Option(help="How often a member is dropped from a row.")] = 0.0,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")] = None,
    per_task: Annotated[int | None, typer.Option(help="At most so many rows of each task.")] = None,
    dev_per_task: Annotated[int | None, typer.Option(help="The same of the dev rows.")] = None,
    epochs: options.Epochs = 1.0,
    steps: options.Steps = None,
    batch_size: options.BatchSize = 16,
    learning_rate: options.LearningRate = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 10,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    auxiliary: Annotated[float, typer.Option(help="Factor of the method's own loss.")] = 1.0,
    max_length: options.MaxLength = 512,
    seed: Annotated[int, typer.Option(help="Of the start, the order and the members.")] = 0,
    eval_every: options.EvalEvery = 0,
    patience: Annotated[int, typer.Option(help="Dev losses without gain after which to stop; 0: never.")] = 0,
    restart: options.Restart = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Train what a composer learns, base and adapters frozen; an interrupted run continues where it stopped."""
    from loracompose.training.router import train_router
    from loracompose.training.router_recipe import RouterRecipe

    quiet_loading()
    recipe = RouterRecipe(
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        auxiliary=auxiliary,
        tasks=tuple(task or ()),
        per_task=per_task,
        dev_per_task=dev_per_task,
        max_length=max_length,
        members=members,  # type: ignore[arg-type]  # the recipe refuses what it does not know
        k=k,
        hide_own=hide_own,
        adapter_dropout=adapter_dropout,
        seed=seed,
        dtype=dtype,
        eval_every=eval_every,
        patience=patience,
    )
    report = train_router(
        method,
        data,
        adapters,
        output,
        base=base,
        settings=options.parse_settings(settings, None, method),
        recipe=recipe,
        dev=dev,
        device=device,
        resume=not restart,
        progress=not as_json,
    )
    if as_json:
        tables.show_json(as_values(report))
        return
    out = tables.console()
    early = f" of {report.planned}" if report.steps < report.planned else ""
    out.print(
        f"{escape(str(output))}: {report.steps} steps{early} on {tables.examples_told(report, max_length)}, "
        f"{report.parameters} parameters, {report.seconds:.0f} s"
    )
    best = "" if report.dev_loss is None else f" at step {report.best_step}"
    out.print(tables.losses_told(report) + best)


def as_values(report: RouterReport) -> dict[str, object]:
    """A report as JSON values."""
    return {
        "output": str(report.output),
        "method": report.router.method,
        "fingerprint": report.router.fingerprint,
        "steps": report.steps,
        "planned": report.planned,
        "examples": report.examples,
        "left_out": report.left_out,
        "losses": report.losses,
        "auxiliary": report.auxiliary,
        "dev_losses": report.dev_losses,
        "dev_loss": report.dev_loss,
        "best_step": report.best_step,
        "parameters": report.parameters,
        "seconds": report.seconds,
    }
