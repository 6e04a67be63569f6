"""Metrics against values worked out by hand."""

from __future__ import annotations

import sys

import pytest

from loracompose.evaluation import metrics
from loracompose.evaluation.metrics import METRICS, bleu, check_metric, chrf, exact_match, rouge_l, token_f1


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("Positive.", "positive", 100.0),
        ("  U.S. ", "us", 100.0),
        ("positive!", "positive", 0.0),
        ("", "no", 0.0),
        ("two  words", "two words", 0.0),
        ("3.5", "35", 0.0),
        ("It is 3.5.", "it is 3.5", 100.0),
        ("4.", "4", 100.0),
        ("at 5. then 6", "at 5 then 6", 100.0),
    ],
)
def test_exact_match_ignores_case_full_stops_and_outer_space_alone(answer, reference, score):
    assert exact_match(answer, reference) == score


def test_token_f1_counts_words_as_often_as_both_have_them():
    # shared: red, car; precision 2/3, recall 2/4
    assert token_f1("the red car", "red red car now") == pytest.approx(100 * 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert token_f1("red red", "red") == pytest.approx(100 * 2 * 0.5 / 1.5)
    assert token_f1("red red car", "red red") == pytest.approx(100 * 2 * (2 / 3) / (2 / 3 + 1))
    assert token_f1("", ".") == 100.0
    assert token_f1("", "red") == 0.0


def test_chrf_is_the_f2_of_mean_character_ngram_precision_and_recall():
    # one-grams: 1 of 2 in both; two-grams: 0 of 1; orders 3 to 6 do not occur. Means 1/4 and 1/4.
    assert chrf("ab", "ac") == pytest.approx(25.0)
    # one-grams: 2 of 2 said, of 3 wanted; two-grams: 1 of 1, of 2. P = 1, R = (2/3 + 1/2) / 2 = 7/12
    assert chrf(" ab\n", "abc") == pytest.approx(100 * 5 * (7 / 12) / (4 + 7 / 12))


def test_bleu_is_the_geometric_mean_of_the_precisions_times_the_brevity_penalty():
    # 5/6, 4/5, 3/4, 2/3: their product is 1/3
    assert bleu("the cat sat on the mat", "the cat sat on the rug") == pytest.approx(100 * (1 / 3) ** (1 / 4))
    # all n-grams match, length 4 of 5: exp(1 - 5/4)
    assert bleu("a b c d", "a b c d e") == pytest.approx(100 * 2.718281828 ** (1 - 5 / 4), rel=1e-6)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # a c d: precision 3/4, recall 3/5
    assert rouge_l("a b c d", "A, c d e f.") == pytest.approx(100 * 2 * 0.75 * 0.6 / (0.75 + 0.6))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_100_for_the_reference_and_0_for_nothing_of_it(name):
    reference = "the quick brown fox"
    assert METRICS[name](reference, reference) == pytest.approx(100.0)
    assert METRICS[name]("zzz", reference) == pytest.approx(0.0)


def test_an_unknown_metric_is_refused_with_those_there_are():
    with pytest.raises(LookupError, match=r"row 3: no metric 'f2'; there are accuracy, exact_match"):
        check_metric("f2", "row 3")


@pytest.mark.parametrize(("package", "metric"), [("sacrebleu", "chrf"), ("rouge_score", "rougeL")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, metric):
    monkeypatch.setitem(sys.modules, package, None)
    metrics._sacrebleu.cache_clear()
    metrics._rouge.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'loracompose\[eval\]'"):
        METRICS[metric]("a", "b")
