"""Which ranks BeamLoRA prunes, and from which it grows them anew: pure functions on importances."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def importance(scores: Tensor, temperature: float) -> Tensor:
    """softmax(s / τ) · r, the multipliers of one module's ranks (r,): positive, 1 on average, all 1 at s = 0."""
    return torch.softmax(scores / temperature, dim=0) * len(scores)


def tail_counts(importances: Mapping[str, Tensor], threshold: float) -> dict[str, int]:
    """How many ranks of each module lie in the tail of the importance of all modules together.

    All ranks are sorted by importance, largest first; kept are those whose cumulative sum is at most `threshold` of
    the total, so the rank that crosses it is the first of the tail, as in the authors' code. At a threshold of 1 the
    tail is empty. Among equals the later module's rank is in the tail.
    """
    joined = torch.cat([values.double() for values in importances.values()])  # (M r,)
    order = joined.argsort(descending=True, stable=True)
    cumulative = joined[order].cumsum(0)
    kept = int((cumulative <= threshold * cumulative[-1]).sum())  # its own end: another sum may round below it
    tail = torch.zeros(len(joined), dtype=torch.bool)
    tail[order[kept:]] = True
    parts = torch.split(tail, [len(values) for values in importances.values()])
    return {module: int(part.sum()) for module, part in zip(importances, parts, strict=True)}


def pair_ranks(values: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The `count` least important ranks of a module, and the most important ones in random order to regrow them from.

    Args:
        values: importances (r,) of one module's ranks.
        count: at most r / 2, so that no rank is both.
        generator: on the CPU.

    Returns:
        The pruned ranks in ascending order and the source of each, both (count,).

    Raises:
        ValueError: `count` is larger.
    """
    if count > len(values) // 2:
        raise ValueError(f"{count} of {len(values)} ranks cannot be regrown from as many others")
    order = values.argsort(descending=True, stable=True)
    pruned = order[len(values) - count :].sort().values  # (count,)
    return pruned, order[torch.randperm(count, generator=generator)]
