"""Train one LoRA adapter from prompts and responses and write it as a PEFT folder with its card."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from loracompose import __version__
from loracompose.models import DEFAULT_BASE, BaseModel, load_base
from loracompose.training.batches import steps_per_epoch
from loracompose.training.beam import BeamEvent, BeamLora
from loracompose.training.data import Example, encode_examples, first_prompts, read_examples
from loracompose.training.loop import Step, run_steps
from loracompose.training.progress import progress_bar, tell_all
from loracompose.training.recipe import Recipe
from loracompose.training.writing import write_folder

Rows = Path | str | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class CardText:
    """What an index reads of an adapter; without `examples` the first 20 prompts of the data are taken."""

    description: str = ""
    examples: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    license: str = ""


@dataclass(frozen=True)
class TrainingReport:
    """What a training came to; losses are means over response tokens, in nats; events are those of BeamLoRA."""

    output: Path
    steps: int
    examples: int
    left_out: int
    losses: tuple[float, ...]
    dev_losses: Mapping[int, float]
    seconds: float
    events: tuple[BeamEvent, ...] = ()

    @property
    def dev_loss(self) -> float | None:
        """The dev loss after the last step, if there were dev rows."""
        return self.dev_losses.get(self.steps)


def train_adapter(
    data: Rows,
    output: Path | str,
    *,
    base: str | Path = DEFAULT_BASE,
    recipe: Recipe | None = None,
    card: CardText | None = None,
    dev: Rows | None = None,
    device: str = "auto",
    resume: bool = True,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> TrainingReport:
    """Train a LoRA on `{"prompt", "response"}` rows: the loss is on the response and its end token only.

    With `recipe.beam` it is trained as BeamLoRA and written as the plain LoRA that this comes to.

    The folder appears when everything is done: PEFT weights in bfloat16, `card.json` and `training.json`.
    Until then a checkpoint lies beside it in `<output>.partial`; the same call continues from it, with the same
    result as a run that was never interrupted. For a seed, a machine and a number of threads the result is
    deterministic.

    Args:
        data: a JSONL file or rows; prompts are strings or chat messages.
        output: the adapter's folder, whose name is the adapter's name.
        base: folder or Hub name of the base model.
        recipe: the hyper-parameters.
        card: description, example prompts, tags and license for `card.json`.
        dev: rows of the same form to measure the loss on.
        device: "auto" is CUDA where there is one, else the CPU.
        progress: show a bar with the loss.
        resume: continue from a checkpoint if there is one; False deletes it.
        on_step: called after each step, with its loss.

    Raises:
        FileExistsError: `output` is there already.
        ValueError: a bad row (file and line are named), an unknown target module, a checkpoint of another run, or a
            loss that is not finite.
        LookupError: the base is nowhere to be found.
    """
    target, recipe = Path(output), recipe or Recipe()
    if target.exists():
        raise FileExistsError(f"{target} exists: delete it or choose another folder")
    rows, dev_rows = read_examples(data), read_examples(dev) if dev is not None else ()
    partial = target.with_name(f"{target.name}.partial")
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    started = time.monotonic()
    loaded = load_base(base, device=device, dtype=recipe.dtype)
    examples = encode_examples(loaded.tokenizer, rows, recipe.max_length)
    dev_examples = encode_examples(loaded.tokenizer, dev_rows, recipe.max_length) if dev_rows else ()
    steps = recipe.steps or max(1, round(recipe.epochs * steps_per_epoch(len(examples), recipe.batch_size)))
    with seeded(recipe.seed, loaded.device), ExitStack() as stack:
        model = with_lora(loaded, recipe)
        beam = _beam(model, recipe, steps)
        if beam is not None:
            stack.enter_context(beam.attached())
        done = run_steps(
            model,
            recipe,
            examples,
            steps=steps,
            pad_id=int(loaded.tokenizer.pad_token_id),
            dev=dev_examples,
            checkpoint=partial / "checkpoint.pt",
            identity=_identity(recipe, loaded, rows, dev_rows),
            on_step=tell_all(stack.enter_context(progress_bar(target.name)) if progress else None, on_step),
            method=beam,
        )
    if beam is not None:
        beam.fold()
    report = TrainingReport(
        output=target,
        steps=steps,
        examples=len(examples),
        left_out=len(rows) - len(examples),
        losses=tuple(done.losses),
        dev_losses=dict(done.dev_losses),
        seconds=time.monotonic() - started,
        events=() if beam is None else tuple(beam.events),
    )
    write_folder(model, target, _card(card or CardText(), rows), _record(report, recipe, loaded))
    shutil.rmtree(partial, ignore_errors=True)
    return report


def with_lora(base: BaseModel, recipe: Recipe) -> PeftModel:
    """The base with fresh LoRA factors in float32, which alone require gradients.

    Raises:
        ValueError: the base has no module of a target's name.
    """
    kind = TaskType.SEQ_2_SEQ_LM if base.model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    names = {name.rsplit(".", 1)[-1] for name, _ in base.model.named_modules()}
    if missing := [name for name in recipe.target_modules if name.rsplit(".", 1)[-1] not in names]:
        raise ValueError(f"{base.name} has no module named {', '.join(missing)}; it has {', '.join(sorted(names))}")
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.target_modules),
        task_type=kind,
    )
    if base.device.type == "cpu":
        base.model.set_attn_implementation("eager")  # a fifth faster than sdpa for short rows on a CPU
    # PEFT keeps the factors in float32 whatever the dtype of the base.
    return get_peft_model(base.model, config, autocast_adapter_dtype=True)


def _beam(model: PeftModel, recipe: Recipe, steps: int) -> BeamLora | None:
    if recipe.beam is None:
        return None
    return BeamLora(model, recipe.beam, steps=steps, learning_rate=recipe.learning_rate, seed=recipe.seed)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators, which PEFT's initialisation and dropout draw from, and give them back unchanged."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _identity(recipe: Recipe, base: BaseModel, rows: Sequence[Example], dev_rows: Sequence[Example]) -> str:
    examples = [asdict(row) for row in (*rows, *dev_rows)]
    parts = [asdict(recipe), base.name, str(base.dtype), len(rows), examples]  # the count is where the dev rows begin
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _card(card: CardText, rows: Sequence[Example]) -> dict[str, Any]:
    return {
        "description": card.description,
        "examples": list(card.examples or first_prompts(rows)),
        "tags": list(card.tags),
        "license": card.license,
    }


def _record(report: TrainingReport, recipe: Recipe, base: BaseModel) -> dict[str, Any]:
    packages = ("torch", "transformers", "peft")
    return {
        "base": base.name,
        "recipe": asdict(recipe),
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": base.device.type,
        "examples": report.examples,
        "left_out": report.left_out,
        "steps": report.steps,
        "seconds": round(report.seconds, 1),
        "losses": [round(loss, 5) for loss in report.losses],
        "dev_losses": {str(step): round(loss, 5) for step, loss in report.dev_losses.items()},
        "events": [asdict(event) for event in report.events],
        "versions": {"loracompose": __version__, **{package: version(package) for package in packages}},
    }
