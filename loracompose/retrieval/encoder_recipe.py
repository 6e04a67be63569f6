"""How a sentence encoder is trained, as a value: its fields are the hyper-parameters, its JSON the record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

View = Literal["both", "instructed", "plain"]


@dataclass(frozen=True)
class EncoderRecipe:
    """Hyper-parameters of `train_retriever`; the paper names none of them.

    Attributes:
        epochs: how often every example occurs in a pair.
        batch_size: most pairs a step; a pair has twice as many negatives as there are other pairs.
        learning_rate: of AdamW, reached after `warmup` steps, falling linearly to zero.
        temperature: what similarities are divided by.
        warmup: steps over which the learning rate rises.
        weight_decay: of AdamW.
        clip: largest norm of a step's gradient.
        depth: part of the layers that is trained, counted from the last, rounded up; token embeddings never are.
        max_length: texts are cut after so many tokens in training; the encoder itself keeps its own length.
        views: whether texts are trained on with the instruction before them, without, or, by turns from batch to
            batch, both: an index compares both of whole prompts.
        seed: of the drawn adapters, the pairs, their order and the dropout.
        save_every: steps between two checkpoints.

    Raises:
        ValueError: a value is out of its range.
    """

    epochs: int = 3
    batch_size: int = 24
    learning_rate: float = 1e-4
    temperature: float = 0.05
    warmup: int = 10
    weight_decay: float = 0.01
    clip: float = 1.0
    depth: float = 0.5
    max_length: int = 64
    views: View = "both"
    seed: int = 0
    save_every: int = 20

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 3), ("max_length", 8), ("save_every", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        for name in ("warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "temperature", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 < self.depth <= 1:
            raise ValueError(f"depth must be in (0, 1], got {self.depth}")
        if self.views not in get_args(View):
            raise ValueError(f"views must be one of {', '.join(get_args(View))}, got {self.views!r}")
