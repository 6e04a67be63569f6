"""The optimizer loop of routers: the composer that runs later, with parameters in place of what it learned."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loracompose.composers.base import LearnedComposer
from loracompose.composition.bank import RankBank
from loracompose.composition.router import Router
from loracompose.durable import whole_file
from loracompose.runtime.attach import attach, model_lock
from loracompose.training.batches import response_loss
from loracompose.training.data import EncodedExample
from loracompose.training.loop import Step
from loracompose.training.members import MemberTable
from loracompose.training.router_recipe import RouterRecipe
from loracompose.training.task_mixture import TaskMixture


class Method(Protocol):
    """Makes the composer of a router; the class of a learned composer does."""

    def __call__(self, router: Router) -> LearnedComposer:
        """The composer that runs what this router has learned."""
        ...


@dataclass(frozen=True, eq=False)
class Material:
    """What a router is trained on.

    Attributes:
        model: the frozen base.
        banks: the frozen ranks of the pool, gathered once.
        pad_id: token that fills a batch up; masked everywhere.
        rows: what to learn.
        members: who is a member of each row.
        dev: rows to measure the loss on, and their members; None for none.
    """

    model: PreTrainedModel
    banks: Mapping[str, RankBank]
    pad_id: int
    rows: TaskMixture
    members: MemberTable
    dev: tuple[TaskMixture, MemberTable] | None = None


@dataclass
class RouterProgress:
    """What a run has come to so far; part of its checkpoint.

    Attributes:
        losses: of the language model, a step each, in nats a response token.
        auxiliary: the method's own loss, a step each; 0 where it has none.
        dev_losses: step -> loss on the dev rows.
        seconds: time spent, over all sessions of a run that was interrupted.
        best: the tensors of the lowest dev loss.
    """

    losses: list[float] = field(default_factory=list)
    auxiliary: list[float] = field(default_factory=list)
    dev_losses: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def best_step(self) -> int | None:
        """The step of the lowest dev loss, the earliest of equals; None without dev rows."""
        return min(self.dev_losses, key=lambda step: self.dev_losses[step], default=None)

    def without_gain(self) -> int:
        """Measurements since the lowest dev loss."""
        return sum(step > (self.best_step or 0) for step in self.dev_losses)


class RouterLoop:
    """One run: the tensors that it trains, its optimizer and its progress."""

    def __init__(self, method: Method, start: Router, material: Material, recipe: RouterRecipe, steps: int) -> None:
        self._method, self._start, self._material = method, start, material
        self._recipe, self._steps = recipe, steps
        device, fixed = material.model.device, method(start).untrained
        copies = {name: t.detach().to(device, torch.float32).clone() for name, t in start.tensors.items()}
        self._parameters = {name: nn.Parameter(t) for name, t in copies.items() if name not in fixed}
        self._fixed = {name: t for name, t in copies.items() if name in fixed}
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.progress = RouterProgress()

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self._parameters.values())

    @property
    def router(self) -> Router:
        """What was learned: of the lowest dev loss if there are dev rows, else the last."""
        return replace(self._start, tensors=self.progress.best or self._values())

    def run(self, checkpoint: Path, identity: str, on_step: Callable[[Step], None]) -> None:
        """Train, from the checkpoint if there is one, until the steps are done or the dev loss no longer falls.

        Every draw is a function of the seed and the number of the step, so a run that was interrupted ends as one that
        was not.

        Raises:
            ValueError: the checkpoint belongs to another run, or a loss or gradient is not finite.
        """
        if checkpoint.is_file():
            self._restore(checkpoint, identity)
        recipe, progress = self._recipe, self.progress
        plan = self._material.rows.plan(recipe.batch_size, steps=self._steps, seed=recipe.seed)
        while progress.steps < self._steps and not self._stalled():
            began, number = time.monotonic(), progress.steps + 1
            with seeded(recipe.seed, number, self._material.model.device) as generator:
                self._step(plan[number - 1], number, generator)
                if self._material.dev and (number == self._steps or self._due(number)):
                    self._measure(*self._material.dev, number)
            progress.seconds += time.monotonic() - began
            if number % recipe.save_every == 0 or number == self._steps:
                self._save(checkpoint, identity)
            on_step(Step(number, self._steps, progress.losses[-1], progress.dev_losses.get(number)))

    def _due(self, number: int) -> bool:
        return bool(self._recipe.eval_every) and number % self._recipe.eval_every == 0

    def _stalled(self) -> bool:
        return bool(self._recipe.patience) and self.progress.without_gain() >= self._recipe.patience

    def _composer(self) -> LearnedComposer:
        return self._method(replace(self._start, tensors={**self._fixed, **self._parameters}))

    def _step(self, rows: Sequence[int], number: int, generator: torch.Generator) -> None:
        material, recipe = self._material, self._recipe
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.rate(number - 1, self._steps)
        weights = material.members.draw(rows, generator)  # (batch, K)
        batch = [material.rows.encoded[row] for row in rows]
        composer = self._composer()
        loss, scratch = composed_loss(material, composer, batch, weights)
        extra = composer.auxiliary_loss(scratch) if recipe.auxiliary else None
        total = loss if extra is None else loss + recipe.auxiliary * extra
        if not torch.isfinite(total):
            raise ValueError(f"the loss of step {number} is {total.item()}: lower the learning rate")
        if total.requires_grad:  # not where every row lost all its adapters
            total.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(self._parameters.values(), recipe.clip)
            if not torch.isfinite(norm):
                raise ValueError(f"the gradient of step {number} is not finite: lower the learning rate")
            self._optimizer.step()
            self._optimizer.zero_grad()
        with torch.no_grad():
            self._replace_fixed(composer.after_step(scratch))
        self.progress.losses.append(loss.item())
        self.progress.auxiliary.append(0.0 if extra is None else extra.item())

    def _replace_fixed(self, values: Mapping[str, Tensor]) -> None:
        if strangers := sorted(set(values) - set(self._fixed)):
            raise LookupError(f"after_step gave {', '.join(strangers)}, which gradients train: list them as untrained")
        self._fixed.update({name: value.detach().to(self._fixed[name]) for name, value in values.items()})

    @torch.no_grad()
    def _measure(self, rows: TaskMixture, members: MemberTable, number: int) -> None:
        loss = mean_loss(self._material, self._composer(), rows, members, self._recipe)
        if not math.isfinite(loss):
            raise ValueError(f"the dev loss after step {number} is {loss}: lower the learning rate")
        self.progress.dev_losses[number] = loss
        if self.progress.best_step == number:
            self.progress.best = self._values()

    def _values(self) -> dict[str, Tensor]:
        tensors = {**self._fixed, **self._parameters}
        return {name: tensors[name].detach().cpu().clone() for name in self._start.tensors}

    def _save(self, path: Path, identity: str) -> None:
        state = {"identity": identity, "tensors": self._values(), "optimizer": self._optimizer.state_dict()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as stream:
            torch.save({**state, "progress": vars(self.progress)}, stream)

    def _restore(self, path: Path, identity: str) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["identity"] != identity:
            raise ValueError(
                f"{path} belongs to another run (other data, adapters, members, base or recipe): delete it or train "
                "with resume=False"
            )
        with torch.no_grad():
            for name, tensor in {**self._fixed, **self._parameters}.items():
                tensor.copy_(state["tensors"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.progress = RouterProgress(**state["progress"])


def composed_loss(
    material: Material,
    composer: LearnedComposer,
    batch: Sequence[EncodedExample],
    weights: Tensor,
    reduction: str = "mean",
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The loss of a batch on the base under its compositions, and what the gates noted in that pass."""
    model = material.model
    weights = weights.to(next(iter(material.banks.values())).A)
    deltas = composer.compose(material.banks, weights)
    with model_lock(model), attach(model, deltas, prompt_mask(batch, model)) as attached:
        loss = response_loss(model, batch, material.pad_id, reduction=reduction)
        return loss, dict(attached.scratch)


