"""k-means of many small clouds at once, on Gram matrices, where x and -x are the same point.

A rank is a pair (a, b) up to sign: (a, b) and (-a, -b) are one rank-1 update. So a point's distance to a centre is
the smaller of its two signs', and a centre is the mean of its points, each with the sign that fits it. Where all
points of a cluster agree, this is ordinary k-means.

Between orthogonal points both signs fit alike. There the sign that the point was given with stays, so a caller
who wants a result free of signs gives every point a sign of its own first.

Everything happens on the Gram matrices of the clouds: a centre is a vector of coefficients over the points, and the
width of the points costs one product at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ORTHOGONAL = 1e-5  # cosine below which signs are rounding
FINALISTS = 3  # starts that are carried on: seeds chosen well differ little, and the single moves level what is left

Improve = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(gram (G, R, R), weights, labels, signs (G, S, R) each, k) -> better labels and signs."""


@dataclass(frozen=True, eq=False)
class Clustering:
    """G clusterings of R points into k clusters.

    Attributes:
        labels: cluster of each point, (G, R) int64 in 0..k-1.
        signs: 1 or -1, the sign with which a point enters its cluster, (G, R).
        inertia: Σ weight · distance² to the own centre, (G,).
    """

    labels: Tensor
    signs: Tensor
    inertia: Tensor


def kmeans(gram: Tensor, weights: Tensor, k: int, *, n_init: int, max_iter: int, seed: int) -> Clustering:
    """k-means of G clouds at once: k-means++ seeds, Lloyd's steps from the best three, single moves from the best.

    Deterministic for a seed, without global random state; all clouds share their random numbers. It depends on the
    order of the points, which the caller fixes. A tie goes to the lower index. A cluster that lost its points
    is given one by the single moves; it stays empty only if fewer than k points are distinct.

    Args:
        gram: inner products of the points, (G, R, R).
        weights: mass of each point, (G, R), not negative.
        k: clusters; from k = R on every point is a cluster of its own.
        n_init: starts.
        max_iter: largest number of Lloyd's steps, and of single moves after them.
        seed: of the starts.

    Returns:
        The labels, the signs and their inertia.
    """
    groups, points = weights.shape
    if k >= points:
        own = torch.arange(points, device=gram.device).expand(groups, -1)
        return Clustering(own, torch.ones_like(weights), weights.new_zeros(groups))
    weights = weights[:, None].expand(-1, n_init, -1)  # (G, S, R)
    labels, signs, _ = _assign(gram, _seeds(gram, weights, k, seed))
    missed = _inertia(gram, weights, labels, signs, k)
    labels, signs, weights = _best(missed, FINALISTS, labels, signs, weights)
    labels, signs = _settle(_lloyd, gram, weights, labels, signs, k, max_iter)
    labels, signs, weights = _best(_inertia(gram, weights, labels, signs, k), 1, labels, signs, weights)
    labels, signs = _settle(_exchange, gram, weights, labels, signs, k, max_iter)
    return Clustering(labels[:, 0], signs[:, 0], _inertia(gram, weights, labels, signs, k)[:, 0])


def first_min(values: Tensor) -> Tensor:
    """Index of the least value along the last axis, the lowest index among equals."""
    index = torch.arange(values.shape[-1], device=values.device)
    least = values == values.amin(dim=-1, keepdim=True)
    return torch.where(least, index, values.shape[-1] - 1).amin(dim=-1)


def _best(inertia: Tensor, count: int, *of_starts: Tensor) -> tuple[Tensor, ...]:
    """What belongs to the `count` starts of least inertia (G, S), the first among equals, of tensors (G, S, ...)."""
    kept = inertia.argsort(dim=-1, stable=True)[:, :count, None]
    return tuple(tensor.gather(1, kept.expand(-1, -1, tensor.shape[-1])) for tensor in of_starts)


