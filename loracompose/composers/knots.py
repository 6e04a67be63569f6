"""KnOTS: align the updates in one singular basis, merge there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loracompose.composers.base import Factors, RowWise, Scope, rewrite_rows
from loracompose.composition.bank import RankBank
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.grouping import ModuleGroup, group_modules
from loracompose.composition.settings import check_count, is_finite
from loracompose.composition.sparsity import (
    add_up,
    check_sparsity,
    drop_out,
    elect_and_average,
    mask_stream,
    trim,
)
from loracompose.composition.thresholds import magnitude_thresholds

Aligned = tuple[Tensor, list[Tensor]]  # U (d_out, q) and each member's coordinates (q, d_in) of one module


@dataclass(frozen=True)
class Knots(RowWise):
    """delta_W = U · merge_i(Σ V_iᵀ), where U Σ [V_1ᵀ … V_Kᵀ] is the SVD of [w_1 delta_W_1 … w_K delta_W_K].

    The basis U of the output space is shared, ΣV_iᵀ are the coordinates of adapter i in it. TIES (trim over all
    modules together, elect, disjoint mean; see `Ties`) or DARE then TIES works on the coordinates. The SVD is
    that of the factors: QR of the stacked B and of each A, and one core of R x R; no update is formed. The
    result has at most R = Σ r_i ranks and is not compressed further.

    Weights are folded into the updates before the SVD, so they shape the basis; the mean divides by the Σ|w| of those
    that agree and multiplies by the Σ|w| of the row, so that uniform weights 1/K are the paper. merge="sum" is the
    exact weighted sum (the paper: linear merges gain nothing from the basis).

    Departs from the paper: weights; a relative tolerance instead of 1e-5; entries whose votes cancel are 0; and
    α/r is part of the update. "dare_ties" draws masks by fingerprint and so depends on the factorisation.

    Source: KnOTS, arXiv:2410.19735, the method section and its published code.

    Attributes:
        density: share of the coordinates of each adapter that TIES keeps, in (0, 1]; not used by "sum".
        scale: factor of the result, the paper's merging coefficient.
        tolerance: singular values up to this share of their module's largest are dropped, in [0, 1); None: what
            rounding leaves of a zero, 32 epsilons of the dtype.
        merge: what is done with the coordinates.
        drop: DARE's drop rate, in [0, 1); used by "dare_ties" alone.
        seed: of DARE's masks.

    Raises:
        ValueError: a field is out of its range.
    """

    name: ClassVar[str] = "knots"
    source: ClassVar[str] = "KnOTS, arXiv:2410.19735"
    scope: ClassVar[Scope] = "static"
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    density: float = 0.2
    scale: float = 1.0
    tolerance: float | None = None
    merge: Literal["ties", "dare_ties", "sum"] = "ties"
    drop: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_sparsity("Knots", self.drop, self.density, self.scale)
        check_count("Knots", "seed", self.seed, least=0)
        if self.tolerance is not None and not (is_finite(self.tolerance) and 0 <= self.tolerance < 1):
            raise ValueError(f"Knots: tolerance must be in [0, 1) or None, got {self.tolerance!r}")
        if self.merge not in ("ties", "dare_ties", "sum"):
            raise ValueError(f"Knots: merge must be 'ties', 'dare_ties' or 'sum', got {self.merge!r}")

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """One merged adapter per distinct row of weights."""
        return rewrite_rows(banks, weights, self.compose_row)

    def compose_row(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, Factors]:
        """The adapter of one row, merged in its shared basis."""
        groups = group_modules(banks)
        aligned = [self._align(group, weights) for group in groups]
        thresholds = self._thresholds(groups, aligned, len(weights))
        mass = float(weights.abs().sum())
        composed: dict[str, Factors] = {}
        for group, modules in zip(groups, aligned, strict=True):
            shares = weights[list(group.members)].abs().tolist()
            for module, (U, coordinates) in zip(group.modules, modules, strict=True):
                if self.merge == "sum":
                    merged = add_up(coordinates, [1.0] * len(coordinates), mass)
                else:
                    kept = [trim(c, thresholds[i]) for i, c in zip(group.members, coordinates, strict=True)]
                    unweighted = [c / w for c, w in zip(kept, shares, strict=True)]
                    merged = elect_and_average(unweighted, shares, mass)
                composed[module] = (self.scale * merged).to(group.dtype), U.to(group.dtype)
        return composed

    def _align(self, group: ModuleGroup, weights: Tensor) -> list[Aligned]:
        """The shared basis of each module and the members' coordinates in it, thinned if DARE is asked for."""
        U, S, coordinates = shared_basis(group, weights)
        if self.merge == "dare_ties":
            streams = [[mask_stream(who, module, self.seed) for module in group.modules] for who in group.fingerprints]
            coordinates = [drop_out(c, self.drop, own) for c, own in zip(coordinates, streams, strict=True)]
        tolerance = 32 * torch.finfo(S.dtype).eps if self.tolerance is None else self.tolerance
        ranks = (S > tolerance * S[:, :1]).sum(dim=1).clamp(min=1).tolist()
        return [(U[g, :, :q], [c[g, :q] for c in coordinates]) for g, q in enumerate(ranks)]

    def _thresholds(self, groups: Sequence[ModuleGroup], aligned: list[list[Aligned]], n_adapters: int) -> list[float]:
        def entries() -> Iterator[tuple[int, Tensor]]:
            for group, modules in zip(groups, aligned, strict=True):
                for _, coordinates in modules:
                    yield from zip(group.members, coordinates, strict=True)

        sizes = [0] * n_adapters
        for i, coordinates in entries():
            sizes[i] += coordinates.numel()
        dtype = torch.float64 if any(group.working_dtype == torch.float64 for group in groups) else torch.float32
        return magnitude_thresholds(entries, sizes, 1.0 if self.merge == "sum" else self.density, dtype)


def shared_basis(group: ModuleGroup, weights: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """SVD of the updates side by side, w_i delta_W_i = U coordinates_i.

    Returns:
        U (G, d_out, q), singular values (G, q) descending, and per member Σ V_iᵀ (G, q, d_in), q <= R.
    """
    dtype = group.working_dtype
    w = weights[list(group.members)].tolist()
    B = torch.cat([w_i * B_i.to(dtype) for w_i, B_i in zip(w, group.B, strict=True)], dim=-1)
    Qb, Rb = torch.linalg.qr(B)  # (G, d_out, p), (G, p, R)
    inner = [torch.linalg.qr(A.to(dtype).mT) for A in group.A]  # per member (G, d_in, q_i), (G, q_i, r_i)
    pieces = [R_i @ Ra.mT for R_i, (_, Ra) in zip(Rb.split(group.ranks, dim=-1), inner, strict=True)]
    U, S, Vt = torch.linalg.svd(torch.cat(pieces, dim=-1), full_matrices=False)
    widths = [piece.shape[-1] for piece in pieces]
    coordinates = [(S[..., None] * V) @ Qa.mT for V, (Qa, _) in zip(Vt.split(widths, dim=-1), inner, strict=True)]
    # The SVD leaves noise where a coordinate is zero, and an election would count its signs as votes.
    noise = 32 * torch.finfo(S.dtype).eps * S[:, :1, None]
    return Qb @ U, S, [c.masked_fill(c.abs() <= noise, 0.0) for c in coordinates]
