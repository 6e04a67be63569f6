"""The lexicon's evidence for few adapters of a large pool: their n-grams from a file, frequencies from a bounded table.

An adapter's n-grams are kept as the lower 32 bits of their keys, ascending, with the number of its examples that have
each. How frequent an n-gram is in the pool is counted over the adapters of a sample when a version is made, and frozen
with it; one that the table lacks counts as frequent as in a single example.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.lexicon import EXPONENT, PSEUDO_COUNT, ngram_keys
from loracompose.retrieval.scale.rows import MappedFile

Short = NDArray[np.uint32]
Floats = NDArray[np.float64]

ENTRY_BYTES = 5
"""Of one n-gram of one adapter: its key and its count."""

TABLE_SIZE = 1 << 20
_MANY = 255
_BITS = 1 << 16


class Wording(NamedTuple):
    """The n-grams of one adapter: short keys, ascending, and how many of its examples have each."""

    keys: Short
    counts: NDArray[np.uint8]

    def packed(self) -> bytes:
        """As it lies in a file."""
        return self.keys.astype("<u4").tobytes() + self.counts.tobytes()

    @classmethod
    def unpacked(cls, content: bytes | memoryview) -> Wording:
        """From a file."""
        size = len(content) // ENTRY_BYTES
        return cls(np.frombuffer(content, "<u4", size), np.frombuffer(content, np.uint8, size, 4 * size))


def read_wording(examples: Iterable[str]) -> Wording:
    """The n-grams of an adapter, given by its example prompts."""
    keys, counts = np.unique(np.concatenate([short_keys(text) for text in examples]), return_counts=True)
    return Wording(keys, np.minimum(counts, _MANY).astype(np.uint8))


def short_keys(text: str) -> Short:
    """The lower 32 bits of the keys of a text's distinct n-grams, ascending."""
    return np.unique(ngram_keys(text).astype(np.uint32))


class WordingFile:
    """The n-grams of the adapters of a version, in its order; `starts` (N + 1,) in n-grams."""

    def __init__(self, file: MappedFile, starts: NDArray[np.int64]) -> None:
        self._file = file
        self._starts = starts

    def take(self, rows: NDArray[np.int64]) -> list[Wording]:
        """Those of the adapters in these rows."""
        begins, ends = ENTRY_BYTES * self._starts[rows], ENTRY_BYTES * self._starts[rows + 1]
        content = self._file.content
        found = [Wording.unpacked(bytes(content[a:b])) for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]
        if len(rows):
            self._file.touched(len(rows), int((ends - begins).mean()))
        return found


@dataclass(frozen=True, eq=False)
class Frequencies:
    """How many of `examples` prompts have each n-gram; `keys` ascending, at most `TABLE_SIZE`."""

    keys: Short
    counts: NDArray[np.float32]
    examples: int

    @classmethod
    def of(cls, wordings: Sequence[Wording], examples: int) -> Frequencies:
        """Counted over these adapters; if there are too many n-grams, the rarest are left out."""
        if not wordings:
            return cls(np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.float32), 1)
        keys, place = np.unique(np.concatenate([wording.keys for wording in wordings]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([wording.counts for wording in wordings]))
        kept = np.sort(np.argsort(-counts, kind="stable")[:TABLE_SIZE])
        return cls(keys[kept], counts[kept].astype(np.float32), max(examples, 1))

    def shares(self, keys: Short) -> tuple[Floats, NDArray[np.bool_]]:
        """Share of the prompts with each n-gram, at least one of them; and whether the table has it."""
        if not len(self.keys):
            return np.full(len(keys), 1.0 / self.examples), np.zeros(len(keys), dtype=np.bool_)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        known = self.keys[place] == keys
        return np.where(known, self.counts[place], 1.0) / self.examples, known

    def evidence(self, keys: Short, wordings: Sequence[Wording], sizes: NDArray[np.int64]) -> Floats:
        """`Lexicon.scores` of a prompt for some adapters, (C,).

        Args:
            keys: short keys of the prompt's n-grams.
            wordings: of the adapters.
            sizes: number of examples of each adapter, (C,).
        """
        shares, known = self.shares(keys)
        adapters, counts, place = _found(keys, wordings)
        known[place] = True
        absent = known.sum() * np.log(PSEUDO_COUNT / (sizes + PSEUDO_COUNT))
        gains = np.log1p(counts / (PSEUDO_COUNT * shares[place]))
        total = absent + np.bincount(adapters, gains, minlength=len(wordings))
        return np.asarray(total / float(max(len(keys), 1) ** EXPONENT))


def _found(
    keys: Short, wordings: Sequence[Wording]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Where the adapters have n-grams of a prompt: adapter, count, and place among the keys."""
    every = np.concatenate([wording.keys for wording in wordings])
    marked = np.zeros(_BITS, dtype=np.bool_)  # of the many most are told apart by their lower bits
    marked[keys & (_BITS - 1)] = True
    likely = np.flatnonzero(marked[every & (_BITS - 1)])
    place = np.minimum(np.searchsorted(keys, every[likely]), max(len(keys) - 1, 0))
    same = keys[place] == every[likely] if len(keys) else np.zeros(0, dtype=np.bool_)
    hits, place = likely[same], place[same]
    ends = np.cumsum([len(wording.keys) for wording in wordings])
    counts = np.concatenate([wording.counts for wording in wordings])[hits]
    return np.searchsorted(ends, hits, side="right"), counts.astype(np.float64), place
