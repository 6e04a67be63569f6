"""How often is the right adapter among the first k? Every channel, their sum, and plainer baselines.

    python benchmarks/retrieval.py profiles.jsonl dev.jsonl -o benchmarks/results/retrieval_flan48.json
    python benchmarks/retrieval.py POOL TASKS --unseen-template 5 -o benchmarks/results/retrieval_tasks.json

The examples are a JSONL file with "adapter" and "prompt", or a folder of adapters with card.json. The rows are JSONL
files with "adapter" or "task", "prompt" and perhaps "template"; of a folder, its *.test.jsonl. Everything is chosen on
the examples. With --embeddings FILE, embeddings are kept there and not made twice.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loracompose import __version__
from loracompose.retrieval.discriminant import Discriminant, Spectrum, Statistics
from loracompose.retrieval.embedding import (
    INSTRUCTION,
    SentenceTransformerEmbedder,
    features,
    instructed,
    representation,
)
from loracompose.retrieval.fitting import fit
from loracompose.retrieval.hybrid import Hybrid
from loracompose.retrieval.lexicon import Lexicon, ngram_keys, tokens
from loracompose.retrieval.tables import Settings
from loracompose.retrieval.weighting import log_softmax

KS = (1, 3, 5, 8)
ALPHAS = (0.01, 0.05, 0.1, 0.2)
RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    adapter: str
    prompt: str
    template: int | None


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_examples(path: Path) -> dict[str, list[str]]:
    if path.is_dir():
        return {card.parent.name: json.loads(card.read_text())["examples"] for card in sorted(path.glob("*/card.json"))}
    found: dict[str, list[str]] = {}
    for line in read_lines(path):
        found.setdefault(line["adapter"], []).append(line["prompt"])
    return found


def read_rows(path: Path, names: list[str]) -> list[Row]:
    files = sorted(path.glob("*.test.jsonl")) if path.is_dir() else [path]
    rows = [
        Row(line.get("adapter", line.get("task")), line["prompt"], line.get("template"))
        for file in files
        for line in read_lines(file)
    ]
    unknown = {row.adapter for row in rows} - set(names)
    if unknown or not rows:
        raise SystemExit(f"{path}: {len(rows)} rows; no examples for {sorted(unknown)}")
    return rows


def embed(texts: list[str], settings: Settings, embedder: SentenceTransformerEmbedder, kept: Path | None) -> np.ndarray:
    """Features of the texts; those in the file are not made again."""
    known: dict[str, np.ndarray] = {}
    if kept is not None and kept.is_file():
        with np.load(kept) as stored:
            if str(stored["revision"]) == settings.revision:
                known = dict(zip(stored["texts"].tolist(), stored["features"], strict=True))
    missing = sorted({text for text in texts if text not in known}, key=len)  # alike in length: less padding
    if missing:
        known.update(zip(missing, features(embedder, missing, settings), strict=True))
    if kept is not None and missing:
        np.savez(kept, revision=settings.revision, texts=np.array(list(known)), features=np.stack(list(known.values())))
    return np.stack([known[text] for text in texts])


def bm25(examples: list[list[str]], prompts: list[str], k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Okapi BM25 of lower-cased words, an adapter's examples together being one document, (prompts, N)."""
    documents = [Counter(tokens(" ".join(group).lower())) for group in examples]
    lengths = np.array([sum(document.values()) for document in documents])
    frequency = Counter(word for document in documents for word in document)
    scores = np.zeros((len(prompts), len(documents)))
    for i, prompt in enumerate(prompts):
        for word in set(tokens(prompt.lower())) & set(frequency):
            counts = np.array([document[word] for document in documents])
            idf = np.log(1 + (len(documents) - frequency[word] + 0.5) / (frequency[word] + 0.5))
            scores[i] += idf * counts * (k1 + 1) / (counts + k1 * (1 - b + b * lengths / lengths.mean()))
    return scores


def hits(scores: np.ndarray, own: np.ndarray) -> dict[str, dict[str, float]]:
    """Share of rows with their own adapter among the first k, with a 95 % bootstrap interval, in per cent."""
    ranks = (scores > scores[np.arange(len(own)), own][:, None]).sum(axis=1)
    picked = np.random.default_rng(0).integers(0, len(own), size=(RESAMPLES, len(own)))
    result = {}
    for k in KS:
        hit = ranks < k
        low, high = np.percentile(hit[picked].mean(axis=1), [2.5, 97.5])
        result[str(k)] = {"share": 100 * hit.mean(), "low": 100 * low, "high": 100 * high}
    return result


