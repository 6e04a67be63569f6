"""loracompose train router."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of AdamW.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 10,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    auxiliary: Annotated[float, typer.Option(help="Factor of the method's own loss.")] = 1.0,
    max_length: Annotated[int, typer.Option(help="Rows of more tokens are left out.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the start, the order and the members.")] = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between dev losses; 0 measures it at the end.")] = 0,
    patience: Annotated[int, typer.Option(help="Dev losses without gain after which to stop; 0: never.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an interrupted run.")] = False,
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
    left = f", {report.left_out} longer than {max_length} tokens left out" if report.left_out else ""
    early = f" of {report.planned}" if report.steps < report.planned else ""
    out.print(
        f"{output}: {report.steps} steps{early} on {report.examples} examples{left}, {report.parameters} parameters, "
        f"{report.seconds:.0f} s"
    )
    dev_loss = "" if report.dev_loss is None else f", dev loss {report.dev_loss:.3f} at step {report.best_step}"
    out.print(f"loss {report.losses[0]:.3f} → {report.losses[-1]:.3f}{dev_loss}")


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
