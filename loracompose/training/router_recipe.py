"""How a router is trained, as a value: its fields are the hyper-parameters, its JSON the record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from loracompose.training.recipe import Recipe, Schedule

Members = Literal["all", "own", "random", "retrieved"]


@dataclass(frozen=True)
class RouterRecipe:
    """Hyper-parameters of `train_router`; those of the method are its settings.

    Attributes:
        steps: optimizer steps, instead of `epochs`.
        epochs: passes over the data; not used where `steps` is given.
        batch_size: examples a step.
        learning_rate: of AdamW, reached after `warmup` steps.
        warmup: steps over which the learning rate rises linearly.
        schedule: how it falls afterwards.
        weight_decay: of AdamW.
        clip: largest norm of a step's gradient.
        auxiliary: factor of the method's auxiliary loss.
        tasks: only these tasks of the data; all if none is named.
        per_task: at most so many rows of each task; None takes all.
        dev_per_task: the same of the dev rows.
        max_length: rows with more tokens, prompt and response together, are left out (and counted).
        members: which adapters a row has: "all"; "own", the one that is named as the row's task; "random", its own and
            k - 1 others drawn anew each time; "retrieved", the k best that an index finds for the prompt, with the
            weights that it gives them. Members of equal standing share the weight 1 equally.
        k: adapters of a row, for "random" and "retrieved".
        hide_own: probability that a row must do without its own adapter, as if it had never been uploaded.
        adapter_dropout: probability that a member is dropped from a row for a step; the weights of those left are
            scaled to the old sum.
        keep_one: where all are dropped, keep one; False leaves the base model.
        seed: of the router's start, the draw and order of the data, and the members.
        dtype: of the frozen base; "auto" is bfloat16 on CUDA and float32 on a CPU. Routers train in float32.
        eval_every: steps between two measurements of the dev loss; 0 measures it at the end only.
        patience: measurements without a new lowest dev loss after which training stops; 0 never stops early. It
            needs dev rows; with them the router of the lowest dev loss is kept.
        save_every: steps between two checkpoints.

    Raises:
        ValueError: a value is out of its range.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup: int = 10
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    auxiliary: float = 1.0
    tasks: tuple[str, ...] = ()
    per_task: int | None = None
    dev_per_task: int | None = None
    max_length: int = 512
    members: Members = "all"
    k: int = 3
    hide_own: float = 0.0
    adapter_dropout: float = 0.0
    keep_one: bool = True
    seed: int = 0
    dtype: str = "auto"
    eval_every: int = 0
    patience: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        self._optimizer()  # checks what it shares with a recipe
        for name in ("hide_own", "adapter_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, got {getattr(self, name)}")
        for name, low in (("per_task", 1), ("dev_per_task", 1), ("k", 1), ("patience", 0)):
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 <= self.auxiliary < math.inf:
            raise ValueError(f"auxiliary must be finite and not negative, got {self.auxiliary}")
        if self.members not in get_args(Members):
            raise ValueError(f"members must be one of {', '.join(get_args(Members))}, got {self.members!r}")
        if self.members == "own" and self.hide_own:
            raise ValueError('members="own" leaves a row nothing if hide_own is above 0; choose other members')
        if self.patience and not self.eval_every:
            raise ValueError("patience counts measurements of the dev loss: set eval_every")

    def rate(self, step: int, total: int) -> float:
        """Learning rate of one step, counted from 0, of `total`."""
        return self._optimizer().rate(step, total)

    def _optimizer(self) -> Recipe:
        return Recipe(
            steps=self.steps,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            clip=self.clip,
            max_length=self.max_length,
            eval_every=self.eval_every,
            save_every=self.save_every,
        )
