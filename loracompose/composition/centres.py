"""Where the centres of k-means are, in terms of the points: everything from inner products.

A centre is a vector of coefficients over the points, so distances follow from the Gram matrix of the cloud. Clusters
stand before points in every large tensor, so that sums and minima over them run along whole rows, and these
tensors are written over from step to step: asking the system for new memory takes longer than what is computed in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ORTHOGONAL = 1e-5  # cosine below which signs are rounding


@dataclass(frozen=True, eq=False)
class Clouds:
    """G clouds of R points, and room for what is computed of S clusterings of each.

    Attributes:
        gram: inner products of the points, (G, R, R).
        weights: mass of each point, (G, 1, R).
        k: clusters.
        memory: three rows, each for G * S * k * R numbers; every step writes over them.
    """

    gram: Tensor
    weights: Tensor
    k: int
    memory: Tensor

    @property
    def norms(self) -> Tensor:
        """Squared norm of each point, (G, 1, R)."""
        return self.gram.diagonal(dim1=-2, dim2=-1)[:, None]

    def room(self, starts: int) -> Tensor:
        """Three tensors (G, S, k, R), (3, G, S, k, R)."""
        shape = len(self.gram), starts, self.k, self.gram.shape[-1]
        return self.memory[:, : math.prod(shape)].view(3, *shape)

    def at(self, chosen: Tensor) -> Clouds:
        """Some of the clouds, in the same memory."""
        return replace(self, gram=self.gram[chosen], weights=self.weights[chosen])


@dataclass(frozen=True, eq=False)
class Centres:
    """What a step has to know about the centres.

    Attributes:
        mass: weight of the points of each, (G, S, k); an empty cluster has none.
        norms: squared norm of each, (G, S, k).
        inner: inner products with the points, (G, S, k, R).
    """

    mass: Tensor
    norms: Tensor
    inner: Tensor


def centres_of(clouds: Clouds, labels: Tensor, signs: Tensor) -> Centres:
    """The weighted means of the clusters; of norm 0 where there are no points."""
    inner, coefficients, _ = clouds.room(labels.shape[1])
    zeros = torch.zeros_like(coefficients[..., 0])
    mass = zeros.scatter_add(-1, labels, clouds.weights.expand_as(signs))
    share = signs * clouds.weights / torch.where(mass > 0, mass, 1.0).gather(-1, labels)  # (G, S, R)
    coefficients.zero_().scatter_(-2, labels[..., None, :], share[..., None, :])
    flat = len(labels), -1, labels.shape[-1]  # one product for all starts
    torch.bmm(coefficients.view(flat), clouds.gram, out=inner.view(flat))
    return Centres(mass, zeros.scatter_add(-1, labels, share * _of(inner, labels)), inner)


def at_points(clouds: Clouds, seeds: Tensor) -> Centres:
    """Points (G, S, k) as centres."""
    inner, _, _ = clouds.room(seeds.shape[1])
    points = clouds.gram.shape[-1]
    rows = seeds + points * torch.arange(len(seeds), device=seeds.device)[:, None, None]  # of all clouds' matrices
    torch.index_select(clouds.gram.reshape(-1, points), 0, rows.flatten(), out=inner.view(-1, points))
    norms = clouds.norms.expand(-1, seeds.shape[1], -1).gather(-1, seeds)
    return Centres(torch.ones_like(norms), norms, inner)


def nearest(clouds: Clouds, centres: Centres) -> tuple[Tensor, Tensor]:
    """Nearest centre of each point, the first of equals, and the sign that is nearer; (G, S, R) each."""
    norms = centres.norms.masked_fill(centres.mass == 0, torch.inf)  # no centre there: nobody's nearest
    apart = torch.abs(centres.inner, out=clouds.room(centres.inner.shape[1])[1])
    labels = torch.sub(norms[..., None], apart, alpha=2, out=apart).min(dim=-2).indices
    return labels, fitting_signs(clouds, centres, labels)


def distance(clouds: Clouds, centres: Centres, labels: Tensor) -> Tensor:
    """Squared distance of each point to its centre, with the nearer sign, (G, S, R)."""
    inner = _of(centres.inner, labels).abs()
    return (clouds.norms + centres.norms.gather(-1, labels) - 2 * inner).clamp(min=0)


def fitting_signs(clouds: Clouds, centres: Centres, labels: Tensor) -> Tensor:
    """The sign with which each point is nearer to its centre, (G, S, R); 1 where it is orthogonal to it."""
    return sign(_of(centres.inner, labels), clouds.norms * centres.norms.gather(-1, labels))


def sign(inner: Tensor, norms: Tensor) -> Tensor:
    """-1 where an inner product is negative beyond rounding, else 1; `norms` are the products of the squared norms."""
    negligible = ORTHOGONAL * norms.clamp(min=0).sqrt()
    return torch.where(inner < -negligible, -1.0, 1.0).to(inner)


def _of(inner: Tensor, labels: Tensor) -> Tensor:
    """What belongs to the own cluster of each point, (G, S, R), of (G, S, k, R)."""
    return inner.gather(-2, labels[..., None, :])[..., 0, :]
