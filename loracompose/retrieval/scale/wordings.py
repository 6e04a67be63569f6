"""The lexicon's evidence for few adapters of a large pool: their n-grams from a file, frequencies from a bounded table.

An adapter's n-grams are kept as the lower 32 bits of their keys, ascending, with the number of its examples that have
each. How frequent an n-gram is in the pool is counted over the adapters of a sample when a version is made, and frozen
with it; one that the table lacks counts as frequent as in a single example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.lexicon import EXPONENT, PSEUDO_COUNT, ngram_runs
from loracompose.retrieval.scale.rows import StoredFile

Short = NDArray[np.uint32]
Floats = NDArray[np.float64]

TABLE_SIZE = 1 << 20
_MANY = 255
_MARKS = 1 << 13
_REST = 12  # of the 32 bits of a key those that do not lead


class Wordings(NamedTuple):
    """The n-grams of adapters, one after the other.

    `keys` short keys, ascending within an adapter; `counts` how many of its examples have each; `lengths` (C,) how many
    n-grams each adapter has.
    """

    keys: Short
    counts: NDArray[np.uint8]
    lengths: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Sequence[Wordings]) -> Wordings:
        """Of all parts, one after the other."""
        if not parts:
            return cls(np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=np.int64))
        keys, counts, lengths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return cls(keys, counts, lengths)

    def chosen(self, rows: Sequence[int]) -> Wordings:
        """Of these adapters."""
        ends = np.cumsum(self.lengths)
        cuts = [slice(int(ends[row] - self.lengths[row]), int(ends[row])) for row in rows]
        parts = [
            Wordings(self.keys[cut], self.counts[cut], self.lengths[[row]]) for row, cut in zip(rows, cuts, strict=True)
        ]
        return Wordings.joined(parts)


class Asked(NamedTuple):
    """A prompt: its short keys, how large a share of the pool's examples has each, and which the table has."""

    keys: Short
    shares: Floats
    known: NDArray[np.bool_]


def read_wordings(adapters: Sequence[Sequence[str]]) -> Wordings:
    """The n-grams of adapters, each given by its example prompts."""
    found = [short_keys(text) for examples in adapters for text in examples]
    owners = np.repeat(np.arange(len(adapters), dtype=np.uint64), [len(examples) for examples in adapters])
    marked = np.repeat(owners << 32, [len(keys) for keys in found]) | np.concatenate(found)
    distinct, counts = np.unique(marked, return_counts=True)  # sorted once for all of them
    lengths = np.bincount((distinct >> 32).astype(np.int64), minlength=len(adapters))
    return Wordings(distinct.astype(np.uint32), np.minimum(counts, _MANY).astype(np.uint8), lengths)


