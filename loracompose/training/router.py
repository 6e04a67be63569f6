"""Train what a composer learns, with the base and the adapters frozen, and write it as a router folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from loracompose import __version__
from loracompose.composers import COMPOSERS
from loracompose.composers.base import LearnedComposer, Pool
from loracompose.composition.router import Router, save_router
from loracompose.fitness import base_size
from loracompose.models import DEFAULT_BASE, BaseModel, load_base
from loracompose.training.batches import steps_per_epoch
from loracompose.training.loop import Step
from loracompose.training.members import member_table
from loracompose.training.pool import Adapters, LoadedPool, open_pool
from loracompose.training.progress import progress_bar, tell_all
from loracompose.training.router_loop import Material, RouterLoop
from loracompose.training.router_recipe import RouterRecipe
from loracompose.training.task_mixture import Rows, TaskMixture, task_mixture


@dataclass(frozen=True, eq=False)
class RouterReport:
    """What a training came to; losses are means over response tokens, in nats.

    Attributes:
        output: the router's folder.
        router: what was learned.
        steps: optimizer steps made; fewer than planned where the dev loss no longer fell.
        planned: optimizer steps that were asked for.
        examples: rows that were learned from.
        left_out: rows that were too long.
        losses: of the language model, a step each.
        auxiliary: the method's own loss, a step each.
        dev_losses: step -> loss on the dev rows.
        best_step: the step whose router was kept; None without dev rows: the last.
        parameters: numbers that were trained.
        seconds: spent on steps and dev losses.
    """

    output: Path
    router: Router
    steps: int
    planned: int
    examples: int
    left_out: int
    losses: tuple[float, ...]
    auxiliary: tuple[float, ...]
    dev_losses: Mapping[int, float]
    best_step: int | None
    parameters: int
    seconds: float

    @property
    def dev_loss(self) -> float | None:
        """The dev loss of the router that was kept, if there were dev rows."""
        return None if self.best_step is None else self.dev_losses[self.best_step]


def train_router(
    method: str | type[LearnedComposer],
    data: Rows,
    adapters: Adapters,
    output: Path | str,
    *,
    base: str | Path | BaseModel = DEFAULT_BASE,
    settings: Mapping[str, Any] | None = None,
    recipe: RouterRecipe | None = None,
    dev: Rows | None = None,
    device: str = "auto",
    resume: bool = True,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> RouterReport:
    """Train a router on rows of several tasks: the loss is on the responses; base and adapters stay as they are.

    The folder appears when everything is done. Until then a checkpoint lies beside it in `<output>.partial`; the same
    call continues from it, with the same result as a run that was never interrupted. For a seed, a machine and a
    number of threads the result is deterministic.

    Args:
        method: name of a composer that learns, or its class.
        data: a folder whose `*.train.jsonl` files hold one task each, a JSONL file, or rows
            {"prompt", "response", "task"}. Every task is seen equally often.
        adapters: an index, a folder of adapters, or folders and adapters one by one. A row's own adapter is the one
            that is named as its task.
        output: the router's folder.
        base: folder or Hub name of the base model, or one already loaded, which is as it was afterwards.
        settings: hyper-parameters of the method by name.
        recipe: those of the training.
        dev: rows of the same form to measure the loss on; of a folder, its `*.dev.jsonl` files.
        device: "auto" is CUDA where there is one, else the CPU; not for a base already loaded.
        resume: continue from a checkpoint if there is one; False deletes it.
        progress: show a bar with the loss.
        on_step: called after each step, with its loss.

    Raises:
        FileExistsError: `output` is there already.
        LookupError: no such method, base, task or adapter.
        ValueError: a bad row or setting, patience without dev rows, adapters that do not fit, a checkpoint of another
            run, or a loss that is not finite.
    """
    target, recipe, kind = Path(output), recipe or RouterRecipe(), learned_composer(method)
    if target.exists():
        raise FileExistsError(f"{target} exists: delete it or choose another folder")
    if recipe.patience and dev is None:
        raise ValueError(
            f"patience is {recipe.patience}, but it counts dev losses and there are no dev rows: give dev rows, or set "
            "patience to 0"
        )
    partial = target.with_name(f"{target.name}.partial")
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    loaded = base if isinstance(base, BaseModel) else load_base(base, device=device, dtype=recipe.dtype)
    with ExitStack() as stack:
        found = stack.enter_context(open_pool(adapters, loaded))
        start = kind.initial(found.pool, recipe.seed, dict(settings or {}))
        rows = _rows(loaded, recipe, data)
        steps = recipe.steps or max(1, round(recipe.epochs * steps_per_epoch(len(rows.encoded), recipe.batch_size)))
        material = _material(loaded, found, recipe, rows, steps, dev)
        # PHATGOOSE runs its gates in another form while they are trained
        trained_form = cast(Any, getattr(kind, "training", kind))
        loop = RouterLoop(trained_form, start, material, recipe, steps)
        bar = stack.enter_context(progress_bar(target.name)) if progress else None
        stack.enter_context(frozen(loaded.model))
        loop.run(
            partial / "checkpoint.pt",
            _identity(start, found.pool, material, recipe, loaded, steps),
            tell_all(bar, on_step),
        )
    done = loop.progress
    record = _record(loop, found.pool, material, recipe, loaded, steps)
    router = replace(loop.router, training=record)
    save_router(router, target)
    shutil.rmtree(partial, ignore_errors=True)
    return RouterReport(
        output=target,
        router=router,
        steps=done.steps,
        planned=steps,
        examples=len(rows.examples),
        left_out=rows.left_out,
        losses=tuple(done.losses),
        auxiliary=tuple(done.auxiliary),
        dev_losses=dict(done.dev_losses),
        best_step=done.best_step,
        parameters=loop.parameters,
        seconds=done.seconds,
    )


def learned_composer(method: str | type[LearnedComposer]) -> type[LearnedComposer]:
    """The class of a composer that learns.

    Raises:
        LookupError: none of that name.
        TypeError: a class that learns nothing.
    """
    if isinstance(method, str):
        learned = {name: kind for name, kind in COMPOSERS.items() if hasattr(kind, "initial")}
        if method not in learned:
            what = "learns nothing" if method in COMPOSERS else "is no composer"
            raise LookupError(f"{method!r} {what}; a router can be trained for {', '.join(sorted(learned))}")
        return cast(type[LearnedComposer], learned[method])
    if not hasattr(method, "initial"):
        raise TypeError(f"{method!r} learns nothing: it has no `initial`")
    return method


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Take the base out of the graph for the length of a block; then it is as it was."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    training, attention = model.training, model.config._attn_implementation
    model.requires_grad_(False).eval()
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")  # a fifth faster than sdpa for short rows on a CPU
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def _rows(base: BaseModel, recipe: RouterRecipe, data: Rows) -> TaskMixture:
    return task_mixture(
        data,
        base.tokenizer,
        tasks=recipe.tasks,
        per_task=recipe.per_task,
        max_length=recipe.max_length,
        seed=recipe.seed,
    )


def _material(
    base: BaseModel, found: LoadedPool, recipe: RouterRecipe, rows: TaskMixture, steps: int, dev: Rows | None
) -> Material:
    used = [row for batch in rows.plan(recipe.batch_size, steps=steps, seed=recipe.seed) for row in batch]
    members = member_table(recipe, rows.examples, found.pool.names, found.index, used)
    measured = None
    if dev is not None:
        dev_rows = task_mixture(
            dev,
            base.tokenizer,
            split="dev",
            tasks=recipe.tasks,
            per_task=recipe.dev_per_task,
            max_length=recipe.max_length,
            seed=recipe.seed,
        )
        measured = dev_rows, member_table(recipe, dev_rows.examples, found.pool.names, found.index)
    pad_id = int(base.tokenizer.pad_token_id)
    return Material(base.model, found.pool.banks, pad_id, rows, members, measured)


def _identity(start: Router, pool: Pool, material: Material, recipe: RouterRecipe, base: BaseModel, steps: int) -> str:
    adapters = [asdict(adapter) for adapter in pool.adapters]
    rows = [material.rows.digest, material.members.digest]
    dev = None if material.dev is None else [part.digest for part in material.dev]
    parts = [start.fingerprint, adapters, rows, dev, asdict(recipe), base.name, str(base.dtype), steps]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _record(
    loop: RouterLoop, pool: Pool, material: Material, recipe: RouterRecipe, base: BaseModel, steps: int
) -> dict[str, Any]:
    done, dev = loop.progress, None if material.dev is None else material.dev[0]
    packages = ("torch", "transformers")
    return {
        "recipe": asdict(recipe),
        "base": base_size(base),
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": base.device.type,
        "pool": [asdict(adapter) for adapter in pool.adapters],
        "tasks": {task: len(rows) for task, rows in material.rows.by_task.items()},
        "data": material.rows.digest,
        "dev": None if dev is None else dev.digest,
        "examples": len(material.rows.examples),
        "left_out": material.rows.left_out,
        "steps": done.steps,
        "planned": steps,
        "best_step": done.best_step,
        "parameters": loop.parameters,
        "seconds": round(done.seconds, 1),
        "losses": [round(loss, 5) for loss in done.losses],
        "auxiliary": [round(loss, 5) for loss in done.auxiliary],
        "dev_losses": {str(step): round(loss, 5) for step, loss in done.dev_losses.items()},
        "versions": {"loracompose": __version__, **{package: version(package) for package in packages}},
    }
