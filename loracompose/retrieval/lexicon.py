"""Words as evidence: how much likelier each n-gram of a prompt is in the examples of one adapter than in all.

Runs of one to four words, punctuation marks and line breaks, case kept, so that the fixed parts of a template count;
the beginning and the end of the text are marks as well, since a template stands at one of them.
Each that occurs in the pool gives an adapter log (n + a p) / ((m + a) p), where n of the adapter's m examples have it
and a share p of all examples; a is a pseudo-count that draws rare evidence towards none. What the pool never saw gives
none to anybody, but counts in the length that the sum is divided by: of an unseen phrasing little is evidence,
and the score says so by being small. Only counts of examples are kept: adapters come and go exactly.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]

LONGEST = 4
"""Words in the longest n-gram."""

PSEUDO_COUNT = 1.0
EXPONENT = 1.0 / 3.0
"""The sum of the evidence is divided by (number of distinct n-grams) to this power: they overlap and repeat each other,
so a text of twice the length has less than twice the evidence."""

BEGIN, END = "\x02", "\x03"
"""Marks of a text's edges."""

_TOKEN = re.compile(r"\w+|[^\w\s]|\n+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing


def tokens(text: str) -> list[str]:
    """Words, punctuation marks and line breaks of a text."""
    return _TOKEN.findall(text)


def ngram_keys(text: str) -> Keys:
    """Hashes of the distinct n-grams of a text, ascending."""
    return np.unique(np.concatenate([keys for _, keys in ngram_runs(text)]))


def ngram_texts(text: str) -> dict[int, str]:
    """The n-grams of a text by their hashes."""
    words = [BEGIN, *tokens(text), END]
    return {
        int(key): " ".join(word for word in words[start : start + length] if word not in (BEGIN, END))
        for length, keys in ngram_runs(text)
        for start, key in enumerate(keys)
    }


def read_profile(examples: Sequence[str]) -> tuple[Keys, ...]:
    """The keys of each of an adapter's examples."""
    return tuple(ngram_keys(text) for text in examples)


@dataclass(frozen=True, eq=False)
class Lexicon:
    """The n-grams of the examples of K adapters; `profiles[i]` are the keys of each example of adapter i."""

    profiles: tuple[tuple[Keys, ...], ...]

    @classmethod
    def of(cls, examples: Iterable[Sequence[str]]) -> Lexicon:
        """The lexicon of adapters given by their example prompts."""
        return cls(tuple(read_profile(group) for group in examples))

    def scores(self, keys: Keys) -> Floats:
        """Evidence of a prompt, given by the keys of its n-grams, for each adapter, (K,)."""
        known, adapters, counts, owners = self._find(keys)
        frequency = self._frequency[known]  # (known,)
        total = _evidence(adapters, counts, frequency[owners], self._sizes, float(self._sizes.sum()), len(known))
        return total / _length(keys)

    def held_out(self, rows: Sequence[int]) -> Floats:
        """The scores of the examples of these adapters, each held out, (queries, K).

        An adapter of one example gives no query.
        """
        found = [self._without(row, keys) for row in rows for keys in self.profiles[row] if len(self.profiles[row]) > 1]
        return np.stack(found) if found else np.zeros((0, len(self.profiles)))

    def contributions(self, keys: Keys, adapter: int) -> list[tuple[int, float]]:
        """Key and evidence of each known n-gram of a prompt for one adapter against the mean of all, best first."""
        known, adapters, counts, owners = self._find(keys)
        values = np.log1p(counts / (PSEUDO_COUNT * self._frequency[known][owners] / self._sizes.sum()))
        own = np.bincount(owners[adapters == adapter], values[adapters == adapter], minlength=len(known))
        mean = np.bincount(owners, values, minlength=len(known)) / len(self.profiles)
        gain = (own - mean) / _length(keys)
        order = np.argsort(-gain, kind="stable")
        return [(int(self._keys[known[i]]), float(gain[i])) for i in order]

    def coverage(self, keys: Keys) -> float:
        """Share of a prompt's distinct n-grams that the pool has."""
        return len(self._find(keys)[0]) / max(len(keys), 1)

    def _without(self, row: int, keys: Keys) -> Floats:
        known, adapters, counts, owners = self._find(keys)  # all of them, for the example is in the pool
        frequency = self._frequency[known] - 1.0
        left = counts - (adapters == row)
        kept = (frequency[owners] > 0) & (left > 0)
        sizes = self._sizes - (np.arange(len(self._sizes)) == row)
        seen = int((frequency > 0).sum())
        total = _evidence(
            adapters[kept], left[kept], frequency[owners][kept], sizes, float(self._sizes.sum()) - 1.0, seen
        )
        return total / _length(keys)

    def _find(self, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats, NDArray[np.int64]]:
        """The known n-grams among these, and their postings: adapter, count, and which of the known it belongs to."""
        place = np.searchsorted(self._keys, keys)
        inside = place < len(self._keys)
        known = place[inside][self._keys[place[inside]] == keys[inside]]
        starts, lengths = self._starts[known], self._starts[known + 1] - self._starts[known]
        owners = np.repeat(np.arange(len(known)), lengths)
        within = np.arange(len(owners)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        chosen = np.repeat(starts, lengths) + within
        return known, self._adapters[chosen], self._counts[chosen], owners

    @cached_property
    def _sizes(self) -> Floats:
        return np.array([len(group) for group in self.profiles], dtype=np.float64)

    @cached_property
    def _postings(self) -> tuple[Keys, NDArray[np.int64], NDArray[np.int64], Floats]:
        """Distinct keys, ascending; where the postings of each start (and the end); adapters; counts."""
        flat = [keys for group in self.profiles for keys in group]
        keys = np.concatenate(flat) if flat else np.zeros(0, dtype=np.uint64)
        adapters = np.repeat(np.arange(len(self.profiles)), [sum(map(len, group)) for group in self.profiles])
        order = np.lexsort((adapters, keys))
        keys, adapters = keys[order], adapters[order]
        first = np.ones(len(keys), dtype=np.bool_)
        first[1:] = (keys[1:] != keys[:-1]) | (adapters[1:] != adapters[:-1])
        begins = np.flatnonzero(first)
        counts = np.diff(np.append(begins, len(keys))).astype(np.float64)
        distinct, starts = np.unique(keys[begins], return_index=True)
        return distinct, np.append(starts, len(begins)), adapters[begins], counts

    @property
    def _keys(self) -> Keys:
        return self._postings[0]

    @property
    def _starts(self) -> NDArray[np.int64]:
        return self._postings[1]

    @property
    def _adapters(self) -> NDArray[np.int64]:
        return self._postings[2]

    @property
    def _counts(self) -> Floats:
        return self._postings[3]

    @cached_property
    def _frequency(self) -> Floats:
        """Number of examples with each n-gram."""
        return np.add.reduceat(self._counts, self._starts[:-1]) if len(self._counts) else np.zeros(0)


def _evidence(
    adapters: NDArray[np.int64], counts: Floats, frequency: Floats, sizes: Floats, examples: float, seen: int
) -> Floats:
    """Sum of log (n + a p) / ((m + a) p) over `seen` n-grams, of which only those with n > 0 have a posting."""
    absent = seen * np.log(PSEUDO_COUNT / (sizes + PSEUDO_COUNT))  # (K,), n = 0
    gains = np.log1p(counts / (PSEUDO_COUNT * frequency / examples))
    return np.asarray(absent + np.bincount(adapters, gains, minlength=len(sizes)))


def _length(keys: Keys) -> float:
    return float(max(len(keys), 1) ** EXPONENT)


def ngram_runs(text: str) -> list[tuple[int, Keys]]:
    """The hashes of all runs of each length, in their order."""
    words = np.array([_hash(word) for word in (BEGIN, *tokens(text), END)], dtype=np.uint64)
    runs, keys = [(1, words)], words
    for length in range(2, LONGEST + 1):
        keys = keys[:-1] * _FACTOR + words[length - 1 :]  # wraps around; a shorter text has no such run
        runs.append((length, keys))
    return runs


@lru_cache(maxsize=1 << 16)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
