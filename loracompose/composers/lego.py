"""LEGO: cluster the ranks of all adapters and rebuild one adapter from the centroids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from loracompose.composers.base import Factors, RowWise, Scope, rewrite_rows
from loracompose.composition.bank import RankBank, select_banks
from loracompose.composition.clustering import Clustering, kmeans
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.grouping import ModuleGroup, group_modules
from loracompose.composition.linalg import canonical
from loracompose.composition.settings import check_count

CLUSTERING_BYTES = 1 << 26  # budget of the clustering, counted as one (G, n_init, R, k) tensor in float64


@dataclass(frozen=True, eq=False)
class RankClusters:
    """Which ranks of one module were merged with which.

    Attributes:
        owner: adapter of each rank, a column of the weights, (R,); ranks in the order of the bank.
        labels: cluster of each rank, (R,) int64 in 0..k-1.
    """

    owner: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class UnitPool:
    """The units of G modules, sorted by content.

    Attributes:
        units: (G, R, d_in + d_out).
        peaks: ‖u‖_∞ of each, (G, R).
        share: of a mean, (G, R).
        order: where each stood in the bank, (G, R).
    """

    units: Tensor
    peaks: Tensor
    share: Tensor
    order: Tensor


@dataclass(frozen=True)
class Lego(RowWise):
    """delta_W = s Σ_j m_j b̄_j ā_j, with (ā_j, b̄_j) the centroids of k clusters of the pooled ranks.

    A rank is a minimal semantic unit u = [a; b]; per module the units of all members are pooled and clustered by
    k-means, for all modules at once. Permuting the ranks of an adapter, or giving it as two adapters that split its
    ranks, changes the pool in nothing; the units are sorted by content before the clustering, so neither changes
    the result. (a, b) and (-a, -b) are the same unit: distances and means take the sign that fits and, where both
    fit alike, the one that makes the largest entry of u positive (see `composition.clustering`). One adapter with
    k < r is rank pruning. With k >= R, the number of units, every unit is its own cluster.

    Weights. A negative weight turns b round. "mass": centroids are means weighted by |w|, and a cluster counts
    m_j = Σ|w| of its units, so uniform 1/N with k = r has the paper's size, and k >= R is the exact weighted sum.
    "unit" is the paper: every cluster counts m_j = 1 and means are plain; each b is multiplied by its weight relative
    to the mean |w|, so uniform weights of any size are the paper's case.

    Reweighting. Parameter: a centroid is scaled, a and b alike, to the mean ‖u‖_∞ of its units, against the norm that
    averaging loses. Output: s = √(r/k), r the mean rank of the members that have the module and k the clusters made,
    else s = 1. It belongs to "unit", where more clusters give a larger update; masses add up to Σ|w| r whatever k is,
    so with "mass" it would shrink the update where k is large, and where a member of small rank and small weight joins.

    Departs from the paper: weights; the signs; heterogeneous ranks, for which the paper leaves r undefined;
    scaling lies in b. The reweighting formulas are those that public re-implementations agree on; about the
    features they do not, hence `units`.

    Source: LoRA-LEGO, arXiv:2409.16167 (clustering objective: equation 2; dual reweighting).

    Attributes:
        k: clusters per module; None: the largest rank among the members that have the module.
        units: "raw": a and b as they are, so the result depends on the factorisation, as declared. "normalised":
            clustered by a and b of norm 1 each, averaged raw; depends on it, too. "canonical": singular
            directions of each member, ‖a‖ = ‖b‖; does not. On real adapters the three cannot be told apart
            under "mass" (docs/lego_units.md); under "unit" canonical ranks fail.
        parameter_reweighting: whether centroids are scaled.
        output_reweighting: whether the update is scaled by √(r/k); None: with "unit", as in the paper, and not with
            "mass".
        cluster_weight: what a cluster counts.
        n_init: starts of the k-means.
        max_iter: largest number of steps. Three starts of ten steps take three quarters of the time, for an inertia
            that is 0.07 % higher (`loracompose bench composing`).
        seed: of the starts; alone, so that equal pools have equal clusters whoever brought the units.

    Raises:
        ValueError: a field is out of its range.
    """

    name: ClassVar[str] = "lego"
    source: ClassVar[str] = "LoRA-LEGO, arXiv:2409.16167"
    scope: ClassVar[Scope] = "static"
    gauge_invariant: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    k: int | None = None
    units: Literal["raw", "normalised", "canonical"] = "raw"
    parameter_reweighting: bool = True
    output_reweighting: bool | None = None
    cluster_weight: Literal["mass", "unit"] = "mass"
    n_init: int = 10
    max_iter: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("Lego", "k", self.k, optional=True)
        check_count("Lego", "n_init", self.n_init)
        check_count("Lego", "max_iter", self.max_iter)
        check_count("Lego", "seed", self.seed, least=0)
        if self.units not in ("raw", "normalised", "canonical"):
            raise ValueError(f"Lego: units must be 'raw', 'normalised' or 'canonical', got {self.units!r}")
        if self.cluster_weight not in ("mass", "unit"):
            raise ValueError(f"Lego: cluster_weight must be 'mass' or 'unit', got {self.cluster_weight!r}")

    @property
    def _reweighs_output(self) -> bool:
        return self.cluster_weight == "unit" if self.output_reweighting is None else self.output_reweighting

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """One rebuilt adapter per distinct row of weights."""
        return rewrite_rows(banks, weights, self.compose_row)

    def clusters(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, RankClusters]:
        """The clusters that `compose` averages for one row of weights (K,), per module; for looking at.

        With canonical units, rank j of an adapter is its j-th singular direction.
        """
        members = weights.nonzero().flatten()
        found: dict[str, RankClusters] = {}
        for part, pool, clusters, _ in self._clusterings(select_banks(banks, members.tolist()), weights[members]):
            labels = torch.empty_like(clusters.labels).scatter(1, pool.order, clusters.labels)  # (G, R)
            of_member = members[list(part.members)]
            owner = of_member.repeat_interleave(torch.tensor(part.ranks, device=of_member.device))  # (R,)
            found |= {module: RankClusters(owner, own) for module, own in zip(part.modules, labels, strict=True)}
        return found

    def compose_row(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, Factors]:
        """The adapter rebuilt from the centroids of one row."""
        composed: dict[str, Factors] = {}
        for part, pool, clusters, k in self._clusterings(banks, weights):
            composed |= part.unstack(*self._rebuild(part, pool, clusters, k))
        return composed

    def _clusterings(
        self, banks: Mapping[str, RankBank], weights: Tensor
    ) -> Iterator[tuple[ModuleGroup, UnitPool, Clustering, int]]:
        """Every group of modules with its units, their clusters and k."""
        for bundle, k in self._bundles(banks):
            pools = [self._pool(part, weights) for part in bundle]
            for part, pool, clusters in zip(bundle, pools, self._clustered(bundle, pools, k), strict=True):
                yield part, pool, clusters, k

    def _bundles(self, banks: Mapping[str, RankBank]) -> Iterator[tuple[list[ModuleGroup], int]]:
        """Modules that are clustered at once, of whatever widths, with their k: k-means sees inner products alone."""
        alike: dict[tuple[int, int, torch.dtype, torch.device], list[ModuleGroup]] = {}
        for group in group_modules(banks):
            k = min(max(group.ranks) if self.k is None else self.k, group.total_rank)
            alike.setdefault((group.total_rank, k, group.working_dtype, group.A[0].device), []).append(group)
        for (R, k, _, _), groups in alike.items():
            room = max(1, CLUSTERING_BYTES // max(self.n_init * R * max(k, 1) * 8, 1))  # modules
            bundle: list[ModuleGroup] = []
            for part in (part for group in groups for part in group.split(room)):
                if sum(len(other.modules) for other in [*bundle, part]) > room:
                    yield bundle, k
                    bundle = []
                bundle.append(part)
            yield bundle, k

    def _clustered(self, bundle: Sequence[ModuleGroup], pools: Sequence[UnitPool], k: int) -> list[Clustering]:
        """The clusters of every pool of a bundle."""
        grams = []
        for part, pool in zip(bundle, pools, strict=True):
            features = unit_halves(pool.units, part.d_in) if self.units == "normalised" else pool.units
            grams.append(features @ features.mT)  # (G, R, R)
        share = torch.cat([pool.share for pool in pools])
        found = kmeans(torch.cat(grams), share, k, n_init=self.n_init, max_iter=self.max_iter, seed=self.seed)
        sizes = [len(gram) for gram in grams]
        of_all = (torch.split(part, sizes) for part in (found.labels, found.signs, found.inertia))
        return [Clustering(*part) for part in zip(*of_all, strict=True)]

    def _rebuild(self, group: ModuleGroup, pool: UnitPool, clusters: Clustering, k: int) -> Factors:
        units, peaks, share = pool.units, pool.peaks, pool.share
        member = F.one_hot(clusters.labels, k).to(units) * share[..., None]  # (G, R, k)
        mass = member.sum(dim=1)  # (G, k)
        average = (member / torch.where(mass > 0, mass, 1.0)[:, None]).mT  # (G, k, R)
        centroids = (average * clusters.signs.to(units)[:, None]) @ units  # (G, k, d_in + d_out)
        if self.parameter_reweighting:
            centroids *= norm_ratio(average, peaks, centroids)
        counts = mass if self.cluster_weight == "mass" else (mass > 0).to(mass)
        if self._reweighs_output and k:
            counts = counts * (group.total_rank / len(group.ranks) / k) ** 0.5
        return centroids[..., : group.d_in], centroids[..., group.d_in :].mT * counts[:, None]

    def _pool(self, group: ModuleGroup, weights: Tensor) -> UnitPool:
        """The units of a group, sorted by content."""
        if self.units == "canonical":
            group = canonical_group(group)
        w = group.per_rank(weights)  # (R,)
        mass = self.cluster_weight == "mass"
        units = side_by_side(group, w.sign() if mass else w / weights.abs().mean().to(w))
        share = (w.abs() if mass else torch.ones_like(w)).expand(units.shape[:2])
        peaks, signs = own_sign(units)
        order = content_order(units, peaks, share)
        module = torch.arange(len(units), device=units.device)[:, None]
        return UnitPool(
            units[module, order].mul_(signs.gather(1, order)[..., None]),
            peaks.gather(1, order),
            share.gather(1, order),
            order,
        )


def side_by_side(group: ModuleGroup, factor: Tensor) -> Tensor:
    """The units [a; factor · b] of all members, (G, R, d_in + d_out), in the working dtype; one copy of the factors."""
    shape = (len(group.modules), group.total_rank, group.d_in + group.d_out)
    units = torch.empty(shape, dtype=group.working_dtype, device=group.A[0].device)
    start = 0
    for A, B, r in zip(group.A, group.B, group.ranks, strict=True):
        units[:, start : start + r, : group.d_in] = A
        units[:, start : start + r, group.d_in :] = B.mT * factor[start : start + r, None]
        start += r
    return units


def canonical_group(group: ModuleGroup) -> ModuleGroup:
    """The same updates with each member's singular directions as its ranks."""
    dtype = group.working_dtype
    pairs = [canonical(A.to(dtype), B.to(dtype)) for A, B in zip(group.A, group.B, strict=True)]
    return replace(group, A=tuple(A for A, _ in pairs), B=tuple(B for _, B in pairs))


