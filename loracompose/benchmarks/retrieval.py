"""How often is the right adapter among the first k? Every channel, their sums, and plainer baselines.

Everything is chosen on the profiles; the rows are only asked.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import loracompose
from loracompose.benchmarks.retrieval_data import RetrievalData
from loracompose.benchmarks.retrieval_scorings import Scorings, embed, score
from loracompose.retrieval.embedding import INSTRUCTION, Embedder, as_embedder
from loracompose.retrieval.tables import Settings
from loracompose.retrieval.weighting import log_softmax

KS = (1, 3, 5, 8)
ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
BINS = 15
RESAMPLES = 2000

PAPER: Mapping[str, tuple[float, ...]] = {
    "LoraRetriever, all-MiniLM-L6-v2, mean": (51.73, 73.11, 80.54, 87.18),
    "LoraRetriever, instructor-xl, untrained": (60.80, 79.29, 85.57, 91.58),
    "LoraRetriever, instructor-xl, trained on 40 % of the tasks": (63.16, 89.09, 95.45, 98.97),
    "LoraRetriever, instructor-xl, trained on all tasks": (74.08, 97.37, 99.15, 99.82),
}
"""Table 2 of arXiv:2402.09997, on all rows of its 48 tasks."""

Floats = NDArray[np.float64]


def measure(data: RetrievalData, embedder: Embedder | str | None = None, *, paper: bool = False) -> dict[str, Any]:
    """Measure retrieval with an encoder; the result is plain JSON.

    Args:
        data: profiles and prompts.
        embedder: the encoder; None is the default.
        paper: whether the rows are those of the paper, whose numbers are then set beside.
    """
    encoder = as_embedder(embedder)
    settings = Settings(encoder.name, encoder.revision, encoder.dimension, INSTRUCTION)
    flat = [text for group in data.profiles.values() for text in group]
    made = embed([*flat, *data.prompts], settings, encoder)
    scorings = score(data, made[: len(flat)], made[len(flat) :])
    return {
        "encoder": {"name": encoder.name, "revision": encoder.revision},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": os.cpu_count()},
        "versions": {"loracompose": loracompose.__version__, "numpy": version("numpy")},
        "adapters": len(data.profiles),
        "examples": len(flat),
        "rows": {name: int(part.sum()) for name, part in data.parts.items()},
        "chosen": {key: value for key, value in asdict(scorings.fitted).items() if key != "calibration"},
        "fit_seconds": scorings.fit_seconds,
        "query_ms_beyond_encoder": scorings.query_ms,
        "scorings": {name: _parts(name, data, scorings) for name in scorings.fits},
        "paper": {name: dict(zip(map(str, KS), row, strict=True)) for name, row in PAPER.items()} if paper else {},
    }


def hits(scores: Floats, own: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Share of rows with their own adapter among the first k, with a 95 % bootstrap interval over rows, in per cent."""
    ranks = own_ranks(scores, own)
    return {str(k): dict(zip(("share", "low", "high"), _interval(ranks < k), strict=True)) for k in KS}


def gains(after: NDArray[np.int64], before: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """What a share of hits gains from one way to rank the same rows to another, in points, with a paired interval.

    Args:
        after: rank of the own adapter of each row, (rows,), as `own_ranks` gives it.
        before: the same of what it is compared with.
    """
    changes = {str(k): (after < k).astype(np.int64) - (before < k) for k in KS}
    return {k: dict(zip(("points", "low", "high"), _interval(change), strict=True)) for k, change in changes.items()}


def own_ranks(scores: Floats, own: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many adapters come before a row's own, (rows,).

    Of equals the earlier comes first, as in a search: a scoring that tells nothing apart finds nothing.
    """
    mine = scores[np.arange(len(own)), own][:, None]
    earlier = np.arange(scores.shape[1]) < own[:, None]
    ranks: NDArray[np.int64] = ((scores > mine) | ((scores == mine) & earlier)).sum(axis=1)
    return ranks


def _interval(values: NDArray[Any]) -> tuple[float, float, float]:
    """The mean of values and its 95 % bootstrap interval, in per cent."""
    picked = np.random.default_rng(0).integers(0, len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[picked].mean(axis=1), [2.5, 97.5])
    return 100 * float(values.mean()), 100 * float(low), 100 * float(high)


def reliability(logs: Floats, own: NDArray[np.int64]) -> list[dict[str, float]]:
    """By equal-width bins of the best adapter's probability: its mean, the share that is right, and the rows."""
    sure, right = np.exp(logs.max(axis=1)), logs.argmax(axis=1) == own
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    return [
        {"sure": float(sure[here].mean()), "right": float(right[here].mean()), "rows": int(here.sum())}
        for here in (place == i for i in sorted(set(place.tolist())))
    ]


def calibration_error(bins: list[dict[str, float]]) -> float:
    """Expected calibration error: the mean gap between the probability of the best and its share of hits."""
    rows = sum(entry["rows"] for entry in bins)
    return sum(abs(entry["sure"] - entry["right"]) * entry["rows"] for entry in bins) / rows


def abstention(fits: Floats, known: Floats, own: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """For each alpha the share of rows sent to the base model, and the hits at 1 of the others, in per cent."""
    p = (1 + np.searchsorted(known, fits.max(axis=1), side="right")) / (1 + len(known))
    right = fits.argmax(axis=1) == own
    result = {}
    for alpha in ALPHAS:
        kept = p > alpha
        hit = 100 * float(right[kept].mean()) if kept.any() else 0.0
        result[str(alpha)] = {"abstained": 100 * float(1 - kept.mean()), "hit": hit}
    return result


def _parts(name: str, data: RetrievalData, scorings: Scorings) -> dict[str, Any]:
    fits, found = scorings.fits[name], {}
    for part, here in data.parts.items():
        own = data.own[here]
        bins = reliability(log_softmax(fits[here]), own)
        found[part] = {"hit": hits(fits[here], own), "calibration_error": calibration_error(bins)}
        if name in scorings.known:
            found[part] |= {"reliability": bins, "abstention": abstention(fits[here], scorings.known[name], own)}
    return found


def is_the_papers(folder: Path) -> bool:
    """Whether the folder holds LoraRetriever's own rows, so that the paper's numbers may stand beside."""
    return (folder / "profiles.jsonl").is_file()
