"""How one adapter is trained, as a value: its fields are the hyper-parameters, its JSON the record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from loracompose.training.beam_settings import BeamSettings

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of `train_adapter`.

    Attributes:
        rank: rank of every LoRA factor.
        alpha: LoRA alpha; None is twice the rank.
        target_modules: endings of the names of the adapted modules.
        epochs: passes over the data; not used where `steps` is given.
        steps: optimizer steps, instead of `epochs`.
        batch_size: examples a step.
        learning_rate: of AdamW, reached after `warmup` steps.
        warmup: steps over which the learning rate rises linearly.
        schedule: how it falls afterwards, to zero at the end ("constant": it does not).
        weight_decay: of AdamW.
        clip: largest norm of a step's gradient.
        dropout: LoRA dropout.
        max_length: rows with more tokens, prompt and response together, are left out (and counted).
        seed: of the initial factors, the order of the data and the dropout.
        dtype: of the frozen base; "auto" is bfloat16 on CUDA and float32 on a CPU. Factors train in float32.
        eval_every: steps between two measurements of the dev loss; 0 measures it at the end only.
        save_every: steps between two checkpoints.
        beam: settings of BeamLoRA, if the adapter is trained so; None is plain LoRA.

    Raises:
        ValueError: a value is out of its range.
    """

    rank: int = 8
    alpha: float | None = None
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup: int = 10
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    dropout: float = 0.0
    max_length: int = 512
    seed: int = 0
    dtype: str = "auto"
    eval_every: int = 0
    save_every: int = 20
    beam: BeamSettings | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name, low in (("rank", 1), ("batch_size", 1), ("max_length", 2), ("save_every", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("warmup", "eval_every", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "clip", "epochs", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        self._check_rest()

    def _check_rest(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}, got {self.schedule!r}")
        if not self.target_modules:
            raise ValueError("target_modules is empty: name at least one, such as q_proj")

    @property
    def lora_alpha(self) -> float:
        """The alpha in use."""
        return 2 * self.rank if self.alpha is None else self.alpha

    def rate(self, step: int, total: int) -> float:
        """Learning rate of one step, counted from 0, of `total`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        left = max(total - self.warmup, 1)
        done = (step - self.warmup) / left
        match self.schedule:
            case "cosine":
                return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
            case "linear":
                return self.learning_rate * (1 - done)
            case "constant":
                return self.learning_rate
