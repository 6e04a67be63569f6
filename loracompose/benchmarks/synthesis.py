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
"""Adapters that are drawn together: adapter i is the same in every pool that has it."""

_MOVED, _TILTED, _PROFILE = 1.0, 0.2, 20
_WORDS, _REPLACED = 30, 0.2


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
        """What prompts deviate from the mean of their adapter, unbiased in the spread, (prompts, width)."""
        counts = np.bincount(self.owners)[self.owners][:, None]
        return np.asarray((self.features - self.means[self.owners]) * np.sqrt(counts / (counts - 1)), dtype=np.float32)

    @cached_property
    def differences(self) -> Singles:
        """What the means deviate from their mean, (adapters, width)."""
        return np.asarray(self.means - self.means.mean(axis=0), dtype=np.float32)

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


def draw_block(profiles: Profiles, block: int, examples: int) -> Drawn:
    """The adapters of one block of `BLOCK`."""
    random = np.random.default_rng([17, block])
    width = profiles.features.shape[1]
    bases = random.integers(0, len(profiles.means), BLOCK)
    truths = profiles.means[bases] + _MOVED * mixed(profiles.differences, BLOCK, random)
    truths += _TILTED * mixed(profiles.deviations, BLOCK, random)
    spread = mixed(profiles.deviations, BLOCK * examples, random).reshape(BLOCK, examples, width)
    spread -= spread.mean(axis=1, keepdims=True)
    error = mixed(profiles.deviations, BLOCK, random) / np.sqrt(_PROFILE)
    drawn = (truths + error)[:, None] + spread * np.sqrt(examples / max(examples - 1, 1))
    texts = [[worded(profiles, base, random) for _ in range(examples)] for base in bases.tolist()]
    return Drawn(unit_quarters(drawn.reshape(-1, width)).reshape(BLOCK, examples, width), texts, truths, bases)


def draw_queries(profiles: Profiles, drawn: Drawn, rows: NDArray[np.int64], seed: int) -> tuple[Singles, list[str]]:
    """Fresh prompts of these adapters of a block: features (rows, width) and texts."""
    random = np.random.default_rng([23, seed])
    features = unit_quarters(drawn.truths[rows] + mixed(profiles.deviations, len(rows), random, parts=2))
    return features, [worded(profiles, int(drawn.bases[row]), random) for row in rows]


def mixed(pool: Singles, count: int, random: np.random.Generator, parts: int = 6) -> Singles:
    """Random combinations of rows of a pool with weights of unit length: of the same covariance, (count, width)."""
    weights = random.standard_normal((count, parts), dtype=np.float32)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    found = np.zeros((count, pool.shape[1]), dtype=np.float32)
    for part in range(parts):
        found += weights[:, part, None] * pool[random.integers(0, len(pool), count)]
    return found


def worded(profiles: Profiles, base: int, random: np.random.Generator) -> str:
    """A prompt of a real adapter, cut short, with some words replaced."""
    own, every = profiles.words
    words = list(own[base][int(random.integers(len(own[base])))])
    for place in np.flatnonzero(random.random(len(words)) < _REPLACED).tolist():
        words[place] = every[int(random.integers(len(every)))]
    return " ".join(words)


def unit_quarters(rows: Singles) -> Singles:
    """Rows whose four quarters are of length 1, as those of `features` are."""
    quarters = np.split(rows, 4, axis=1)
    return np.concatenate([part / np.linalg.norm(part, axis=1, keepdims=True) for part in quarters], axis=1)
