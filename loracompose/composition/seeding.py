"""Seeds of k-means: points far apart, drawn for many clouds and starts at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def greedy_seeds(gram: Tensor, weights: Tensor, k: int, *, starts: int, seed: int) -> Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007), where x and -x are the same point.

    Each further seed is the best of 2 + ln k candidates drawn by weight times squared distance. All clouds share their
    random numbers.

    Args:
        gram: inner products of the points, (G, R, R).
        weights: mass of each point, (G, R), not negative.
        k: seeds, fewer than points.
        starts: S, how often to draw.
        seed: of the random numbers.

    Returns:
        The points drawn, (G, S, k).
    """
    groups, points = weights.shape
    trials = 2 + int(math.log(k))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(k, starts, trials, generator=generator, dtype=torch.float64).to(gram)
    rows = _pairwise(gram).view(groups * points, points)
    cloud = points * torch.arange(groups, device=gram.device)[:, None, None]  # where its rows begin
    start = torch.arange(groups * starts, device=gram.device)
    room = gram.new_empty(groups * starts * trials, points)  # new memory at every step would cost more than its use
    nearest = gram.new_full((groups, starts, points), torch.inf)
    chosen = []
    for step in range(k):
        mass = weights[:, None].expand_as(nearest) if step == 0 else weights[:, None] * nearest
        tries = 1 if step == 0 else trials
        candidates = _draw(mass, draws[step, :, :tries])  # (G, S, T)
        reach = room[: candidates.numel()]
        torch.index_select(rows, 0, (candidates + cloud).flatten(), out=reach)
        reach = reach.view(groups * starts, tries, points)
        torch.minimum(reach, nearest.view(-1, 1, points), out=reach)
        missed = (weights[:, None] @ reach.view(groups, starts * tries, points).mT).view(groups, starts, tries)
        best = missed.min(dim=-1).indices  # the first of equals
        chosen.append(candidates.gather(-1, best[..., None]))
        nearest = reach[start, best.flatten()].view(groups, starts, points)
    return torch.cat(chosen, dim=-1)


def _pairwise(gram: Tensor) -> Tensor:
    """Squared distances, each with the nearer sign, (G, R, R)."""
    norms = gram.diagonal(dim1=-2, dim2=-1)
    return gram.abs().mul_(-2).add_(norms[:, None]).add_(norms[..., None]).clamp_(min=0)


def _draw(mass: Tensor, uniform: Tensor) -> Tensor:
    """Indices drawn by mass (G, S, R) for uniform numbers (S, T), (G, S, T); the last index where all mass is 0."""
    edges = mass.cumsum(dim=-1)
    targets = uniform[None] * edges[..., -1:]
    return torch.searchsorted(edges, targets, right=True).clamp(max=mass.shape[-1] - 1)
