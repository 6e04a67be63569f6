"""The plain values everything else works on: the factors of one module and the adapter that owns them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["linear", "embedding"]


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The update of one module, delta_W = B @ A exactly, with the LoRA scaling already folded into B.

    For `kind="linear"` A is (r, d_in) and B is (d_out, r): the module's output gains `B (A x)`.
    For `kind="embedding"` d_in is the vocabulary size and `A x` is a lookup of the columns of A by token id.

    Raises:
        ValueError: A or B is not a matrix, or their ranks differ.
    """

    A: Tensor
    B: Tensor
    kind: Kind = "linear"

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                f"A must be (r, d_in) and B (d_out, r), got A {tuple(self.A.shape)} and B {tuple(self.B.shape)}"
            )

    @property
    def rank(self) -> int:
        """Number of ranks r: one row of A with one column of B each."""
        return self.A.shape[0]

    @property
    def d_in(self) -> int:
        """Input width, or the vocabulary size of an embedding."""
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        """Output width."""
        return self.B.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that A and B occupy."""
        return self.A.nbytes + self.B.nbytes

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LoraFactors:
        """The same factors on a device and in a dtype; self if nothing changes.

        A B of another dtype lies in memory rank after rank, as the operator reads it.
        """
        A, B = self.A.to(device=device, dtype=dtype), self.B
        if dtype not in (None, B.dtype):
            B = B.mT.to(dtype, memory_format=torch.contiguous_format).mT
        B = B.to(device)
        return self if A is self.A and B is self.B else replace(self, A=A, B=B)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA adapter as plain tensors: module path in the base model -> factors.

    `fingerprint` is the identity of an adapter: a sha256 over its sorted modules, kinds, shapes, dtypes and
    folded tensors. A copy moved or rounded by `to` keeps the fingerprint of the content it came from, as
    `known_fingerprint`; who replaces the factors by others must replace that by None.
    """

    name: str
    factors: Mapping[str, LoraFactors]
    base_model: str = ""
    task_type: str | None = None
    recipe: Mapping[str, Any] | None = None
    known_fingerprint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        ordered = {module: self.factors[module] for module in sorted(self.factors)}
        object.__setattr__(self, "factors", MappingProxyType(ordered))

    @cached_property
    def fingerprint(self) -> str:
        """Content identity, 64 hexadecimal digits."""
        return self.known_fingerprint or fingerprint(self.factors)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(f.nbytes for f in self.factors.values())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Adapter:
        """A copy with every factor on a device and in a dtype; the fingerprint stays."""
        factors = {module: f.to(device, dtype) for module, f in self.factors.items()}
        return replace(self, factors=factors, known_fingerprint=self.fingerprint)


def fingerprint(factors: Mapping[str, LoraFactors]) -> str:
    """sha256 over sorted (module, kind, shape, dtype, A, B) of folded factors."""
    digest = hashlib.sha256()
    for module in sorted(factors):
        f = factors[module]
        for tensor in (f.A, f.B):
            head = f"{module}\0{f.kind}\0{tuple(tensor.shape)}\0{tensor.dtype}\0"
            digest.update(head.encode())
            if tensor.numel():
                # flat: a column that is a row elsewhere is contiguous with any stride, and bytes take a stride of 1
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().data)  # no copy
    return digest.hexdigest()