def calibration_error(logs: np.ndarray, own: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of the best adapter's probability: mean gap to its hit rate, by equal-width bins."""
    sure, right = np.exp(logs.max(axis=1)), logs.argmax(axis=1) == own
    place = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = [abs(sure[place == i].mean() - right[place == i].mean()) * (place == i).mean() for i in set(place.tolist())]
    return float(sum(gaps))


def abstention(fits: np.ndarray, known: np.ndarray, own: np.ndarray) -> dict[str, dict[str, float]]:
    """For each alpha the share of rows abstained from, and the hit rate at 1 of the others, in per cent."""
    p = (1 + np.searchsorted(known, fits.max(axis=1), side="right")) / (1 + len(known))
    right = fits.argmax(axis=1) == own
    result = {}
    for alpha in ALPHAS:
        kept = p > alpha
        hit = 100 * right[kept].mean() if kept.any() else 0.0
        result[str(alpha)] = {"abstained": 100 * (1 - kept.mean()), "hit": hit}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--unseen-template", type=int)
    parser.add_argument("--embeddings", type=Path)
    args = parser.parse_args()

    examples = read_examples(args.examples)
    names = list(examples)
    rows = read_rows(args.rows, names)
    prompts = [row.prompt for row in rows]
    own = np.array([names.index(row.adapter) for row in rows])
    embedder = SentenceTransformerEmbedder()
    settings = Settings(embedder.name, embedder.revision, embedder.dimension, INSTRUCTION)
    flat = [text for group in examples.values() for text in group]
    made = embed(flat + prompts, settings, embedder, args.embeddings)
    groups = np.split(made[: len(flat)], np.cumsum([len(group) for group in examples.values()])[:-1])
    queries = made[len(flat) :]

    start = time.perf_counter()
    spectrum = Spectrum.of(Statistics.of(groups, settings.width))
    lexicon = Lexicon.of(examples.values())
    means = np.stack([representation(group, name) for name, group in zip(names, groups, strict=True)])
    chosen = fit(means, groups, spectrum, lexicon)
    discriminant = Discriminant.of(spectrum, chosen.shrinkage, chosen.spread)
    hybrid = Hybrid(discriminant, lexicon, (chosen.meaning, chosen.wording))
    seconds = time.perf_counter() - start

    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        log_softmax(hybrid.fits(queries[i : i + 1], [prompt]))
    milliseconds = 1000 * (time.perf_counter() - start) / len(prompts)

    cosines = (instructed(queries) @ means.T).astype(np.float64)
    fits = {
        "random": np.random.default_rng(0).random((len(rows), len(names))),
        "bm25": bm25(list(examples.values()), prompts),
        "mean": cosines / chosen.mean_temperature,
        "wording": chosen.wording * np.stack([lexicon.scores(ngram_keys(prompt)) for prompt in prompts]),
        "discriminant": discriminant.fits(queries),
        "hybrid": hybrid.fits(queries, prompts),
    }
    known = {name: np.array(values) for name, values in chosen.calibration.items()}
    known["mean"] = known["mean"] / chosen.mean_temperature
    unseen = np.array([row.template is not None and row.template == args.unseen_template for row in rows])
    parts = {"all": np.ones(len(rows), dtype=bool)}
    if unseen.any():
        parts |= {"seen": ~unseen, "unseen": unseen}
    result = {
        "loracompose": __version__,
        "encoder": settings.encoder,
        "machine": platform.processor() or platform.machine(),
        "adapters": len(names),
        "examples": len(flat),
        "rows": {name: int(part.sum()) for name, part in parts.items()},
        "chosen": {key: value for key, value in vars(chosen).items() if key != "calibration"},
        "fit_seconds": seconds,
        "query_ms_beyond_encoder": milliseconds,
        "scorings": {
            scoring: {
                name: {
                    "hit": hits(scores[part], own[part]),
                    "calibration_error": calibration_error(log_softmax(scores[part]), own[part]),
                    **({"abstention": abstention(scores[part], known[scoring], own[part])} if scoring in known else {}),
                }
                for name, part in parts.items()
            }
            for scoring, scores in fits.items()
        },
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rounded(result), indent=1) + "\n")
    show(result)


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(float(value), 4) if isinstance(value, float) else value


def show(result: dict) -> None:
    print(f"{result['adapters']} adapters, {result['examples']} examples, rows {result['rows']}")
    print(f"fit {result['fit_seconds']:.2f} s, query beyond the encoder {result['query_ms_beyond_encoder']:.2f} ms")
    print(f"{'scoring':14}{'rows':8}" + "".join(f"{'hit@' + str(k):>22}" for k in KS) + f"{'ECE':>8}")
    for scoring, parts in result["scorings"].items():
        for name, part in parts.items():
            cells = [f"{h['share']:6.1f} [{h['low']:5.1f}, {h['high']:5.1f}]" for h in part["hit"].values()]
            print(
                f"{scoring:14}{name:8}" + "".join(f"{cell:>22}" for cell in cells) + f"{part['calibration_error']:8.3f}"
            )
    for name, part in result["scorings"]["hybrid"].items():
        shown = [f"{a}: {r['abstained']:.1f} % abstained, {r['hit']:.1f} % hit" for a, r in part["abstention"].items()]
        print(f"abstention, {name}: " + "; ".join(shown))


if __name__ == "__main__":
    main()