def _settle(
    improve: Improve, gram: Tensor, weights: Tensor, labels: Tensor, signs: Tensor, k: int, max_iter: int
) -> tuple[Tensor, Tensor]:
    """Labels and signs after at most `max_iter` improvements of each cloud, fewer once nothing changes in it."""
    labels, signs = labels.clone(), signs.clone()
    moving = torch.arange(len(gram), device=gram.device)
    for _ in range(max_iter):
        before = labels[moving], signs[moving]
        after = improve(gram[moving], weights[moving], *before, k)
        labels[moving], signs[moving] = after
        changed = [(new != old).flatten(1).any(dim=1) for new, old in zip(after, before, strict=True)]
        moving = moving[changed[0] | changed[1]]
        if not len(moving):
            break
    return labels, signs


def _inertia(gram: Tensor, weights: Tensor, labels: Tensor, signs: Tensor, k: int) -> Tensor:
    """Σ weight · distance² of each start, (G, S)."""
    _, _, distance = _assign(gram, _centres(labels, signs, weights, k), labels)
    return (weights * distance).sum(dim=-1)


def _lloyd(gram: Tensor, weights: Tensor, labels: Tensor, signs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Every point to the nearest centre."""
    labels, signs, _ = _assign(gram, _centres(labels, signs, weights, k))
    return labels, signs


def _exchange(gram: Tensor, weights: Tensor, labels: Tensor, signs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Moves of single points that lower the inertia (Hartigan and Wong 1979): the best, and those it leaves alone.

    The gain counts how both centres follow, which Lloyd leaves out: small clusters end up clearly better. It depends on
    the two clusters of a move alone, so of moves that share no cluster each lowers the inertia by its own gain: a
    move is made if none better leaves or enters one of its clusters. To an empty cluster a move is free, so none stays
    empty while points lie off their centres.
    """
    coefficients = _centres(labels, signs, weights, k)
    distance, inner = _distances(gram, coefficients)  # (G, S, R, k)
    mass = torch.zeros_like(coefficients[..., 0, :]).scatter_add(-1, labels, weights)[..., None, :]  # (G, S, 1, k)
    own = labels[..., None]
    w = weights[..., None]
    rest = mass.expand_as(distance).gather(-1, own) - w  # what the point leaves behind
    alone = rest <= torch.finfo(w.dtype).eps * mass.amax(dim=-1, keepdim=True)
    gain = torch.where(alone, 0.0, (rest + w) * w / torch.where(alone, 1.0, rest) * distance.gather(-1, own))
    cost = (mass * w / (mass + w) * distance).scatter(-1, own, torch.inf)
    target = first_min(cost)[..., None]
    change = (cost.gather(-1, target) - gain)[..., 0]  # (G, S, R)
    rounding = 64 * torch.finfo(w.dtype).eps * (weights * _norms(gram)).amax(dim=-1, keepdim=True)
    place = change.argsort(dim=-1, stable=True).argsort(dim=-1)  # (G, S, R), 0 for the best move
    first = torch.full_like(mass[..., 0, :], place.shape[-1], dtype=place.dtype)  # (G, S, k), of each cluster
    first = first.scatter_reduce(-1, labels, place, "amin").scatter_reduce(-1, target[..., 0], place, "amin")
    undisputed = (first.gather(-1, labels) == place) & (first.gather(-1, target[..., 0]) == place)
    moves = undisputed & (change < -rounding)
    labels = torch.where(moves, target[..., 0], labels)
    signs = torch.where(moves, _fitting_signs(gram, coefficients, inner, target), signs)
    return labels, _assign(gram, _centres(labels, signs, weights, k), labels)[1]


def _distances(gram: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances and inner products of points (G, R, R) and centres (G, S, R, k), (G, S, R, k) each."""
    groups, starts, points, k = coefficients.shape
    side_by_side = coefficients.permute(0, 2, 1, 3).reshape(groups, points, starts * k)  # one product for all starts
    inner = (gram @ side_by_side).view(groups, points, starts, k).permute(0, 2, 1, 3)
    norms = (coefficients * inner).sum(dim=-2, keepdim=True)  # (G, S, 1, k)
    return (_norms(gram)[..., None] + norms - 2 * inner.abs()).clamp(min=0), inner


def _assign(gram: Tensor, coefficients: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest centre of each point, the sign that is nearer, and the squared distance; (G, S, R) each.

    Args:
        gram: (G, R, R).
        coefficients: centres over the points, (G, S, R, k).
        labels: take these instead of the nearest.
    """
    distance, inner = _distances(gram, coefficients)
    if labels is None:
        empty = (coefficients == 0).all(dim=-2, keepdim=True)  # no centre there: nobody's nearest
        labels = first_min(distance.masked_fill(empty, torch.inf))
    chosen = labels[..., None]
    return labels, _fitting_signs(gram, coefficients, inner, chosen), distance.gather(-1, chosen)[..., 0]


def _fitting_signs(gram: Tensor, coefficients: Tensor, inner: Tensor, chosen: Tensor) -> Tensor:
    """The sign with which each point is nearer to its chosen centre, (G, S, R); 1 where it is orthogonal to it."""
    norms = (coefficients * inner).sum(dim=-2, keepdim=True).expand_as(inner).gather(-1, chosen)
    negligible = ORTHOGONAL * (_norms(gram)[..., None] * norms.clamp(min=0)).sqrt()
    return torch.where(inner.gather(-1, chosen) < -negligible, -1.0, 1.0).to(gram)[..., 0]


def _norms(gram: Tensor) -> Tensor:
    """Squared norm of each point, (G, 1, R)."""
    return gram.diagonal(dim1=-2, dim2=-1)[:, None]


def _centres(labels: Tensor, signs: Tensor, weights: Tensor, k: int) -> Tensor:
    """Coefficients of the weighted means, (G, S, R, k); a column of zeros for an empty cluster."""
    member = torch.nn.functional.one_hot(labels, k).to(weights) * weights[..., None]
    mass = member.sum(dim=-2, keepdim=True)
    return signs[..., None] * member / torch.where(mass > 0, mass, 1.0)


def _seeds(gram: Tensor, weights: Tensor, k: int, seed: int) -> Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007): coefficients (G, S, R, k), one-hot columns.

    Each further centre is the best of 2 + ln k candidates drawn by weight times squared distance.
    """
    _, starts, points = weights.shape
    trials = 2 + int(math.log(k))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(k, starts, trials, generator=generator, dtype=torch.float64).to(gram)
    own = gram.diagonal(dim1=-2, dim2=-1)
    pairwise = (own[:, None, :] + own[:, :, None] - 2 * gram.abs()).clamp(min=0)  # (G, R, R)
    pairwise = pairwise[:, None].expand(-1, starts, -1, -1)
    nearest = torch.full_like(weights, torch.inf)
    chosen = []
    for step in range(k):
        mass = weights if step == 0 else weights * nearest
        tries = 1 if step == 0 else trials
        candidates = _draw(mass, draws[step, :, :tries])  # (G, S, T)
        reach = pairwise.gather(2, candidates[..., None].expand(-1, -1, -1, points))  # (G, S, T, R)
        reach = torch.minimum(reach, nearest[:, :, None])
        best = first_min((weights[:, :, None] * reach).sum(dim=-1))[..., None]  # (G, S, 1)
        chosen.append(candidates.gather(-1, best))
        nearest = reach.gather(2, best[..., None].expand(-1, -1, -1, points))[:, :, 0]
    return torch.nn.functional.one_hot(torch.cat(chosen, dim=-1), points).to(weights).mT


def _draw(mass: Tensor, uniform: Tensor) -> Tensor:
    """Indices drawn by mass (G, S, R) for uniform numbers (S, T), (G, S, T); the last index where all mass is 0."""
    edges = mass.cumsum(dim=-1)
    targets = uniform[None] * edges[..., -1:]
    return torch.searchsorted(edges.contiguous(), targets.contiguous(), right=True).clamp(max=mass.shape[-1] - 1)
