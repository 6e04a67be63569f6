"""KeptEmbedder: nothing is embedded twice, not by a later process either, and no encoder gets another's vectors."""

from __future__ import annotations

import numpy as np
import pytest

from loracompose.benchmarks.kept import BATCH, KeptEmbedder
from loracompose.retrieval.embedding import CallableEmbedder
from tests.retrieval.material import bag_of_words


class Counting:
    def __init__(self, stop_after=None):
        self.texts = []
        self.stop_after = stop_after

    def __call__(self, texts):
        if self.stop_after is not None and len(self.texts) >= self.stop_after:
            raise InterruptedError
        self.texts += texts
        return bag_of_words(texts)


def kept(folder, function, revision="1"):
    return KeptEmbedder(CallableEmbedder(function, "words", revision), folder)


def test_texts_are_embedded_once_and_come_back_in_the_order_asked(tmp_path):
    counting, texts = Counting(), ["a longer text", "short", "a longer text"]
    first = kept(tmp_path, counting)
    assert np.array_equal(first(texts), bag_of_words(texts))
    assert counting.texts == ["short", "a longer text"]
    again = kept(tmp_path, counting)
    assert np.array_equal(again(["short", "a longer text"]), bag_of_words(["short", "a longer text"]))
    assert (len(counting.texts), again.made) == (2, 0)


def test_what_was_embedded_before_an_interruption_is_not_embedded_again(tmp_path):
    texts = [f"text {number}" for number in range(BATCH + 10)]
    with pytest.raises(InterruptedError):
        kept(tmp_path, Counting(stop_after=BATCH))(texts)
    counting = Counting()
    assert np.array_equal(kept(tmp_path, counting)(texts), bag_of_words(texts))
    assert len(counting.texts) == 10


def test_vectors_of_another_revision_are_not_taken(tmp_path):
    kept(tmp_path, lambda texts: 2 * bag_of_words(texts))(["text"])
    assert np.array_equal(kept(tmp_path, bag_of_words, revision="2")(["text"]), bag_of_words(["text"]))
