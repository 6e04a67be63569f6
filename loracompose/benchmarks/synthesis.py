"""Synthetic pools: real adapters moved, with the real spread of their prompts, as many as are wanted.

The mean of a synthetic adapter is that of a real one moved by as much as real ones differ (a random combination of
differences between real means, with their covariance) and by a fifth of a standard deviation in the directions in which
prompts of one adapter vary. Its examples spread as real ones do; their mean misses the true one by the error of a
profile of 20, whatever the number of examples that is stored. Prompts to search for are fresh draws about the true
mean. Texts are those of the real adapter, cut short, with words replaced at random.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Singles = NDArray[np.float32]

BLOCK = 4096
"""Adapters that are drawn together: adapter i is the same in every pool that stores as many examples."""

_MOVED, _TILTED, _PROFILE = 1.0, 0.2, 20
_WORDS, _REPLACED = 30, 0.2
_STOCK = 8192  # combinations that are made once, and mixed by twos


@dataclass(frozen=True, eq=False)
class Profiles:
    """Real adapters: embeddings of their example prompts, (prompts, width); whose each is; and the prompts."""

    features: Singles
    owners: NDArray[np.int64]
    texts: tuple[str, ...]

    @cached_property
    def means(self) -> Singles:
        """Mean of each adapter, (adapters, width)."""
        return np.stack([self.features[self.owners == owner].mean(axis=0) for owner in range(self.owners.max() + 1)])

    @cached_property
    def deviations(self) -> Singles:
        """Draws of what prompts deviate from the mean of their adapter, unbiased in the spread, (stock, width)."""
        counts = np.bincount(self.owners)[self.owners][:, None]
        own = (self.features - self.means[self.owners]) * np.sqrt(counts / (counts - 1))
        return combined(own.astype(np.float32), np.random.default_rng(3))

    @cached_property
    def differences(self) -> Singles:
        """Draws of what the means deviate from their mean, (stock, width)."""
        return combined((self.means - self.means.mean(axis=0)).astype(np.float32), np.random.default_rng(4))

    @cached_property
    def words(self) -> tuple[tuple[tuple[tuple[str, ...], ...], ...], tuple[str, ...]]:
        """The words of each adapter's prompts, cut short; and all of them."""
        cut = [tuple(text.split()[:_WORDS]) for text in self.texts]
        own = tuple(
            tuple(cut[row] for row in np.flatnonzero(self.owners == owner)) for owner in range(self.owners.max() + 1)
        )
        return own, tuple(sorted({word for words in cut for word in words}))


@dataclass(frozen=True, eq=False)
class Drawn:
    """Consecutive synthetic adapters: embeddings of their examples, (count, examples, width), texts, true means."""

    embeddings: Singles
    texts: list[list[str]]
    truths: Singles
    bases: NDArray[np.int64]


def read_profiles(path: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Prompts and the number of the adapter of each, from JSON lines with "adapter" and "prompt"."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    names = list(dict.fromkeys(line["adapter"] for line in lines))
    owners = np.array([names.index(line["adapter"]) for line in lines], dtype=np.int64)
    return [line["prompt"] for line in lines], owners


def draw_block(profiles: Profiles, block: int, examples: int, count: int = BLOCK) -> Drawn:
    """The first `count` adapters of one block of `BLOCK`."""
    random = np.random.default_rng([17, block])
    width = profiles.features.shape[1]
    bases = random.integers(0, len(profiles.means), BLOCK)[:count]
    truths = profiles.means[bases] + _MOVED * mixed(profiles.differences, count, random)
    truths += _TILTED * mixed(profiles.deviations, count, random)
    spread = mixed(profiles.deviations, count * examples, random).reshape(count, examples, width)
    spread -= spread.mean(axis=1, keepdims=True)
    spread *= np.float32(np.sqrt(examples / max(examples - 1, 1)))
    spread += (truths + mixed(profiles.deviations, count, random) / np.float32(np.sqrt(_PROFILE)))[:, None]
    found = unit_quarters(spread.reshape(-1, width)).reshape(count, examples, width)
    texts = worded(profiles, np.repeat(bases, examples), random)
    grouped = [texts[start : start + examples] for start in range(0, len(texts), examples)]
    return Drawn(found, grouped, truths, bases)


def draw_queries(profiles: Profiles, drawn: Drawn, rows: NDArray[np.int64], seed: int) -> tuple[Singles, list[str]]:
    """Fresh prompts of these adapters of a block: features (rows, width) and texts."""
    random = np.random.default_rng([23, seed])
    features = unit_quarters(drawn.truths[rows] + mixed(profiles.deviations, len(rows), random))
    return features, worded(profiles, drawn.bases[rows], random)


def combined(pool: Singles, random: np.random.Generator) -> Singles:
    """Random combinations of all rows of a pool with weights of unit length: of its covariance, (stock, width)."""
    weights = random.standard_normal((_STOCK, len(pool)), dtype=np.float32)
    return np.asarray(weights / np.linalg.norm(weights, axis=1, keepdims=True) @ pool, dtype=np.float32)


def mixed(stock: Singles, count: int, random: np.random.Generator) -> Singles:
    """Random combinations of two rows of a stock with weights of unit length: of its covariance, (count, width)."""
    angles = random.random(count, dtype=np.float32) * np.float32(2 * np.pi)
    found = stock[random.integers(0, len(stock), count)]
    found *= np.cos(angles)[:, None]
    other = stock[random.integers(0, len(stock), count)]
    other *= np.sin(angles)[:, None]
    found += other
    return found


def worded(profiles: Profiles, bases: NDArray[np.int64], random: np.random.Generator) -> list[str]:
    """For each real adapter that is named one of its prompts, cut short, with some words replaced."""
    own, every = profiles.words
    chosen = (random.random(len(bases)) * np.array([len(own[base]) for base in range(len(own))])[bases]).astype(int)
    found = [list(own[base][prompt]) for base, prompt in zip(bases.tolist(), chosen.tolist(), strict=True)]
    rows, places = np.nonzero(random.random((len(bases), _WORDS)) < _REPLACED)
    others = random.integers(0, len(every), len(rows))
    for row, place, other in zip(rows.tolist(), places.tolist(), others.tolist(), strict=True):
        if place < len(found[row]):
            found[row][place] = every[other]
    return [" ".join(words) for words in found]


def unit_quarters(rows: Singles) -> Singles:
    """Rows, changed in place, whose four quarters are of length 1, as those of `features` are."""
    for part in np.split(rows, 4, axis=1):
        part /= np.sqrt(np.einsum("nd,nd->n", part, part))[:, None]
    return rows
