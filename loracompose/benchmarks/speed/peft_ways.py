"""The ways that PEFT offers."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from loracompose.benchmarks.speed.case import Case
from loracompose.benchmarks.speed.ways import Computes, Step, run


def peft_model(model: PreTrainedModel, folders: Sequence[Path], k: int) -> PeftModel:
    """A PEFT model with all adapters at strength 1/k, over the weights of `model`, which stays as it is."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    own = copy.deepcopy(model, memo=shared)  # modules of its own, for PEFT rebuilds them
    first, *others = folders
    made = PeftModel.from_pretrained(own, str(first), adapter_name=first.name, autocast_adapter_dtype=False)
    for folder in others:
        made.load_adapter(str(folder), adapter_name=folder.name, autocast_adapter_dtype=False)
    for module in made.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_A:
                module.set_scale(name, 1 / k)
    return made.to(dtype=model.dtype).eval()


@dataclass(frozen=True, eq=False)
class PeftOne:
    """One adapter, the same for all rows."""

    peft: PeftModel
    adapter: str
    name: str = "PEFT, one adapter for all rows"
    computes: Computes = "something else"
    once: float = 0.0
    slow: bool = False

    @contextmanager
    def ready(self) -> Iterator[Step]:
        """See `Way`."""
        self.peft.base_model.set_adapter([self.adapter])
        yield lambda ids, cache: run(self.peft, ids, cache)


@dataclass(frozen=True, eq=False)
class PeftNames:
    """`adapter_names`: one adapter for each row."""

    peft: PeftModel
    row_adapters: Sequence[str]
    name: str = "PEFT adapter_names, one adapter a row"
    computes: Computes = "something else"
    once: float = 0.0
    slow: bool = False

    @contextmanager
    def ready(self) -> Iterator[Step]:
        """See `Way`."""
        yield lambda ids, cache: run(self.peft, ids, cache, adapter_names=list(self.row_adapters))


@dataclass(frozen=True, eq=False)
class PeftLoop:
    """Row by row, `set_adapter` with the row's adapters before each pass."""

    peft: PeftModel
    row_sets: Sequence[Sequence[str]]
    name: str = "PEFT set_adapter, row by row"
    computes: Computes = "the mixture"
    once: float = 0.0
    slow: bool = True

    @contextmanager
    def ready(self) -> Iterator[Step]:
        """See `Way`."""

        def step(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
            caches = [None] * len(ids) if cache is None else cache
            found = []
            for row, (members, held) in enumerate(zip(self.row_sets, caches, strict=True)):
                self.peft.base_model.set_adapter(list(members))
                found.append(run(self.peft, ids[row : row + 1], held))
            return torch.cat([logits for logits, _ in found]), [held for _, held in found]

        yield step


def merged(
    peft: PeftModel, case: Case, names: Sequence[str], kind: str, *, at_most: int | None = None
) -> tuple[PeftNames, float]:
    """`add_weighted_adapter` for every distinct set, then `adapter_names`.

    Args:
        peft: all adapters at strength 1/k; gains the merged ones.
        case: the sets.
        names: of the adapters.
        kind: PEFT's combination type.
        at_most: merge so many sets only and let all rows share them; for merges that take minutes.

    Returns:
        The way, and the seconds that merging one set took, on average.
    """
    distinct = list(dict.fromkeys(case.sets()))[:at_most]
    made = {members: f"{kind}{number}" for number, members in enumerate(distinct)}
    largest = max(case.ranks)
    start = time.perf_counter()
    for members, name in made.items():
        extra = {"svd_rank": largest} if kind == "svd" else {}
        peft.add_weighted_adapter([names[i] for i in members], [1.0] * case.k, name, combination_type=kind, **extra)
    each = (time.perf_counter() - start) / len(made)
    peft.to(dtype=peft.dtype).eval()
    rows = [made.get(members, made[distinct[0]]) for members in case.sets()]
    exact = kind == "cat" and at_most is None
    total = each * len(set(case.sets()))
    return (
        PeftNames(
            peft,
            rows,
            f"PEFT add_weighted_adapter({kind}), then adapter_names",
            "the mixture" if exact else "something else",
            once=total,
        ),
        each,
    )
