"""What came and went since a version, and the whitening that is current: exact statistics, a bounded correction.

A version freezes the shrunk within-adapter covariance C0, made of f0 degrees of freedom, with W0 W0ᵀ = C0⁻¹. With
ΔS the scatter of what came less that of what went, and Δf its degrees of freedom, the current covariance is

    C = (f0 C0 + (1 - s) ΔS) / (f0 + (1 - s) Δf)

at the shrinkage s: the observations of the version, and the later ones with the same weight. In the version's whitened
space it is, up to that factor, I + M with M = (1 - s) / f0 W0ᵀ ΔS W0, which is kept exactly. Its largest eigenvalues e
with their vectors V give the inverse after Sherman, Morrison and Woodbury, I - V diag(e / (1 + e)) Vᵀ, and what is left
of M bounds the relative error of every squared distance: `remainder`, 0 as long as few adapters came and went.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RANK = 32
"""Directions of the correction; each costs width multiplications a candidate."""

_ITERATIONS = 3

_THIN = 128
"""Deviations that are kept one by one; more are summed up, and each later change then costs a product of width²."""


@dataclass(frozen=True, eq=False)
class Drift:
    """Changes since a version in its whitened space, M above, as a sum: `dense` + Σ signs · rows rowsᵀ.

    `dense` (D, D), or (0, 0) as long as there is nothing in it; `rows` (r, D) and `signs` (r,) the last changes;
    `freedom`, Δf; `base`, f0; `weight`, 1 - s.
    """

    width: int
    dense: Floats
    rows: Floats
    signs: Floats
    freedom: int
    base: int
    weight: float

    @classmethod
    def none(cls, width: int, base: int, weight: float) -> Drift:
        """No change since a version of `base` degrees of freedom."""
        return cls(width, np.zeros((0, 0)), np.zeros((0, width)), np.zeros(0), 0, base, weight)

    def moved(self, deviations: Floats, freedom: int, sign: int) -> Drift:
        """With adapters that came (sign 1) or went (-1).

        Args:
            deviations: whitened deviations of their examples from their own means, (examples, D).
            freedom: degrees of freedom of those: examples less adapters.
            sign: 1 or -1.
        """
        rows = np.concatenate([self.rows, np.sqrt(self.weight / self.base) * deviations])
        signs = np.concatenate([self.signs, np.full(len(deviations), float(sign))])
        dense = self.dense
        if len(rows) > _THIN:
            dense = (dense if len(dense) else 0.0) + (rows.T * signs) @ rows
            rows, signs = rows[:0], signs[:0]
        return replace(self, dense=dense, rows=rows, signs=signs, freedom=self.freedom + sign * freedom)

    def times(self, vectors: Floats) -> Floats:
        """M times a vector (D,) or some (D, n)."""
        turned = self.rows @ vectors
        found = (self.rows.T * self.signs) @ turned
        return np.asarray(found + self.dense @ vectors if len(self.dense) else found)

    @property
    def scale(self) -> float:
        """Factor of the inverse covariance, (f0 + (1 - s) Δf) / f0."""
        return 1.0 + self.weight * self.freedom / self.base

    @cached_property
    def correction(self) -> tuple[Floats, Floats]:
        """Orthonormal directions V, (D, r), and eigenvalues e, (r,), r at most `RANK`: those largest in size.

        Of few changes exactly; of many by subspace iteration from a fixed start, the same way in every process.
        """
        found, values = self._leading
        kept = np.argsort(-np.abs(values), kind="stable")[:RANK]
        return found[:, kept], values[kept]

    @cached_property
    def remainder(self) -> float:
        """Spectral norm of what the correction leaves out: exact of few changes, of many by power iteration."""
        _, values = self._leading
        if not len(self.dense):
            return float(np.sort(np.abs(values))[::-1][RANK:].max(initial=0.0))
        directions, values = self.correction
        if directions.shape[1] in (0, self.width):
            return 0.0
        vector = np.random.default_rng(1).standard_normal(self.width)
        norm = 0.0
        for _ in range(12):
            vector = self.times(vector) - directions @ (values * (directions.T @ vector))
            norm = float(np.linalg.norm(vector))
            if norm < 1e-12:
                return 0.0
            vector /= norm
        return norm

    def errs(self, bound: float) -> bool:
        """Whether squared distances may be wrong by more than this share."""
        return self._rest > bound and self.remainder > bound

    @property
    def _rest(self) -> float:
        """Frobenius norm of what the correction leaves out, at least `remainder`; quicker where that iterates."""
        if not len(self.dense):
            return self.remainder
        _, values = self.correction
        own = self.rows @ self.rows.T  # (r, r)
        whole = np.vdot(self.dense, self.dense) + self.signs @ own**2 @ self.signs
        whole += 2.0 * self.signs @ np.einsum("rd,rd->r", self.rows @ self.dense, self.rows)
        return float(np.sqrt(max(whole - np.vdot(values, values), 0.0)))

    @cached_property
    def _leading(self) -> tuple[Floats, Floats]:
        """Directions and eigenvalues: of few changes all there are, of many the `RANK` leading ones."""
        if not len(self.dense):
            basis, _ = np.linalg.qr(self.rows.T)  # (D, r)
        else:
            basis = np.random.default_rng(0).standard_normal((self.width, min(RANK, self.width)))
            for _ in range(_ITERATIONS):
                basis, _ = np.linalg.qr(self.times(basis))
        values, turn = np.linalg.eigh(basis.T @ self.times(basis))
        return basis @ turn, values
