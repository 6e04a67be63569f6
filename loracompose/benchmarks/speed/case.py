"""What is timed: a batch, its sets of adapters, and adapters of unequal ranks and modules made for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loracompose.adapters.checkpoint import save_adapter
from loracompose.adapters.lora import Adapter, LoraFactors
from loracompose.composition.layers import layer_of
from loracompose.runtime.fitting import module_shape

Targets = Literal["mixed", "qv", "all"]

ATTENTION = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY = (*ATTENTION[1], "gate_proj", "up_proj", "down_proj")
TARGETS: Mapping[Targets, Sequence[Sequence[str]]] = {
    "mixed": (*ATTENTION, EVERY),
    "qv": ATTENTION[:1],
    "all": (EVERY,),
}


@dataclass(frozen=True)
class Case:
    """One batch.

    Attributes:
        rows: prompts that run together.
        k: adapters of each row, each with weight 1/k.
        distinct: different sets among the rows; row i has set i modulo `distinct`.
        ranks: of the adapters, in turn.
        targets: modules of the adapters: "mixed" gives them two, four and all seven kinds in turn.
        tokens: of each prompt.
        steps: decoding steps that one measurement takes together.

    Raises:
        ValueError: a number that is out of range.
    """

    rows: int = 16
    k: int = 3
    distinct: int = 16
    ranks: tuple[int, ...] = (4, 8, 16)
    targets: Targets = "mixed"
    tokens: int = 64
    steps: int = 8

    def __post_init__(self) -> None:
        for field in ("rows", "k", "distinct", "tokens", "steps"):
            if getattr(self, field) < 1:
                raise ValueError(f"Case: {field} must be at least 1, got {getattr(self, field)}")
        if self.distinct > self.rows:
            raise ValueError(f"Case: {self.distinct} distinct sets do not fit {self.rows} rows")

    @property
    def adapters(self) -> int:
        """How many adapters there are in all sets together."""
        return self.k if self.distinct == 1 else max(self.distinct, self.k + 1)

    def sets(self) -> list[tuple[int, ...]]:
        """The adapters of each row."""
        distinct = [tuple((i + j) % self.adapters for j in range(self.k)) for i in range(self.distinct)]
        return [distinct[row % self.distinct] for row in range(self.rows)]

    def weights(self) -> Tensor:
        """(rows, adapters)."""
        weights = torch.zeros(self.rows, self.adapters)
        for row, members in enumerate(self.sets()):
            weights[row, list(members)] = 1 / self.k
        return weights


def make_adapters(case: Case, model: PreTrainedModel, seed: int = 0) -> list[Adapter]:
    """Random adapters for a model, small enough not to drown it."""
    shapes = {path: module_shape(module) for path, module in model.named_modules() if layer_of(path)}
    random = torch.Generator().manual_seed(seed)
    made = []
    for number in range(case.adapters):
        rank = case.ranks[number % len(case.ranks)]
        kinds = TARGETS[case.targets][number % len(TARGETS[case.targets])]
        factors = {}
        for path, shape in shapes.items():
            if shape is None or path.rpartition(".")[2] not in kinds:
                continue
            _, d_in, d_out = shape
            A = torch.randn(rank, d_in, generator=random) / d_in**0.5
            factors[path] = LoraFactors(A, 0.1 * torch.randn(d_out, rank, generator=random))
        if not factors:
            raise LookupError(f"{type(model).__name__} has none of the modules {', '.join(kinds)}")
        made.append(Adapter(f"adapter{number:03d}", factors, base_model=str(model.config.name_or_path)))
    return made


def write_adapters(adapters: Sequence[Adapter], folder: Path) -> list[Path]:
    """The same adapters as PEFT folders."""
    return [save_adapter(adapter, folder / adapter.name) for adapter in adapters]
