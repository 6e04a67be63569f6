"""Hostile pools of small adapters in float64, and the dense updates that oracles work on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter, LoraFactors

SHAPES = {"q": (12, 9), "k": (12, 9), "v": (7, 11), "o": (12, 9)}  # module -> d_in, d_out


def random_adapter(
    name: str, rank: int, *, seed: int, modules: Sequence[str] = tuple(SHAPES), norm: float = 1.0
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = {m: LoraFactors(norm * draw(rank, SHAPES[m][0]), draw(SHAPES[m][1], rank)) for m in modules}
    return Adapter(name, factors)


def hostile_pool() -> list[Adapter]:
    """Unequal ranks, unequal norms, missing modules."""
    return [
        random_adapter("two", 2, seed=1),
        random_adapter("three", 3, seed=2, modules=("q", "k", "v"), norm=0.1),
        random_adapter("four", 4, seed=3, modules=("q", "o"), norm=30.0),
    ]


def zero_adapter(rank: int = 2) -> Adapter:
    zeros = {
        m: LoraFactors(torch.zeros(rank, i, dtype=torch.float64), torch.zeros(o, rank, dtype=torch.float64))
        for m, (i, o) in SHAPES.items()
    }
    return Adapter("zero", zeros)


def regauged(adapter: Adapter, *, seed: int = 0) -> Adapter:
    """The same updates from other factors: A to M A, B to B M⁻¹."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, f in adapter.factors.items():
        M = torch.randn(f.rank, f.rank, generator=generator, dtype=torch.float64) + 2 * torch.eye(f.rank)
        factors[module] = LoraFactors(M @ f.A, f.B @ torch.linalg.inv(M))
    return Adapter(adapter.name, factors)


def permuted(adapter: Adapter) -> Adapter:
    """The same adapter with its ranks in another order."""
    factors = {m: LoraFactors(f.A.flip(0), f.B.flip(1)) for m, f in adapter.factors.items()}
    return Adapter(adapter.name, factors)


def halves(adapter: Adapter) -> list[Adapter]:
    """Two adapters that split the ranks of one."""
    first = {m: LoraFactors(f.A[: f.rank // 2], f.B[:, : f.rank // 2]) for m, f in adapter.factors.items()}
    second = {m: LoraFactors(f.A[f.rank // 2 :], f.B[:, f.rank // 2 :]) for m, f in adapter.factors.items()}
    return [Adapter("first", first), Adapter("second", second)]


def update(adapter: Adapter, module: str) -> Tensor:
    """delta_W, (d_out, d_in); zeros where the adapter does not have the module."""
    d_in, d_out = SHAPES[module]
    if module not in adapter.factors:
        return torch.zeros(d_out, d_in, dtype=torch.float64)
    return adapter.factors[module].B @ adapter.factors[module].A


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float], module: str) -> Tensor:
    total = torch.zeros_like(update(adapters[0], module))
    for adapter, w in zip(adapters, weights, strict=True):
        total += w * update(adapter, module)
    return total


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> bool:
    """Whether they agree relative to the norm of what was wanted."""
    return (got - want).norm().item() <= tolerance * max(want.norm().item(), 1e-30)


def same_updates(one: Adapter, other: Adapter, tolerance: float = 1e-10) -> bool:
    return all(close(update(one, m), update(other, m), tolerance) for m in SHAPES)
