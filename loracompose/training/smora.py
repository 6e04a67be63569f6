"""Train a SMoRA adapter with its router, and write both: a plain PEFT folder, and a router folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from loracompose import __version__
from loracompose.adapters.checkpoint import load_adapter
from loracompose.composition.router import RouterAdapter, save_router
from loracompose.fitness import base_size
from loracompose.models import DEFAULT_BASE, BaseModel, load_base
from loracompose.training.adapter import CardText, Rows, seeded, with_lora
from loracompose.training.batches import steps_per_epoch
from loracompose.training.data import Example, encode_examples, first_prompts, read_examples
from loracompose.training.loop import Progress, Step, run_steps
from loracompose.training.progress import progress_bar, tell_all
from loracompose.training.recipe import Recipe
from loracompose.training.smora_ranks import SmoraRanks
from loracompose.training.smora_settings import SmoraSettings
from loracompose.training.writing import write_folder

RANK = 64
CARD_EXAMPLES = 20


@dataclass(frozen=True)
class SmoraReport:
    """What a training came to; losses are means over response tokens, in nats.

    Attributes:
        output: the adapter's folder.
        router: the router's folder.
        steps: optimizer steps.
        examples: rows that were learned from.
        left_out: rows that were too long.
        losses: a step each.
        dev_losses: step -> loss on the dev rows.
        violation: how unevenly the ranks were used, a step each; see `LoadLog`.
        seconds: of this call.
    """

    output: Path
    router: Path
    steps: int
    examples: int
    left_out: int
    losses: tuple[float, ...]
    dev_losses: Mapping[int, float]
    violation: tuple[float, ...]
    seconds: float

    @property
    def dev_loss(self) -> float | None:
        """The dev loss after the last step, if there were dev rows."""
        return self.dev_losses.get(self.steps)


def train_smora(
    data: Sequence[Rows],
    output: Path | str,
    *,
    router: Path | str | None = None,
    base: str | Path = DEFAULT_BASE,
    recipe: Recipe | None = None,
    settings: SmoraSettings | None = None,
    card: CardText | None = None,
    dev: Sequence[Rows] = (),
    device: str = "auto",
    resume: bool = True,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> SmoraReport:
    """Train one adapter of many ranks, of which a router lets few act on a token, on rows of several tasks.

    The adapter's folder is a plain PEFT adapter at scaling alpha/r: run without its router, every rank acts at gate 1,
    which is its mean gate under balanced load. The router's folder belongs to that adapter by fingerprint; run both
    with `composer="smora", router=FOLDER`. Both appear when everything is done; until then a checkpoint lies in
    `<output>.partial`, from which the same call continues with the same result as a run never interrupted.

    Args:
        data: JSONL files, or rows, of any number of tasks; all are shuffled together.
        output: the adapter's folder, whose name is the adapter's name.
        router: the router's folder; `<output>.router` by default.
        base: folder or Hub name of the base model.
        recipe: rank 64 by default; alpha is 2 k where it is not given, the authors' 16 for k = 8. No dropout, no beam.
        settings: k, block and balancing.
        card: description, example prompts, tags and license; examples are spread over the data by default.
        dev: rows of the same form to measure the loss on.
        device: "auto" is CUDA where there is one, else the CPU.
        resume: continue from a checkpoint if there is one; False deletes it.
        progress: show a bar with the loss.
        on_step: called after each step, with its loss.

    Raises:
        FileExistsError: a folder is there already.
        ValueError: a bad row, a setting out of its range, a checkpoint of another run, or a loss that is not finite.
        LookupError: the base is nowhere to be found.
    """
    target, settings = Path(output), settings or SmoraSettings()
    gates = target.with_name(f"{target.name}.router") if router is None else Path(router)
    recipe = _recipe(recipe or Recipe(rank=RANK), settings)
    if taken := [folder for folder in (target, gates) if folder.exists()]:
        raise FileExistsError(f"{taken[0]} exists: delete it or choose another folder")
    rows, dev_rows = _read(data), _read(dev)
    partial = target.with_name(f"{target.name}.partial")
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    started = time.monotonic()
    loaded = load_base(base, device=device, dtype=recipe.dtype)
    examples = encode_examples(loaded.tokenizer, rows, recipe.max_length)
    steps = recipe.steps or max(1, round(recipe.epochs * steps_per_epoch(len(examples), recipe.batch_size)))
    with seeded(recipe.seed, loaded.device), ExitStack() as stack:
        model = with_lora(loaded, recipe)
        ranks = SmoraRanks(model, settings, steps=steps, seed=recipe.seed, base_model=loaded.name)
        stack.enter_context(ranks.attached())
        bar = stack.enter_context(progress_bar(target.name)) if progress else None
        done = run_steps(
            model,
            recipe,
            examples,
            steps=steps,
            pad_id=int(loaded.tokenizer.pad_token_id),
            dev=encode_examples(loaded.tokenizer, dev_rows, recipe.max_length) if dev_rows else (),
            checkpoint=partial / "checkpoint.pt",
            identity=_identity(recipe, settings, loaded, rows, dev_rows),
            on_step=tell_all(bar, on_step),
            method=ranks,
        )
    report = SmoraReport(
        output=target,
        router=gates,
        steps=steps,
        examples=len(examples),
        left_out=len(rows) - len(examples),
        losses=tuple(done.losses),
        dev_losses=dict(done.dev_losses),
        violation=tuple(ranks.log.violation),
        seconds=time.monotonic() - started,
    )
    record = _record(report, recipe, settings, loaded, done)
    write_folder(model, target, _card(card or CardText(), rows), record)
    own = RouterAdapter(load_adapter(target).fingerprint, target.name)
    save_router(ranks.router(own, {**record, "base": base_size(loaded), "load": ranks.log.record()}), gates)
    shutil.rmtree(partial, ignore_errors=True)
    return report


def _recipe(recipe: Recipe, settings: SmoraSettings) -> Recipe:
    if recipe.dropout:
        raise ValueError(f"SMoRA trains without dropout, as its ranks are sparse already; got {recipe.dropout}")
    if recipe.beam is not None:
        raise ValueError(
            f"SMoRA gates its ranks where BeamLoRA prunes them, so it takes no {recipe.beam}: leave recipe.beam None, "
            "or call train_adapter"
        )
    return recipe if recipe.alpha is not None else replace(recipe, alpha=2.0 * settings.active)


def _read(data: Sequence[Rows]) -> tuple[Example, ...]:
    return tuple(chain.from_iterable(read_examples(rows) for rows in data))


def _identity(
    recipe: Recipe, settings: SmoraSettings, base: BaseModel, rows: Sequence[Example], dev_rows: Sequence[Example]
) -> str:
    examples = [asdict(row) for row in (*rows, *dev_rows)]
    parts = [base.name, str(base.dtype), len(rows), asdict(recipe), asdict(settings), examples]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _card(card: CardText, rows: Sequence[Example]) -> dict[str, Any]:
    spread = rows[:: max(1, len(rows) // CARD_EXAMPLES)]  # the rows of a task often lie together
    return {**asdict(card), "examples": list(card.examples or first_prompts(spread))}


def _record(
    report: SmoraReport, recipe: Recipe, settings: SmoraSettings, base: BaseModel, done: Progress
) -> dict[str, Any]:
    packages = ("torch", "transformers", "peft")
    return {
        "method": "smora",
        "base": base.name,
        "recipe": asdict(recipe),
        "settings": settings.for_router(report.steps),
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": base.device.type,
        "examples": report.examples,
        "left_out": report.left_out,
        "steps": report.steps,
        "seconds": round(report.seconds, 1),
        "losses": [round(loss, 5) for loss in done.losses],
        "dev_losses": {str(step): round(loss, 5) for step, loss in done.dev_losses.items()},
        "versions": {"loracompose": __version__, **{package: version(package) for package in packages}},
    }
