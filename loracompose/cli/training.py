"""loracompose train: adapter and retriever; router and smora beside it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.markup import escape

from loracompose.cli import options, tables
from loracompose.cli.errors import Commands
from loracompose.cli.options import DEFAULT_BASE, DEFAULT_ENCODER
from loracompose.cli.quiet import quiet_loading
from loracompose.cli.router_training import router
from loracompose.cli.smora import smora
from loracompose.retrieval.encoder_recipe import EncoderRecipe

if TYPE_CHECKING:
    from loracompose.retrieval.encoder_recipe import View
    from loracompose.training.beam_settings import BeamSettings

Method = Literal["lora", "beam"]

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Train what an index needs.")
app.command()(router)
app.command()(smora)


@app.callback()
def train() -> None:
    """Train what an index needs."""


@app.command()
def adapter(
    data: Annotated[Path, typer.Argument(help='JSONL: {"prompt": ..., "response": ...} per line.')],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; its name is the adapter's name.")],
    base: options.Base = DEFAULT_BASE,
    dev: Annotated[Path | None, typer.Option(help="JSONL to measure the loss on.")] = None,
    method: Annotated[Method, typer.Option(help="lora, or beam: BeamLoRA, which regrows weak ranks.")] = "lora",
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of every factor.")] = 8,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha; twice the rank if not given.")] = None,
    targets: options.Targets = "q_proj,v_proj",
    epochs: options.Epochs = 1.0,
    steps: options.Steps = None,
    batch_size: options.BatchSize = 16,
    learning_rate: options.LearningRate = 2e-3,
    max_length: options.MaxLength = 512,
    seed: Annotated[int, typer.Option(help="Of factors, order and dropout.")] = 0,
    eval_every: options.EvalEvery = 0,
    beam_threshold: Annotated[float | None, typer.Option(help="Importance kept at first; 0.95 if not given.")] = None,
    beam_period: Annotated[int | None, typer.Option(help="Steps between prunings; 8.1 % of all if not given.")] = None,
    beam_temperature: Annotated[float | None, typer.Option(help="Of the softmax over ranks.")] = None,
    description: Annotated[str, typer.Option(help="For the card.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="For the card; may be repeated.")] = None,
    license_name: Annotated[str, typer.Option("--license", help="For the card.")] = "",
    restart: options.Restart = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Train one LoRA adapter; an interrupted run continues where it stopped."""
    from loracompose.training.adapter import CardText, train_adapter
    from loracompose.training.recipe import Recipe

    quiet_loading()
    recipe = Recipe(
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
        beam=_beam_settings(method, beam_threshold, beam_period, beam_temperature),
    )
    card = CardText(description=description, tags=tuple(tag or ()), license=license_name)
    report = train_adapter(
        data,
        output,
        base=base,
        recipe=recipe,
        card=card,
        dev=dev,
        device=device,
        resume=not restart,
        progress=not as_json,
    )
    if as_json:
        tables.show_json({**asdict(report), "output": str(report.output), "dev_loss": report.dev_loss})
        return
    out = tables.console()
    seen = tables.examples_told(report, max_length)
    out.print(f"{escape(str(output))}: {report.steps} steps on {seen}, {report.seconds:.0f} s")
    if report.events:
        pruned = ", ".join(f"{event.pruned} after step {event.step}" for event in report.events)
        out.print(f"ranks pruned and grown anew: {pruned}")
    out.print(tables.losses_told(report))


def _beam_settings(
    method: Method, threshold: float | None, period: int | None, temperature: float | None
) -> BeamSettings | None:
    """The settings of BeamLoRA, None for plain LoRA."""
    from loracompose.training.beam_settings import BeamSettings

    if method == "beam":
        share = BeamSettings.threshold if threshold is None else threshold
        return BeamSettings(threshold=share, period=period, temperature=temperature)
    if (threshold, period, temperature) != (None, None, None):
        raise ValueError(f"the options --beam-... belong to --method beam, and the method is {method}")
    return None


@app.command()
def retriever(
    source: Annotated[
        Path,
        typer.Argument(help='An index, a folder of adapters with cards, or JSONL: {"adapter": ..., "prompt": ...}.'),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write: a sentence-transformers model.")],
    share: Annotated[
        float, typer.Option(help="Part of the adapters whose examples are trained on; 0 trains none.")
    ] = 1.0,
    encoder: Annotated[str, typer.Option(help="Encoder to begin with: a folder or a Hub name.")] = DEFAULT_ENCODER,
    epochs: Annotated[int, typer.Option(help="How often every example occurs in a pair.")] = EncoderRecipe.epochs,
    batch_size: Annotated[int, typer.Option(help="Most pairs a step.")] = EncoderRecipe.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Highest of AdamW.")] = EncoderRecipe.learning_rate,
    temperature: Annotated[float, typer.Option(help="Of the contrastive loss.")] = EncoderRecipe.temperature,
    depth: Annotated[float, typer.Option(help="Part of the layers to train, from the last.")] = EncoderRecipe.depth,
    max_length: Annotated[int, typer.Option(help="Tokens a text is cut to in training.")] = EncoderRecipe.max_length,
    views: Annotated[str, typer.Option(help="both, instructed or plain.")] = EncoderRecipe.views,
    seed: Annotated[int, typer.Option(help="Of the share, the pairs and dropout.")] = EncoderRecipe.seed,
    restart: options.Restart = False,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune the sentence encoder on the adapters' examples; an interrupted run continues where it stopped."""
    from loracompose.retrieval.finetuning import train_retriever

    quiet_loading()
    recipe = EncoderRecipe(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        temperature=temperature,
        depth=depth,
        max_length=max_length,
        views=cast("View", views),
        seed=seed,
    )
    report = train_retriever(
        source,
        output,
        share=share,
        recipe=recipe,
        encoder=encoder,
        device=device,
        resume=not restart,
        progress=not as_json,
    )
    if as_json:
        tables.show_json({**asdict(report), "output": str(report.output), "steps": report.steps})
        return
    out = tables.console()
    out.print(f"{escape(str(output))}: {report.steps} steps on {report.examples} examples, {report.seconds:.0f} s")
    if report.losses:
        out.print(f"loss {report.losses[0]:.3f} → {report.losses[-1]:.3f}")
    out.print(f"to use it: AdapterIndex.open(index, embedder={str(output)!r}, reembed=True)")
