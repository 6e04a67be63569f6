"""Ways to run a batch of compositions: the base model without any, and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from loracompose.adapters.lora import Adapter
from loracompose.benchmarks.speed.case import Case
from loracompose.composers import Composer
from loracompose.composition.bank import content_order, gather_banks
from loracompose.composition.delta import LowRankDelta
from loracompose.runtime.attach import attach
from loracompose.runtime.first_pass import CACHE
from loracompose.runtime.machine import Machine
from loracompose.runtime.plan import Wanted

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""(token ids (rows, seq), the cache of the tokens before, None at first) -> (logits (rows, vocabulary), cache)."""

Computes = Literal["the mixture", "something else"]


class Way(Protocol):
    """A way to run a batch."""

    @property
    def name(self) -> str:
        """For the report."""
        ...

    @property
    def computes(self) -> Computes:
        """Whether it is "the mixture", the weighted sum of each row's adapters: such ways must agree."""
        ...

    @property
    def once(self) -> float:
        """Seconds spent before the first batch with these sets that a second such batch does not spend."""
        ...

    @property
    def slow(self) -> bool:
        """Whether to take few steps at a time."""
        ...

    def ready(self) -> AbstractContextManager[Step]:
        """What runs tokens, as long as the block lasts."""
        ...


def run(model: PreTrainedModel, ids: Tensor, cache: Any, **extra: Any) -> tuple[Tensor, Any]:
    """One pass of the model over tokens that follow those in the cache."""
    held = DynamicCache(config=model.config) if cache is None else cache
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: held}, **extra)
    return out.logits[:, -1], held


def cropped(cache: Any, length: int) -> Any:
    """The cache cut back to its first tokens; of a list, each."""
    for part in cache if isinstance(cache, list) else [cache]:
        part.crop(length)
    return cache


@dataclass(frozen=True, eq=False)
class Base:
    """The base model without adapters."""

    model: PreTrainedModel
    name: str = "base model"
    computes: Computes = "something else"
    once: float = 0.0
    slow: bool = False

    @contextmanager
    def ready(self) -> Iterator[Step]:
        """See `Way`."""
        yield lambda ids, cache: run(self.model, ids, cache)


@dataclass(frozen=True, eq=False)
class Ours:
    """A composer's deltas, put on the model for the length of the block; composing is timed with it.

    As in the engine, the plan is not told how many tokens will follow, so it folds nothing into the weights by itself.
    `machine` is what it counts with.
    """

    model: PreTrainedModel
    adapters: Sequence[Adapter]
    case: Case
    composer: Composer
    form: Wanted = "auto"
    machine: Machine | None = None
    name: str = "loracompose"
    computes: Computes = "the mixture"
    once: float = 0.0
    slow: bool = False

    def deltas(self) -> Mapping[str, LowRankDelta]:
        """The batch, composed."""
        order = content_order(self.adapters)
        banks = gather_banks([self.adapters[i] for i in order])
        return self.composer.compose(banks, self.case.weights()[:, order].to(self.model.device))

    @contextmanager
    def ready(self) -> Iterator[Step]:
        """See `Way`."""
        with attach(self.model, self.deltas(), form=self.form, machine=self.machine):
            yield lambda ids, cache: run(self.model, ids, cache)


def on_model(adapters: Sequence[Adapter], model: PreTrainedModel) -> list[Adapter]:
    """The adapters on the device of the model and in its dtype."""
    from loracompose.adapters.checkpoint import convert

    return [convert(adapter, model.device, torch.promote_types(model.dtype, torch.float32)) for adapter in adapters]
