"""Distances to candidates under the current statistics: the version's whitening, corrected for what came and went."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.scale.drift import Drift, Floats
from loracompose.retrieval.scale.rows import Scaled

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

    @cached_property
    def _single(self) -> Singles:
        return self.whitening.astype(np.float32)

    def squares(self, centred: Singles) -> Singles:
        """Squared lengths of whitened means, (n,), of means (n, D) that are centred."""
        white = centred @ self._single
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
class Turned:
    """Half of one prompt, ready to be compared: P q, (D,), and qᵀ P q under the current inverse covariance P."""

    vector: Singles
    square: float


@dataclass(frozen=True, eq=False)
class Metric:
    """The inverse of the current covariance, P = scale · (frozen inverse) - leaning diag(shares) leaningᵀ.

    `leaning` (D, r), `shares` (r,). It is applied in these parts and never formed, so that a change costs no D x D.
    """

    frame: Frame
    leaning: Singles
    shares: Singles
    scale: float

    @classmethod
    def of(cls, frame: Frame, drift: Drift) -> Metric:
        """The metric of a version after these changes."""
        directions, values = drift.correction
        shares = drift.scale * values / (1.0 + values)
        leaning = frame.whitening @ directions  # (D, r)
        return cls(frame, leaning.astype(np.float32), shares.astype(np.float32), drift.scale)

    def turned(self, queries: Singles) -> list[Turned]:
        """Centred halves of prompts, (n, D), ready to be compared."""
        turned = self.scale * (queries @ self.frame.precision)  # (n, D)
        if len(self.shares):
            turned -= (queries @ self.leaning * self.shares) @ self.leaning.T
        squares = np.einsum("nd,nd->n", queries, turned)
        return [Turned(vector, float(square)) for vector, square in zip(turned, squares, strict=True)]

    def squares(self, means: Scaled, frozen: Singles) -> Singles:
        """Squared lengths μᵀ P μ of centred means, (C,), from those under the frozen whitening, (C,)."""
        current = self.scale * frozen
        if len(self.shares):
            current -= means.times(self.leaning) ** 2 @ self.shares
        return np.asarray(current)

    def fits(self, query: Turned, means: Scaled, squares: Singles) -> Floats:
        """How well a prompt fits adapters of centred means (C, D), (C,): as `Discriminant.fits`.

        Args:
            query: half of the prompt.
            means: of the candidates.
            squares: squared lengths of the means under the frozen whitening, (C,).
        """
        products = means.times(query.vector).astype(np.float64)
        distances = query.square - 2.0 * products + self.squares(means, squares)
        return np.asarray(-0.5 * np.maximum(distances, 0.0) / self.frame.temperature)