def prompt_mask(batch: Sequence[EncodedExample], model: PreTrainedModel) -> Tensor:
    """The tokens that belong to the prompts, (batch, seq) bool, in rows padded on the right.

    An encoder reads nothing but prompts; the other models read the responses behind them.
    """
    width = max(len(e.prompt) if model.config.is_encoder_decoder else e.length for e in batch)
    ends = torch.tensor([len(e.prompt) for e in batch], device=model.device)
    return torch.arange(width, device=model.device) < ends[:, None]


def mean_loss(
    material: Material, composer: LearnedComposer, rows: TaskMixture, members: MemberTable, recipe: RouterRecipe
) -> float:
    """Loss a response token over all rows, no adapter dropped; always the same members for a seed."""
    order = sorted(range(len(rows.encoded)), key=lambda i: rows.encoded[i].length)
    generator = torch.Generator().manual_seed(recipe.seed)
    total = 0.0
    for start in range(0, len(order), recipe.batch_size):
        places = order[start : start + recipe.batch_size]
        weights = members.draw(places, generator, dropout=False)
        batch = [rows.encoded[i] for i in places]
        total += composed_loss(material, composer, batch, weights, reduction="sum")[0].item()
    return total / sum(len(e.response) for e in rows.encoded)


@contextmanager
def seeded(seed: int, number: int, device: torch.device) -> Iterator[torch.Generator]:
    """A generator of this step's own, and the global ones seeded alike; the caller's are given back unchanged."""
    mixed = (seed * 1_000_003 + number) % 2**63
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(mixed)
        yield torch.Generator().manual_seed(mixed)
