"""RouterLoRA: one pair of factors per module that scores ranks of any adapter, whichever the pool holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from loracompose.composition.bank import RankBank
from loracompose.composition.linalg import working_dtype
from loracompose.composition.router import Router
from loracompose.composition.settings import check_choice

Elsewhere = Literal["refuse", "untrained"]


@dataclass(frozen=True, eq=False)
class RouterPair:
    """The router's factors for one module: queries are A x, keys are Bᵀ v.

    Attributes:
        A: (q, d_in).
        B: (d_out, q).
    """

    A: Tensor
    B: Tensor

    def key(self, directions: Tensor) -> Tensor:
        """Bᵀ v / √q for columns v (d_out, R) of an output space, (q, R), in float32 or better, where v is."""
        dtype = working_dtype(directions, self.B)
        key: Tensor = self.B.to(directions.device, dtype).mT @ directions.to(dtype) / self.B.shape[1] ** 0.5
        return key


def draw_pairs(banks: Mapping[str, RankBank], rank: int, seed: int) -> dict[str, Tensor]:
    """Pairs for every linear module: A Kaiming-uniform with a = √5, B zero, so that every score starts at 0.

    The first gradient reaches B alone (a score is bilinear in A and B); A learns from the second step on.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for module in sorted(banks):
        bank = banks[module]
        if bank.kind != "linear":
            continue
        d_out, d_in = bank.B.shape[0], bank.A.shape[1]
        bound = d_in**-0.5  # what kaiming_uniform_(a=√5) comes to
        tensors[f"{module}.A"] = torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)
        tensors[f"{module}.B"] = torch.zeros(d_out, rank)
    return tensors


def find_pair(router: Router, bank: RankBank, used: bool, elsewhere: Elsewhere) -> RouterPair | None:
    """The router's pair for a module; None where ranks are not scored.

    Args:
        router: has the tensors "<module>.A" and "<module>.B".
        bank: the ranks of the module.
        used: whether a row uses any of them; a module that no row uses needs no pair.
        elsewhere: what to do with a linear module that the router was not trained on.

    Raises:
        LookupError: the router has no pair for the module and `elsewhere` is "refuse".
        ValueError: a tensor has another shape.
    """
    if bank.kind != "linear" or not used:
        return None
    if f"{bank.module}.A" not in router.tensors and elsewhere == "untrained":
        return None
    if f"{bank.module}.A" not in router.tensors:
        raise LookupError(
            f"the {router.method} router was trained on {router.base_model} without the module {bank.module!r}: leave "
            "out the adapters that adapt it, train the router with one of them, or set elsewhere='untrained' to "
            "gate such modules as a router does before its first step"
        )
    rank = int(router.settings["rank"])
    A = router.tensor(f"{bank.module}.A", (rank, bank.A.shape[1]))
    return RouterPair(A.to(working_dtype(A, bank.A)), router.tensor(f"{bank.module}.B", (bank.B.shape[0], rank)))


def check_elsewhere(owner: str, value: object) -> None:
    """Raise a ValueError unless the value is one of `Elsewhere`."""
    check_choice(owner, "elsewhere", value, get_args(Elsewhere))
