"""k-means of many small clouds at once, on Gram matrices, where x and -x are the same point.

A rank is a pair (a, b) up to sign: (a, b) and (-a, -b) are one rank-1 update. So a point's distance to a centre is
the smaller of its two signs', and a centre is the mean of its points, each with the sign that fits it. Where all
points of a cluster agree, this is ordinary k-means.

Between orthogonal points both signs fit alike. There the sign that the point was given with stays, so a caller
who wants a result free of signs gives every point a sign of its own first.

Everything happens on the Gram matrices of the clouds (`centres`): the width of the points costs one product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loracompose.composition.centres import (
    Centres,
    Clouds,
    at_points,
    centres_of,
    distance,
    fitting_signs,
    nearest,
    sign,
)
from loracompose.composition.seeding import greedy_seeds

TOGETHER = 3  # starts that are judged at once; more would need more memory than they save time


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


Improve = Callable[[Clouds, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(clouds, labels, signs (G, S, R) each) -> better labels and signs."""


def kmeans(gram: Tensor, weights: Tensor, k: int, *, n_init: int, max_iter: int, seed: int) -> Clustering:
    """k-means of G clouds at once: k-means++ seeds, Lloyd's steps and then single moves from the best of them.

    The best start is chosen as soon as every point has joined a seed: the steps that follow hardly change which it is.
    Deterministic for a seed, without global random state; all clouds share their random numbers. It depends on the
    order of the points, which the caller fixes. A tie goes to the lower index. A cluster that lost its points is given
    one by the single moves; it stays empty only if fewer than k points are distinct.

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
    clouds = Clouds(gram, weights[:, None], k, gram.new_empty(3, groups * min(n_init, TOGETHER) * k * points))
    labels, signs = _seeded(clouds, greedy_seeds(gram, weights, k, starts=n_init, seed=seed))
    labels, signs = _settle(_lloyd, clouds, labels, signs, max_iter)
    labels, signs = _settle(_exchange, clouds, labels, signs, max_iter)
    return Clustering(labels[:, 0], signs[:, 0], _inertia(clouds, labels, signs)[:, 0])


def _seeded(clouds: Clouds, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and signs (G, 1, R) of the start whose seeds (G, S, k) are best once all points joined one."""
    found = []
    for first in range(0, seeds.shape[1], TOGETHER):
        labels, signs = nearest(clouds, at_points(clouds, seeds[:, first : first + TOGETHER]))
        found.append((_inertia(clouds, labels, signs), labels, signs))
    inertia, labels, signs = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    kept = inertia.min(dim=-1).indices[:, None, None].expand(-1, 1, labels.shape[-1])  # the first among equals
    return labels.gather(1, kept), signs.gather(1, kept)


def _settle(improve: Improve, clouds: Clouds, labels: Tensor, signs: Tensor, max_iter: int) -> tuple[Tensor, Tensor]:
    """Labels and signs after at most `max_iter` improvements of each cloud, fewer once nothing changes in it."""
    settled = labels.clone(), signs.clone()
    moving = torch.arange(len(labels), device=labels.device)
    for _ in range(max_iter):
        after = improve(clouds, labels, signs)
        changed = ((after[0] != labels) | (after[1] != signs)).flatten(1).any(dim=1)
        labels, signs = after
        count = int(changed.sum())
        if not count:
            break
        if 2 * count <= len(moving):  # to step on where all has settled changes nothing, and costs less than to pick
            settled[0][moving], settled[1][moving] = after
            moving, clouds, labels, signs = moving[changed], clouds.at(changed), labels[changed], signs[changed]
    settled[0][moving], settled[1][moving] = labels, signs
    return settled


def _inertia(clouds: Clouds, labels: Tensor, signs: Tensor) -> Tensor:
    """Σ weight · distance² of each start, (G, S)."""
    return (clouds.weights * distance(clouds, centres_of(clouds, labels, signs), labels)).sum(dim=-1)


def _lloyd(clouds: Clouds, labels: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Every point to the nearest centre."""
    return nearest(clouds, centres_of(clouds, labels, signs))


def _exchange(clouds: Clouds, labels: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Moves of single points that lower the inertia (Hartigan and Wong 1979): the best, and those it leaves alone.

    The gain counts how both centres follow, which Lloyd leaves out: small clusters end up clearly better. It depends on
    the two clusters of a move alone, so of moves that share no cluster each lowers the inertia by its own gain: a
    move is made if none better leaves or enters one of its clusters. To an empty cluster a move is free, so none stays
    empty while points lie off their centres. Where a sign does not fit its centre, the signs alone are mended.
    """
    centres = centres_of(clouds, labels, signs)
    fitting = fitting_signs(clouds, centres, labels)
    change, cost = _changes(clouds, centres, labels)
    rounding = 64 * torch.finfo(change.dtype).eps * (clouds.weights * clouds.norms).amax(dim=-1, keepdim=True)
    gaining = (change < -rounding) & (fitting == signs).all(dim=-1, keepdim=True)
    cloud, start, point = gaining.nonzero(as_tuple=True)  # (n,) each
    target = cost[cloud, start, :, point].min(dim=-1).indices  # (n,), the first of equals
    order = change[cloud, start, point].argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    begin = (cloud * labels.shape[1] + start) * clouds.k
    leaves, enters = begin + labels[cloud, start, point], begin + target
    first = begin.new_full((centres.mass.numel(),), len(order))  # of each cluster
    first = first.scatter_reduce(0, leaves, place, "amin").scatter_reduce(0, enters, place, "amin")
    made = (first[leaves] == place) & (first[enters] == place)
    cloud, start, point, target = cloud[made], start[made], point[made], target[made]
    norms = clouds.norms[cloud, 0, point] * centres.norms[cloud, start, target]
    arriving = sign(centres.inner[cloud, start, target, point], norms)
    moved = cloud, start, point
    return labels.index_put(moved, target), fitting.index_put(moved, arriving)


def _changes(clouds: Clouds, centres: Centres, labels: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the best move of each point changes the inertia, (G, S, R), and what entering costs, (G, S, k, R)."""
    w = clouds.weights.expand_as(labels)
    mass = centres.mass.gather(-1, labels)
    rest = mass - w  # what the point leaves behind
    alone = rest <= torch.finfo(w.dtype).eps * centres.mass.amax(dim=-1, keepdim=True)
    gain = mass * w / torch.where(alone, 1.0, rest) * distance(clouds, centres, labels)
    _, cost, shared = clouds.room(labels.shape[1])
    torch.sub(centres.norms[..., None], torch.abs(centres.inner, out=cost), alpha=2, out=cost)
    cost.add_(clouds.norms[..., None, :]).clamp_(min=0)
    cost.div_(torch.add((1 / w)[..., None, :], (1 / centres.mass)[..., None], out=shared))  # times m w / (m + w)
    cost.scatter_(-2, labels[..., None, :], torch.inf)
    return cost.amin(dim=-2) - gain.masked_fill_(alone, 0.0), cost