def short_keys(text: str) -> Short:
    """The lower 32 bits of the keys of a text's distinct n-grams, ascending."""
    keys = np.sort(np.concatenate([keys for _, keys in ngram_runs(text)]).astype(np.uint32))
    first = np.ones(len(keys), dtype=np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    return keys[first]


class WordingFile:
    """The n-grams of the adapters of a version, in its order; `starts` (N + 1,) of each adapter."""

    def __init__(self, keys: StoredFile, counts: StoredFile, starts: NDArray[np.int64]) -> None:
        self._keys, self._counts, self._starts = keys, counts, starts

    def take(self, rows: NDArray[np.int64]) -> Wordings:
        """Those of the adapters in these rows."""
        begins, ends = self._starts[rows], self._starts[rows + 1]
        keys = self._keys.pieces((4 * begins).tolist(), (4 * ends).tolist())
        counts = self._counts.pieces(begins.tolist(), ends.tolist())
        return Wordings(np.frombuffer(keys, dtype="<u4"), np.frombuffer(counts, dtype=np.uint8), ends - begins)


@dataclass(frozen=True, eq=False)
class Frequencies:
    """How many of `examples` prompts have each n-gram; `keys` ascending, at most `TABLE_SIZE`."""

    keys: Short
    counts: NDArray[np.float32]
    examples: int

    @classmethod
    def of(cls, wordings: Wordings, examples: int) -> Frequencies:
        """Counted over adapters of so many examples; if there are too many n-grams, the rarest are left out."""
        keys, place = np.unique(wordings.keys, return_inverse=True)
        counts = np.bincount(place, wordings.counts, minlength=len(keys))
        kept = np.sort(np.argsort(-counts, kind="stable")[:TABLE_SIZE])
        return cls(keys[kept], counts[kept].astype(np.float32), max(examples, 1))

    def asked(self, prompts: Sequence[str]) -> list[Asked]:
        """Prompts as they are compared with adapters; their n-grams are looked up all at once."""
        keys = [short_keys(prompt) for prompt in prompts]
        shares, known = self.shares(np.concatenate(keys))
        ends = list(accumulate(len(own) for own in keys))
        cuts = [slice(end - len(own), end) for own, end in zip(keys, ends, strict=True)]
        return [Asked(own, shares[cut], known[cut]) for own, cut in zip(keys, cuts, strict=True)]

    def shares(self, keys: Short) -> tuple[Floats, NDArray[np.bool_]]:
        """Share of the prompts with each n-gram, at least one of them; and whether the table has it."""
        if not len(self.keys):
            return np.full(len(keys), 1.0 / self.examples), np.zeros(len(keys), dtype=np.bool_)
        starts = self._starts[keys >> _REST]
        places = starts[:, None] + np.arange(self._longest)  # (n, longest)
        same = self.keys.take(places, mode="clip") == keys[:, None]
        known = same.any(axis=1)
        counts = self.counts[starts[known] + same[known].argmax(axis=1)]
        shares = np.ones(len(keys))
        shares[known] = counts
        return shares / self.examples, known

    @cached_property
    def _starts(self) -> NDArray[np.int32]:
        """Where the keys of each value of the leading bits start: a binary search would miss the cache at each step."""
        return np.searchsorted(self.keys, np.arange(1 << (32 - _REST), dtype=np.uint64) << _REST).astype(np.int32)

    @cached_property
    def _longest(self) -> int:
        """Most keys of one value of the leading bits."""
        return int(np.bincount(self.keys >> _REST).max())


def evidence(asked: Asked, wordings: Wordings, sizes: NDArray[np.int64]) -> Floats:
    """`Lexicon.scores` of a prompt for some adapters, (C,).

    Args:
        asked: the prompt.
        wordings: of the adapters.
        sizes: number of examples of each adapter, (C,).
    """
    adapters, counts, place = _found(asked.keys, wordings)
    known = asked.known.copy()
    known[place] = True
    absent = known.sum() * np.log(PSEUDO_COUNT / (sizes + PSEUDO_COUNT))
    gains = np.log1p(counts / (PSEUDO_COUNT * asked.shares[place]))
    total = absent + np.bincount(adapters, gains, minlength=len(sizes))
    return np.asarray(total / float(max(len(asked.keys), 1) ** EXPONENT))


def _found(keys: Short, wordings: Wordings) -> tuple[NDArray[np.int64], Floats, NDArray[np.int64]]:
    """Where the adapters have n-grams of a prompt: adapter, count, and place among the keys."""
    if not len(keys) or not len(wordings.keys):
        nothing = np.zeros(0, dtype=np.int64)
        return nothing, np.zeros(0), nothing
    marked = np.zeros(_MARKS, dtype=np.bool_)  # of the many most are told apart by their lower bits
    marked[keys & (_MARKS - 1)] = True
    likely = np.flatnonzero(marked.take(np.bitwise_and(wordings.keys, _MARKS - 1, dtype=np.int64), mode="clip"))
    place = np.minimum(np.searchsorted(keys, wordings.keys[likely]), len(keys) - 1)
    same = keys[place] == wordings.keys[likely]
    hits, place = likely[same], place[same]
    adapters = np.searchsorted(np.cumsum(wordings.lengths), hits, side="right")
    return adapters, wordings.counts[hits].astype(np.float64), place
