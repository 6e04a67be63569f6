"""LoraRetriever's mixture and fusion as its code writes them, and merging into the weights for every prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loracompose.adapters.lora import Adapter
from loracompose.benchmarks.speed.case import Case
from loracompose.benchmarks.speed.ways import Computes, Step, run
from loracompose.composition.bank import RankBank, gather_banks


def stacked(bank: RankBank, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All adapters of a module, shorter ones filled up with zeros: A (p, r, d_in), B (p, d_out, r)."""
    widest = max(part.rank for _, part in bank.present)
    _, first = bank.present[0]
    A = first.A.new_zeros(bank.n_adapters, widest, first.d_in)
    B = first.B.new_zeros(bank.n_adapters, first.d_out, widest)
    for i, part in bank.present:
        A[i, : part.rank], B[i, :, : part.rank] = part.A, part.B
    return A.to(dtype), B.to(dtype)


@dataclass(frozen=True, eq=False)
class Einsum:
    """arXiv:2402.09997, its `composition` module: every adapter on every row, kept apart until the last product.

    mixture: bld,prd->blpr then blpr,pdr->blpd then blpd,bp->bld; fusion: bp,prd->brd and bp,pdr->bdr, then as a LoRA.
    """

    model: PreTrainedModel
    adapters: Sequence[Adapter]
    case: Case
    kind: Literal["mixture", "fusion"]
    once: float = 0.0
    slow: bool = False

    @property
    def name(self) -> str:
        """For the report."""
        return f"LoraRetriever's einsum, {self.kind}"

    @property
    def computes(self) -> Computes:
        """See `Way`."""
        return "the mixture" if self.kind == "mixture" else "something else"

    @contextmanager
    def ready(self) -> Iterator[Step]:
        """See `Way`."""
        weights = self.case.weights().to(self.model.device, self.model.dtype)  # (b, p)
        with ExitStack() as hooks:
            for path, bank in gather_banks(self.adapters).items():
                A, B = stacked(bank, self.model.dtype)
                module = self.model.get_submodule(path)
                hooks.callback(module.register_forward_hook(self._hook(A, B, weights)).remove)
            yield lambda ids, cache: run(self.model, ids, cache)

    def _hook(self, A: Tensor, B: Tensor, weights: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def mixture(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            h = torch.einsum("bld,prd->blpr", args[0], A)
            each = torch.einsum("blpr,pdr->blpd", h, B)
            return output + torch.einsum("blpd,bp->bld", each, weights)

        def fusion(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            own_A, own_B = torch.einsum("bp,prd->brd", weights, A), torch.einsum("bp,pdr->bdr", weights, B)
            return output + args[0] @ own_A.mT @ own_B.mT

        return mixture if self.kind == "mixture" else fusion


@dataclass(frozen=True, eq=False)
class MergeAndRestore:
    """Row by row: add the row's update to the weights, run the row, put the weights back from a copy."""

    model: PreTrainedModel
    adapters: Sequence[Adapter]
    case: Case
    name: str = "merge into the weights and restore, row by row"
    computes: Computes = "the mixture"
    once: float = 0.0
    slow: bool = True

    @contextmanager
    def ready(self) -> Iterator[Step]:
        """See `Way`."""
        banks = gather_banks(self.adapters)
        weights = self.case.weights()

        def step(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
            caches = [None] * len(ids) if cache is None else cache
            found = []
            for row, held in enumerate(caches):
                with self._merged(banks, weights[row : row + 1]):
                    found.append(run(self.model, ids[row : row + 1], held))
            return torch.cat([logits for logits, _ in found]), [held for _, held in found]

        yield step

    @contextmanager
    def _merged(self, banks: Mapping[str, RankBank], weights: Tensor) -> Iterator[None]:
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            for path, bank in banks.items():
                w = bank.per_rank(weights)[0]
                weight = self.model.get_submodule(path).get_parameter("weight")
                kept.append((weight, weight.clone()))
                used = w != 0
                weight += ((bank.B[:, used] * w[used]) @ bank.A[used]).to(weight)
            yield
        finally:
            for weight, before in kept:
                weight.copy_(before)
