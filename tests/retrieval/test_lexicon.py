from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracompose.retrieval.lexicon import EXPONENT, PSEUDO_COUNT, Lexicon, ngram_keys, ngram_texts

POOL = [
    ["Translate: a dog", "Translate: a cat", "Translate: the sea\nnow"],
    ["Is it good?\nYes or no", "Is it bad?\nYes or no"],
    ["a dog, a cat", "Sum: one and two", "Sum: two and one", "sum: a cat"],
]


def runs(text):
    """N-grams written out, for a text whose tokens are split by spaces."""
    words = ["<", *text.split(" "), ">"]
    return [words[i : i + n] for n in range(1, 5) for i in range(len(words) - n + 1)]


def readable(run):
    return " ".join(word for word in run if word not in "<>")


def score(pool, text):
    """The formula, n-gram by n-gram."""
    grams = [[set(ngram_texts(example)) for example in group] for group in pool]
    everything = [example for group in grams for example in group]
    found = set(ngram_texts(text))
    totals = np.zeros(len(pool))
    for gram in found:
        p = sum(gram in example for example in everything) / max(len(everything), 1)
        if p > 0:
            for i, group in enumerate(grams):
                n = sum(gram in example for example in group)
                totals[i] += np.log((n + PSEUDO_COUNT * p) / ((len(group) + PSEUDO_COUNT) * p))
    return totals / max(len(found), 1) ** EXPONENT


def test_ngrams_are_runs_of_one_to_four_words_marks_line_breaks_and_edges_with_their_case():
    text = "Is it good?\n\nYes"
    expected = runs("Is it good ? \n\n Yes")
    assert set(ngram_texts(text).values()) == {readable(run) for run in expected}
    assert len(ngram_texts(text)) == len(expected)
    assert sorted(ngram_texts(text)) == ngram_keys(text).tolist()
    assert len(ngram_keys("a a a a a")) == len({tuple(run) for run in runs("a a a a a")})
    assert ngram_keys("Yes").tolist() != ngram_keys("yes").tolist()
    assert len(ngram_keys("  ")) == 3  # the beginning, the end, and one after the other


@pytest.mark.parametrize("text", ["Translate: a dog", "Is it a cat? Yes", "a dog, a cat", "nothing known", "", "Sum"])
def test_scores_are_the_formula_written_out(text):
    np.testing.assert_allclose(Lexicon.of(POOL).scores(ngram_keys(text)), score(POOL, text), atol=1e-9)


@given(
    st.lists(st.lists(st.text("ab ,", max_size=12), min_size=1, max_size=3), max_size=4), st.text("abc ,", max_size=9)
)
def test_scores_are_the_formula_on_any_pool(pool, text):
    np.testing.assert_allclose(Lexicon.of(pool).scores(ngram_keys(text)), score(pool, text), atol=1e-9)


def test_holding_out_equals_leaving_out_and_counting_anew():
    found = iter(Lexicon.of(POOL).held_out(range(3)))
    for row, group in enumerate(POOL):
        for i, text in enumerate(group):
            rest = [group[:i] + group[i + 1 :] if r == row else other for r, other in enumerate(POOL)]
            np.testing.assert_allclose(next(found), score(rest, text), atol=1e-9)


def test_a_prompt_of_unknown_words_is_evidence_for_nobody_and_unknown_words_weaken_the_known():
    lexicon = Lexicon.of(POOL)
    np.testing.assert_allclose(lexicon.scores(ngram_keys("xylophones play quietly")), 0, atol=1e-12)
    known, diluted = (lexicon.scores(ngram_keys(text)) for text in ("Translate", "Translate xylophones play"))
    assert 0 < diluted[0] - diluted[1] < known[0] - known[1]
    known = ["<", ">", "Translate", "< Translate"]
    assert lexicon.coverage(ngram_keys("Translate xylophones")) == pytest.approx(len(known) / 10)


def test_contributions_name_what_speaks_for_an_adapter():
    lexicon, text = Lexicon.of(POOL), "Translate: a cat"
    best = [ngram_texts(text)[key] for key, _ in lexicon.contributions(ngram_keys(text), 0)[:3]]
    assert "Translate :" in best
    gains = [gain for _, gain in lexicon.contributions(ngram_keys(text), 0)]
    assert gains == sorted(gains, reverse=True)


def test_an_adapter_of_one_example_gives_no_query():
    assert Lexicon.of([["a b"], ["c d"]]).held_out([0, 1]).shape == (0, 2)
