"""Evidence of the lexicon for few adapters, against the lexicon of all."""

from __future__ import annotations

import numpy as np
import pytest

from loracompose.retrieval.lexicon import Lexicon, ngram_keys
from loracompose.retrieval.scale import rows, wordings
from loracompose.retrieval.scale.rows import StoredFile
from loracompose.retrieval.scale.wordings import Frequencies, WordingFile, Wordings, evidence, read_wordings
from tests.retrieval.scale.material import texts

POOL = [texts(seed, 2 + seed % 3) for seed in range(12)]


@pytest.mark.parametrize("prompt", [texts(2, 1)[0], "w1 w2 never seen", "nothing of it", ""])
def test_evidence_for_few_is_that_of_the_lexicon_of_all(prompt):
    read = read_wordings(POOL)
    frequencies = Frequencies.of(read, sum(map(len, POOL)))
    few = [7, 2, 3]
    sizes = np.array([len(POOL[row]) for row in few])
    found = evidence(*frequencies.asked([prompt]), read.chosen(few), sizes)
    np.testing.assert_allclose(found, Lexicon.of(POOL).scores(ngram_keys(prompt))[few])


def test_a_table_that_is_too_small_keeps_the_most_frequent(monkeypatch):
    monkeypatch.setattr(wordings, "TABLE_SIZE", 5)
    read = [read_wordings([group]) for group in POOL]
    whole = {}
    for wording in read:
        for key, count in zip(wording.keys.tolist(), wording.counts.tolist(), strict=True):
            whole[key] = whole.get(key, 0) + count
    frequencies = Frequencies.of(Wordings.joined(read), 30)
    assert len(frequencies.keys) == 5
    assert sorted(frequencies.counts.tolist()) == sorted(sorted(whole.values())[-5:])
    shares, known = frequencies.shares(np.array([*frequencies.keys.tolist(), 1], dtype=np.uint32))
    assert known.tolist() == [True] * 5 + [False]
    assert shares[-1] == 1 / 30


def test_keys_of_the_same_leading_bits_are_told_apart():
    keys = np.array([5, 6, 7, 1 << 20, (1 << 32) - 1], dtype=np.uint32)
    frequencies = Frequencies(keys, np.array([2, 3, 4, 5, 6], dtype=np.float32), 10)
    shares, known = frequencies.shares(np.array([6, 8, 1 << 20, 1 << 30, (1 << 32) - 1], dtype=np.uint32))
    np.testing.assert_allclose(shares, [0.3, 0.1, 0.5, 0.1, 0.6])
    assert known.tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("mapped", [0, 1 << 20], ids=["piece by piece", "mapped"])
def test_wordings_come_back_from_their_file(tmp_path, monkeypatch, mapped):
    monkeypatch.setattr(rows, "_MAPPED_BYTES", mapped)
    read = [read_wordings([group]) for group in POOL]
    every = Wordings.joined(read)
    for together, alone in zip(read_wordings(POOL), every, strict=True):
        np.testing.assert_array_equal(together, alone)
    (tmp_path / "words").write_bytes(every.keys.tobytes())
    (tmp_path / "counts").write_bytes(every.counts.tobytes())
    starts = np.concatenate([[0], np.cumsum(every.lengths)])
    file = WordingFile(StoredFile(tmp_path / "words"), StoredFile(tmp_path / "counts"), starts)
    for found, expected in zip(file.take(np.array([5, 0, 11])), every.chosen([5, 0, 11]), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_counts_are_of_examples_and_stop_at_what_a_byte_holds():
    wording = read_wordings([["same"] * 300 + ["other"]])
    assert set(wording.counts.tolist()) == {1, 255}
