"""A linear discriminant over example embeddings, in closed form: whiten by what varies within adapters, then compare.

Prompts of one adapter differ among themselves in subject, length and phrasing. These directions tell nothing about
the adapter, and the pooled within-adapter covariance says which they are. Distances are measured under it, shrunk
towards a multiple of the identity since there are few examples for its size. How far is chosen by leaving each
example out in turn, which a rank-one downdate of the covariance gives exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.weighting import likeliest_temperature, log_softmax

Floats = NDArray[np.float64]

SHRINKAGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.0)
"""Where the shrinkage is looked for; 1 is plain Euclidean distance to the mean."""

_TOGETHER = 256  # examples that are held out by one product of matrices


@dataclass(frozen=True, eq=False)
class Statistics:
    """All that the discriminant needs to know of a pool of K adapters; exact under coming and going.

    `counts` (K,) examples of each adapter; `sums` (K, D) of their features; `scatter` (D, D) the sum over all
    examples of the outer product of their deviation from the mean of their own adapter.
    """

    counts: NDArray[np.int64]
    sums: Floats
    scatter: Floats

    @classmethod
    def of(cls, groups: Sequence[NDArray[np.float32]], width: int) -> Statistics:
        """Statistics of adapters given by the features of their examples, each (examples, width)."""
        empty = cls(np.zeros(0, dtype=np.int64), np.zeros((0, width)), np.zeros((width, width)))
        return empty.adding(groups)

    def adding(self, groups: Sequence[NDArray[np.float32]]) -> Statistics:
        """With more adapters, at the end."""
        if not groups:
            return self
        counts = np.array([len(group) for group in groups], dtype=np.int64)
        sums = np.stack([group.sum(axis=0, dtype=np.float64) for group in groups])  # (new, D)
        return Statistics(
            np.concatenate([self.counts, counts]), np.concatenate([self.sums, sums]), self.scatter + _scatter(groups)
        )

    def removing(self, rows: Sequence[int], groups: Sequence[NDArray[np.float32]]) -> Statistics:
        """Without the adapters in these rows, whose features are `groups`."""
        if not len(rows):
            return self
        kept = np.setdiff1d(np.arange(len(self.counts)), rows)
        return Statistics(self.counts[kept], self.sums[kept], self.scatter - _scatter(groups))

    @property
    def means(self) -> Floats:
        """Mean features of each adapter, (K, D)."""
        return self.sums / self.counts[:, None]

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the scatter."""
        return int(self.counts.sum()) - len(self.counts)

    @property
    def varies(self) -> bool:
        """Whether anything is known about what varies within adapters; not where they have one example each."""
        return self.freedom > 0 and bool(np.trace(self.scatter) > 1e-9)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The within-adapter covariance in its own axes, and the means of the adapters there.

    `axes` (D, D), columns are the eigenvectors; `variances` (D,) along them; `means` (K, D); `counts` (K,).
    """

    axes: Floats
    variances: Floats
    means: Floats
    counts: NDArray[np.int64]
    freedom: int

    @classmethod
    def of(cls, statistics: Statistics) -> Spectrum:
        """One eigendecomposition, after which every shrinkage is cheap."""
        width = len(statistics.scatter)
        if statistics.varies:
            values, axes = np.linalg.eigh(statistics.scatter / statistics.freedom)
            variances = np.maximum(values, 0.0)  # rounding, and what removals left of it
        else:
            variances, axes = np.full(width, 1.0 / width), np.eye(width)
        return cls(axes, variances, statistics.means @ axes, statistics.counts, statistics.freedom)

    def scale(self, shrinkage: float) -> Floats:
        """What to multiply each axis with to whiten the shrunk covariance, (D,)."""
        target = self.variances.mean()
        scale: Floats = 1.0 / np.sqrt((1.0 - shrinkage) * self.variances + shrinkage * target)
        return scale

    def held_out(self, groups: Sequence[Floats], rows: Sequence[int], shrinkage: float) -> Floats:
        """Half the negative squared distances of examples to all means, each example held out, (queries, K).

        `groups` are in the spectrum's own axes: `features @ axes`.

        The example's own mean is taken without it and the covariance downdated by it (Sherman and Morrison); only
        the target and the degrees of freedom of the covariance still know it. An adapter of one example gives no
        query.
        """
        scale = self.scale(shrinkage)
        means = self.means * scale  # (K, D)
        part = (1.0 - shrinkage) / max(self.freedom, 1)
        usable = [(group * scale, row) for group, row in zip(groups, rows, strict=True) if len(group) > 1]
        ends = np.cumsum([len(group) for group, _ in usable], dtype=np.int64)
        cuts = np.flatnonzero(np.diff(ends // _TOGETHER)) + 1
        blocks = [usable[start:end] for start, end in pairwise([0, *cuts.tolist(), len(usable)])]
        found = [
            _held_out([group for group, _ in block], [row for _, row in block], means, part)
            for block in blocks
            if block
        ]
        return np.concatenate(found) if found else np.zeros((0, len(means)))


@dataclass(frozen=True, eq=False)
class Discriminant:
    """The fitted transform. `whitening` (D, D), `means` (K, D) whitened; scores are divided by `temperature`."""

    whitening: Floats
    means: Floats
    shrinkage: float
    temperature: float

    @classmethod
    def of(cls, spectrum: Spectrum, shrinkage: float, temperature: float) -> Discriminant:
        """The discriminant at this shrinkage and temperature."""
        scale = spectrum.scale(shrinkage)
        return cls(spectrum.axes * scale, spectrum.means * scale, shrinkage, temperature)

    @classmethod
    def directly(cls, statistics: Statistics, shrinkage: float, temperature: float) -> Discriminant:
        """The same by a Cholesky factor instead of eigenvectors: a tenth of the time where one shrinkage is all."""
        width = len(statistics.scatter)
        covariance = statistics.scatter / statistics.freedom if statistics.varies else np.eye(width) / width
        target = np.trace(covariance) / width
        covariance = (1.0 - shrinkage) * covariance + shrinkage * target * np.eye(width)
        whitening = np.linalg.inv(np.linalg.cholesky(covariance)).T  # (D, D)
        return cls(whitening, statistics.means @ whitening, shrinkage, temperature)

    def distances(self, features: NDArray[np.float32]) -> Floats:
        """Squared distances of features (batch, D) to the means, (batch, K).

        In float64, so that in float32 a prompt has the same score in every batch.
        """
        white = features.astype(np.float64) @ self.whitening  # (batch, D)
        squares = (white**2).sum(axis=1)[:, None] - 2.0 * white @ self.means.T + (self.means**2).sum(axis=1)
        return np.asarray(np.maximum(squares, 0.0))

    def fits(self, features: NDArray[np.float32]) -> Floats:
        """How well features (batch, D) fit each adapter, (batch, K): log p(prompt | adapter) up to a constant."""
        return -0.5 * self.distances(features) / self.temperature

    def scores(self, features: NDArray[np.float32]) -> Floats:
        """The logarithm of p(adapter | prompt) under equal priors, (batch, K), for features (batch, D)."""
        return log_softmax(self.fits(features))


def fit_discriminant(
    spectrum: Spectrum, groups: Sequence[NDArray[np.float32]], rows: Sequence[int]
) -> tuple[float, float]:
    """Shrinkage and temperature under which held-out examples choose their own adapter with the best likelihood.

    Args:
        spectrum: of the whole pool.
        groups: features of the examples of some adapters, each (examples, D).
        rows: the row of the pool that each of them is.

    Returns:
        Shrinkage and temperature; (1, 1) where there is nothing to hold out or nothing to choose between.
    """
    own = own_columns(groups, rows)
    if not len(own) or len(spectrum.means) < 2:
        return 1.0, 1.0
    best = (-np.inf, 1.0, 1.0)
    turned = [group @ spectrum.axes for group in groups]
    for shrinkage in SHRINKAGES:
        scores = spectrum.held_out(turned, rows, shrinkage)
        temperature, likelihood = likeliest_temperature(scores, own)
        best = max(best, (likelihood, shrinkage, temperature))
    return best[1:]


def own_columns(groups: Sequence[NDArray[np.float32]], rows: Sequence[int]) -> NDArray[np.int64]:
    """The own adapter of each example that can be held out, (queries,), in the order of `Spectrum.held_out`."""
    lengths = [len(group) if len(group) > 1 else 0 for group in groups]
    return np.repeat(np.asarray(rows, dtype=np.int64), lengths)


def _scatter(groups: Sequence[NDArray[np.float32]]) -> Floats:
    centred = np.concatenate([group - group.mean(axis=0, dtype=np.float64) for group in groups])
    scatter: Floats = centred.T @ centred
    return scatter


def _held_out(groups: Sequence[Floats], rows: Sequence[int], means: Floats, part: float) -> Floats:
    """Half the negative squared distances of whitened examples, (n, D) in all, to all means, (n, K).

    Args:
        groups: those of some adapters, each (m, D).
        rows: the rows of these adapters among the means.
        means: of all adapters, whitened.
        part: see below.

    With v = sqrt(m / (m - 1)) (x - mean), the scatter without x is S - v vᵀ. Under the shrunk covariance C, which has
    `part` of it, (C - part v vᵀ)⁻¹ = C⁻¹ + part C⁻¹ v vᵀ C⁻¹ / (1 - part vᵀ C⁻¹ v); here C is the identity.
    """
    sizes, own = np.array([len(group) for group in groups]), np.concatenate(groups)
    column, m = np.repeat(rows, sizes), np.repeat(sizes, sizes)
    stretch = np.sqrt(m / (m - 1))  # (n,)
    deviation = (own - means[column]) * stretch[:, None]  # (n, D), v
    products = own @ means.T  # (n, K)
    between = np.repeat(means[list(rows)] @ means.T, sizes, axis=0)  # (n, K), products of the own mean
    squares = (own**2).sum(axis=1)[:, None] - 2.0 * products + (means**2).sum(axis=1)  # (n, K)
    inner = np.einsum("nd,nd->n", own, deviation)[:, None] - stretch[:, None] * (products - between)  # (x - mean_k) · v
    length = (deviation**2).sum(axis=1)  # (n,), v · v
    # The own mean without x: x - mean' = m / (m - 1) (x - mean) = sqrt(m / (m - 1)) v
    every = np.arange(len(own))
    squares[every, column], inner[every, column] = length * m / (m - 1), length * stretch
    leverage = np.minimum(part * length, 1.0 - 1e-9)[:, None]
    return np.asarray(-0.5 * (squares + part * inner**2 / (1.0 - leverage)))
