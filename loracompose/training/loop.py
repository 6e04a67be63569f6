"""The optimizer loop: steps, checkpoints and an exact continuation after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loracompose.durable import whole_file
from loracompose.training.batches import batch_plan, response_loss
from loracompose.training.data import EncodedExample
from loracompose.training.recipe import Recipe


@dataclass(frozen=True)
class Step:
    """What one optimizer step came to: `number` counts from 1, `loss` is a mean over response tokens."""

    number: int
    total: int
    loss: float
    dev_loss: float | None = None


@dataclass
class Progress:
    """Losses so far; grows with the steps and is part of a checkpoint."""

    losses: list[float] = field(default_factory=list)
    dev_losses: dict[int, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.losses)


class Method(Protocol):
    """What a training method adds to the steps of plain LoRA; what it does in the forward pass is its own affair."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What it trains besides the parameters of the model, by names of its own."""

    def after_step(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after optimizer step `number`, counted from 1, before the dev loss and the checkpoint."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides parameters and optimizer: tensors and plain values in containers."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from such a state, whose tensors lie on the CPU."""


def run_steps(
    model: PreTrainedModel,
    recipe: Recipe,
    examples: Sequence[EncodedExample],
    *,
    steps: int,
    pad_id: int,
    dev: Sequence[EncodedExample] = (),
    checkpoint: Path,
    identity: str,
    on_step: Callable[[Step], None] | None = None,
    method: Method | None = None,
) -> Progress:
    """Train the parameters that require a gradient; a run continued from `checkpoint` equals one never interrupted.

    Uses the global random state (for dropout): the caller forks and seeds it.

    Args:
        model: the base with its LoRA factors.
        recipe: the hyper-parameters.
        examples: what to learn.
        steps: optimizer steps in all.
        pad_id: token that fills a batch up; masked everywhere.
        dev: examples to measure the loss on.
        checkpoint: file to continue from, if it exists, and to write.
        identity: what the run depends on; a checkpoint with another one is refused.
        on_step: called after every step; an exception it raises stops the run, which can be resumed.
        method: trained and called along; None is plain LoRA.

    Raises:
        ValueError: the checkpoint belongs to another run, or the loss is not finite.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if method is not None:
        parameters |= method.parameters
    optimizer = torch.optim.AdamW(parameters.values(), lr=1.0, weight_decay=recipe.weight_decay)
    progress = _restore(checkpoint, identity, parameters, optimizer, method) if checkpoint.is_file() else Progress()
    plan = batch_plan([e.length for e in examples], recipe.batch_size, steps=steps, seed=recipe.seed)
    for number in range(progress.steps + 1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(number - 1, steps)
        batch = [examples[index] for index in plan[number - 1]]
        progress.losses.append(_step(model, optimizer, batch, pad_id, recipe.clip, number))
        if method is not None:
            method.after_step(number, optimizer)
        if dev and (number == steps or (recipe.eval_every and number % recipe.eval_every == 0)):
            progress.dev_losses[number] = mean_loss(model, dev, pad_id, recipe.batch_size)
        if number % recipe.save_every == 0 or number == steps:
            _save(checkpoint, identity, parameters, optimizer, progress, method)
        if on_step is not None:
            on_step(Step(number, steps, progress.losses[-1], progress.dev_losses.get(number)))
    return progress


@torch.no_grad()
def mean_loss(model: PreTrainedModel, examples: Sequence[EncodedExample], pad_id: int, batch_size: int) -> float:
    """Loss a response token over all examples, without dropout."""
    model.eval()
    ordered = sorted(examples, key=lambda example: example.length)
    total = sum(
        response_loss(model, ordered[start : start + batch_size], pad_id, reduction="sum").item()
        for start in range(0, len(ordered), batch_size)
    )
    return float(total / sum(len(example.response) for example in examples))


def _step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[EncodedExample],
    pad_id: int,
    clip: float,
    number: int,
) -> float:
    model.train()
    loss = response_loss(model, batch, pad_id)
    if not torch.isfinite(loss):
        raise ValueError(f"the loss of step {number} is {loss.item()}: lower the learning rate")
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _save(
    path: Path,
    identity: str,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    method: Method | None,
) -> None:
    state: dict[str, Any] = {
        "identity": identity,
        "parameters": {name: p.detach() for name, p in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "losses": progress.losses,
        "dev_losses": progress.dev_losses,
        "method": None if method is None else method.state(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as stream:
        torch.save(state, stream)


def _restore(
    path: Path,
    identity: str,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    method: Method | None,
) -> Progress:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["identity"] != identity:
        raise ValueError(
            f"{path} belongs to another run (other data, base or recipe): delete it or train with resume=False"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    if method is not None:
        method.restore(state["method"])
    torch.set_rng_state(state["random"])
    if state["random_cuda"]:
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return Progress(state["losses"], state["dev_losses"])