def own_sign(units: Tensor) -> tuple[Tensor, Tensor]:
    """‖u‖_∞, and the sign that makes the entry of largest magnitude positive, the first of equals; (G, R) each."""
    low, high = torch.aminmax(units, dim=-1)
    peaks, signs = largest(low, high), torch.where(high >= -low, 1.0, -1.0).to(units)
    tied = (high == -low) & (high > 0)
    if tied.any():
        rivals = units[tied]
        first = rivals.gather(-1, rivals.abs().argmax(dim=-1, keepdim=True))[:, 0]
        signs[tied] = first.sign()
    return peaks, signs


def largest(low: Tensor, high: Tensor) -> Tensor:
    """The largest magnitude between two ends."""
    return torch.maximum(high, -low)


def unit_halves(units: Tensor, d_in: int) -> Tensor:
    """[a/‖a‖; b/‖b‖]; a half that is zero stays zero."""
    return torch.cat([F.normalize(units[..., :d_in], dim=-1), F.normalize(units[..., d_in:], dim=-1)], dim=-1)


def norm_ratio(average: Tensor, peaks: Tensor, centroids: Tensor) -> Tensor:
    """Mean ‖u‖_∞ of each cluster, of the units' peaks (G, R), over ‖centroid‖_∞, (G, k, 1); 0 for one of zeros."""
    wanted = average @ peaks[..., None]  # (G, k, 1)
    found = largest(*torch.aminmax(centroids, dim=-1))[..., None]
    return torch.where(found > 0, wanted / torch.where(found > 0, found, 1.0), 0.0)


def content_order(units: Tensor, peaks: Tensor, share: Tensor) -> Tensor:
    """Order of the units by what they are, sign left out, (G, R): norm, then share, then two other norms.

    Units that agree in all four and yet differ keep the order of the pool.
    """
    one, two = (torch.linalg.vector_norm(units, ord, dim=-1) for ord in (1, 2))
    order = torch.arange(units.shape[1], device=units.device).expand(units.shape[:2])
    for key in (peaks, one, share, two):  # the last key decides first
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return order
