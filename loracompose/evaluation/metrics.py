"""How good is one answer? Each metric is a function (answer, reference) -> score in [0, 100].

chrF and BLEU are those of sacrebleu, ROUGE-L that of rouge-score, all for one sentence; install them with the extra
`eval`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

Metric = Callable[[str, str], float]

_FULL_STOP = re.compile(r"(?<!\d)\.|\.(?!\d)")


def normalise(text: str) -> str:
    """Lower case, without full stops and without white space around it; a point between digits is no full stop."""
    return _FULL_STOP.sub("", text.lower()).strip()


def exact_match(answer: str, reference: str) -> float:
    """100 if both are the same after `normalise`, else 0."""
    return 100.0 * (normalise(answer) == normalise(reference))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words of both, as multisets, after `normalise`.

    Two empty texts score 100; an empty one against words 0. Unlike SQuAD's, articles and commas stay.
    """
    said, wanted = normalise(answer).split(), normalise(reference).split()
    if not said or not wanted:
        return 100.0 * (said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 200.0 * shared / (len(said) + len(wanted))


def chrf(answer: str, reference: str) -> float:
    """chrF2 of one sentence: character n-grams up to 6, beta 2, white space left out (sacrebleu)."""
    return float(_sacrebleu("CHRF").sentence_score(answer.strip(), [reference]).score)


def bleu(answer: str, reference: str) -> float:
    """BLEU of one sentence: up to 4-grams, only orders that occur, exponential smoothing (sacrebleu)."""
    return float(_sacrebleu("BLEU").sentence_score(answer.strip(), [reference]).score)


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 without stemming; words are runs of a-z and 0-9 after lower-casing (rouge-score)."""
    return 100.0 * float(_rouge().score(reference, answer)["rougeL"].fmeasure)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "accuracy": exact_match,
        "exact_match": exact_match,
        "token_f1": token_f1,
        "chrf": chrf,
        "bleu": bleu,
        "rougeL": rouge_l,
    }
)


def check_metric(name: str, place: str) -> None:
    """Raise LookupError unless there is a metric of this name."""
    if name not in METRICS:
        raise LookupError(f"{place}: no metric {name!r}; there are {', '.join(METRICS)}")


@cache
def _sacrebleu(kind: str) -> Any:
    try:
        from sacrebleu import metrics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_missing("chrf and bleu", "sacrebleu")) from error
    return metrics.CHRF() if kind == "CHRF" else metrics.BLEU(effective_order=True)


@cache
def _rouge() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_missing("rougeL", "rouge-score")) from error
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def _missing(metrics: str, package: str) -> str:
    return f"{metrics} need the package {package}: pip install 'loracompose[eval]'"
