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

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RANK = 32
"""Directions of the correction; each costs width multiplications a candidate."""

_ITERATIONS = 3


@dataclass(frozen=True, eq=False)
class Drift:
    """Changes since a version in its whitened space: `change` (D, D), the M above; `freedom`, Δf; `weight`, 1 - s."""

    change: Floats
    freedom: int
    base: int
    weight: float

    @classmethod
    def none(cls, width: int, base: int, weight: float) -> Drift:
        """No change since a version of `base` degrees of freedom."""
        return cls(np.zeros((width, width)), 0, base, weight)

    def moved(self, deviations: Floats, freedom: int, sign: int) -> Drift:
        """With adapters that came (sign 1) or went (-1).

        Args:
            deviations: whitened deviations of their examples from their own means, (examples, D).
            freedom: degrees of freedom of those: examples less adapters.
            sign: 1 or -1.
        """
        change = self.change + sign * self.weight / self.base * (deviations.T @ deviations)
        return Drift(change, self.freedom + sign * freedom, self.base, self.weight)

    @property
    def scale(self) -> float:
        """Factor of the inverse covariance, (f0 + (1 - s) Δf) / f0."""
        return 1.0 + self.weight * self.freedom / self.base

    @cached_property
    def correction(self) -> tuple[Floats, Floats]:
        """Orthonormal directions V, (D, r), and eigenvalues e, (r,), r at most `RANK`.

        Subspace iteration from a fixed start: it finds a change of rank `RANK` or less exactly, and a larger one the
        same way in every process.
        """
        width = len(self.change)
        if not self.change.any():
            return np.zeros((width, 0)), np.zeros(0)
        basis = np.random.default_rng(0).standard_normal((width, min(RANK, width)))
        for _ in range(_ITERATIONS):
            basis, _ = np.linalg.qr(self.change @ basis)
        values, turn = np.linalg.eigh(basis.T @ self.change @ basis)
        return basis @ turn, values

    @cached_property
    def rest(self) -> float:
        """Frobenius norm of what the correction leaves out: at least `remainder`, and quicker."""
        _, values = self.correction
        return float(np.sqrt(max(np.vdot(self.change, self.change) - np.vdot(values, values), 0.0)))

    def errs(self, bound: float) -> bool:
        """Whether squared distances may be wrong by more than this share."""
        return self.rest > bound and self.remainder > bound

    @cached_property
    def remainder(self) -> float:
        """Spectral norm of what the correction leaves out, by power iteration."""
        directions, values = self.correction
        if directions.shape[1] in (0, len(self.change)):
            return 0.0
        vector = np.random.default_rng(1).standard_normal(len(self.change))
        norm = 0.0
        for _ in range(12):
            vector = self.change @ vector - directions @ (values * (directions.T @ vector))
            norm = float(np.linalg.norm(vector))
            if norm < 1e-12:
                return 0.0
            vector /= norm
        return norm
