"""k-means of many small clouds at once, on Gram matrices, where x and -x are the same point.

A rank is a pair (a, b) up to sign: (a, b) and (-a, -b) are one rank-1 update. So a point's distance to a centre is
the smaller of its two signs', and a centre is the mean of its points, each with the sign that fits it. No
canonical sign has to be chosen, which no continuous rule could do. Where all points of a cluster agree, this is
ordinary k-means.

Everything happens on the Gram matrices of the clouds: a centre is a vector of coefficients over the points, and the
width of the points costs one product at the start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
    """The best of several starts of Lloyd's algorithm from greedy k-means++ seeds, for G clouds at once.

    Deterministic for a seed, without global random state; all clouds share their random numbers. It depends on the
    order of the points, which the caller fixes. A tie goes to the lower index. A cluster that loses its points
    takes the point farthest from its own centre; it stays empty if fewer than k points are distinct.

    Args:
        gram: inner products of the points, (G, R, R).
        weights: mass of each point, (G, R), not negative.
        k: clusters; from k = R on every point is a cluster of its own.
        n_init: starts.
        max_iter: largest number of Lloyd steps.
        seed: of the starts.

    Returns:
        Clustering of the start of least inertia.
    """
    groups, points = weights.shape
    if k >= points:
        own = torch.arange(points, device=gram.device).expand(groups, -1)
        return Clustering(own, torch.ones_like(weights), weights.new_zeros(groups))
    weights = weights[:, None].expand(-1, n_init, -1)  # (G, S, R)
    labels, signs = _assign(gram, _seeds(gram, weights, k, seed))[:2]
    for _ in range(max_iter):
        coefficients = _fill_empty(gram, weights, _centres(labels, signs, weights, k))
        before = labels, signs
        labels, signs, _ = _assign(gram, coefficients)
        if torch.equal(labels, before[0]) and torch.equal(signs, before[1]):
            break
    _, signs, distance = _assign(gram, _centres(labels, signs, weights, k), labels)
    inertia = (weights * distance).sum(dim=-1)  # (G, S)
    best = first_min(inertia)  # (G,)
    rows = torch.arange(groups, device=gram.device)
    return Clustering(labels[rows, best], signs[rows, best], inertia[rows, best])


def first_min(values: Tensor) -> Tensor:
    """Index of the least value along the last axis, the lowest index among equals."""
    index = torch.arange(values.shape[-1], device=values.device)
    least = values == values.amin(dim=-1, keepdim=True)
    return torch.where(least, index, values.shape[-1] - 1).amin(dim=-1)


def _assign(gram: Tensor, coefficients: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest centre of each point, the sign that is nearer, and the squared distance; (G, S, R) each.

    Args:
        gram: (G, R, R).
        coefficients: centres over the points, (G, S, R, k).
        labels: take these instead of the nearest.
    """
    groups, starts, points, k = coefficients.shape
    side_by_side = coefficients.permute(0, 2, 1, 3).reshape(groups, points, starts * k)  # one product for all starts
    inner = (gram @ side_by_side).view(groups, points, starts, k).permute(0, 2, 1, 3)  # of point and centre
    norms = (coefficients * inner).sum(dim=-2, keepdim=True)  # (G, S, 1, k)
    distance = (_norms(gram)[..., None] + norms - 2 * inner.abs()).clamp(min=0)
    if labels is None:
        empty = (coefficients == 0).all(dim=-2, keepdim=True)  # no centre there: nobody's nearest
        labels = first_min(distance.masked_fill(empty, torch.inf))
    chosen = labels[..., None]
    signs = torch.where(inner.gather(-1, chosen) < 0, -1.0, 1.0).to(gram)
    return labels, signs[..., 0], distance.gather(-1, chosen)[..., 0]


def _norms(gram: Tensor) -> Tensor:
    """Squared norm of each point, (G, 1, R)."""
    return gram.diagonal(dim1=-2, dim2=-1)[:, None]


def _centres(labels: Tensor, signs: Tensor, weights: Tensor, k: int) -> Tensor:
    """Coefficients of the weighted means, (G, S, R, k); a column of zeros for an empty cluster."""
    member = torch.nn.functional.one_hot(labels, k).to(weights) * weights[..., None]
    mass = member.sum(dim=-2, keepdim=True)
    return signs[..., None] * member / torch.where(mass > 0, mass, 1.0)


def _fill_empty(gram: Tensor, weights: Tensor, coefficients: Tensor) -> Tensor:
    """The e-th empty cluster of a start becomes the point that is e-th farthest from its centre, if it is off it."""
    empty = (coefficients == 0).all(dim=-2)  # (G, S, k)
    if not empty.any():
        return coefficients
    _, _, distance = _assign(gram, coefficients)
    spread = weights * distance
    farthest = spread.argsort(dim=-1, descending=True, stable=True)  # (G, S, R)
    turn = (empty.cumsum(dim=-1) - 1).clamp(min=0)  # (G, S, k)
    point = farthest.gather(-1, turn)
    rounding = 64 * torch.finfo(gram.dtype).eps * (weights * _norms(gram)).amax(dim=-1, keepdim=True)
    takes = empty & (spread.gather(-1, point) > rounding)
    single = torch.nn.functional.one_hot(point, spread.shape[-1]).to(coefficients).mT  # (G, S, R, k)
    return torch.where(takes[..., None, :], single, coefficients)


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
