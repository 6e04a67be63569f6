"""Distances to candidates under the current statistics: the version's whitening, corrected for what came and went."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.scale.drift import Drift, Floats

Singles = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Frame:
    """What a version freezes of the discriminant.

    `centre` (D,) is subtracted from all features; `whitening` (D, D), W0; `directions` (D, d) take features to the
    principal directions of the whitened means of the adapters, which faiss searches. `freedom`, `shrinkage` and
    `temperature` are those of the covariance.
    """

    centre: Singles
    whitening: Floats
    directions: Singles
    freedom: int
    shrinkage: float
    temperature: float

    @cached_property
    def precision(self) -> Singles:
        """The inverse of the frozen covariance, (D, D)."""
        return (self.whitening @ self.whitening.T).astype(np.float32)

    def whitened(self, centred: NDArray[np.floating]) -> Floats:
        """Centred features (n, D) under the frozen whitening, (n, D)."""
        return np.asarray(centred @ self.whitening)

    def squares(self, centred: Singles) -> Singles:
        """Squared lengths of whitened means, (n,), of means (n, D) that are centred."""
        white = centred @ self.whitening.astype(np.float32)
        return np.asarray(np.einsum("nd,nd->n", white, white))

    def reduced(self, centred: Singles, squares: Singles) -> Singles:
        """What faiss stores of centred means (n, D): principal coordinates, and the length of the rest, (n, stored).

        With the rest as a coordinate in which queries are 0, lengths stay exact. Zeros fill up to a multiple of 4.
        """
        coordinates = centred @ self.directions
        rest = np.maximum(squares - np.einsum("nd,nd->n", coordinates, coordinates), 0.0)
        return self._filled(coordinates, np.sqrt(rest))

    def centred(self, features: Singles) -> Singles:
        """Features less the centre, (n, D)."""
        return features - self.centre

    def queries(self, centred: Singles) -> Singles:
        """Centred features of prompts (n, D) as faiss is asked for them, (n, stored)."""
        return self._filled(centred @ self.directions, np.zeros(len(centred), dtype=np.float32))

    @property
    def stored(self) -> int:
        """Length of the vectors that faiss stores."""
        return stored_width(self.directions.shape[1])

    def _filled(self, coordinates: Singles, last: Singles) -> Singles:
        found = np.zeros((len(coordinates), self.stored), dtype=np.float32)
        found[:, : coordinates.shape[1]] = coordinates
        found[:, coordinates.shape[1]] = last
        return found


def stored_width(directions: int) -> int:
    """Length of the vectors that faiss stores for so many principal directions."""
    return -(-(directions + 1) // 4) * 4


@dataclass(frozen=True, eq=False)
class Metric:
    """The inverse of the current covariance: `precision` (D, D); for candidates by way of the frozen one.

    μᵀ P μ = scale · (frozen square) - Σ shares (leaningᵀ μ)², with `leaning` (D, r) and `shares` (r,).
    """

    precision: Singles
    leaning: Singles
    shares: Singles
    scale: float
    temperature: float

    @classmethod
    def of(cls, frame: Frame, drift: Drift) -> Metric:
        """The metric of a version after these changes."""
        directions, values = drift.correction
        leaning = frame.whitening @ directions  # (D, r)
        shares = drift.scale * values / (1.0 + values)
        precision = drift.scale * frame.precision - (leaning * shares) @ leaning.T
        single = np.float32
        return cls(
            precision.astype(single), leaning.astype(single), shares.astype(single), drift.scale, frame.temperature
        )

    def fits(self, query: Singles, means: Singles, squares: Singles) -> Floats:
        """How well a centred prompt (D,) fits adapters of centred means (C, D), (C,): as `Discriminant.fits`.

        Args:
            query: centred features of one prompt; one, so that it scores the same in every batch.
            means: of the candidates.
            squares: squared lengths of the means under the frozen whitening, (C,).
        """
        turned = self.precision @ query  # (D,)
        current = self.scale * squares - (means @ self.leaning) ** 2 @ self.shares
        distances = float(query @ turned) - 2.0 * (means @ turned).astype(np.float64) + current
        return np.asarray(-0.5 * np.maximum(distances, 0.0) / self.temperature)
