"""Does fine-tuning the encoder on the adapters' examples find more prompts? LoraRetriever's 0, 40 and 100 % settings.

    python benchmarks/retriever_finetuning.py FLAN48 TASKS POOL --work DIR \\
        -o benchmarks/results/retriever_finetuning.json
    python benchmarks/retriever_report.py

FLAN48 holds profiles.jsonl and dev.jsonl, TASKS one <task>.train.jsonl and <task>.test.jsonl a task, and POOL the
adapters of these tasks, whose cards have the examples.

First the choice, on profiles alone: a fourth of each profile is held out, encoders are trained on the rest by each
recipe, and the held-out examples are searched among the rest. The recipe under which the hybrid gives their own
adapters the best likelihood is taken. Then the measurement. Encoders and embeddings are kept in DIR: a stopped run goes
on, and deleting DIR reruns everything.

What an index fits by holding out examples one by one, it fits here as well: on examples that the encoder has seen. So
there is one more scoring, whose shrinkage, temperatures and weights are those of the examples that were held out for
the choice, and from training too.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import loracompose
from loracompose.benchmarks.crossed import fitted_on, without_fourths
from loracompose.benchmarks.kept import KeptEmbedder
from loracompose.benchmarks.retrieval import PAPER, calibration_error, gains, hits, own_ranks, reliability
from loracompose.benchmarks.retrieval_data import RetrievalData, read_arguments, read_retrieval_data, with_profiles
from loracompose.benchmarks.retrieval_scorings import Floats, embed, read_pool, score, split
from loracompose.cli.retrieval_tables import rounded
from loracompose.durable import write_whole
from loracompose.locating import DEFAULT_ENCODER
from loracompose.retrieval.embedding import INSTRUCTION, SentenceTransformerEmbedder
from loracompose.retrieval.encoder_recipe import EncoderRecipe
from loracompose.retrieval.finetuning import train_retriever
from loracompose.retrieval.fitting import fitted_hybrid
from loracompose.retrieval.profiles import read_profiles
from loracompose.retrieval.tables import Settings
from loracompose.retrieval.weighting import log_softmax

SEEN = 5
"""Of the tasks' prompts of seen phrasings every fifth is searched: nearly all of them are found by any encoder."""

REDUCED = (
    "texts are cut after 64 tokens in training, and the upper three of six layers are trained; two recipes were tried; "
    "of the tasks' prompts of seen phrasings every fifth is searched"
)
"""What a machine without an accelerator has no time for."""

RECIPES = {
    "one epoch": EncoderRecipe(epochs=1),
    "three epochs": EncoderRecipe(epochs=3),
}
SCORINGS = {
    "mean, as in the paper's code": "mean, as in the paper's code",
    "mean": "mean",
    "discriminant": "meaning",
    "hybrid": "hybrid",
}
"""Scorings of an index, and the paper's own, by what `score` calls them."""

CROSSED = "hybrid, fitted on held-out examples"


@dataclass(frozen=True, eq=False)
class Embedded:
    """A setting under one encoder: features of its examples and of its prompts, and what every scoring finds."""

    data: RetrievalData
    examples: np.ndarray
    prompts: np.ndarray
    fits: Mapping[str, Floats]
    chosen: Mapping[str, Any]


@dataclass(frozen=True)
class Held:
    """Examples held out of profiles, and encoders that have not seen them, by the share of adapters trained on."""

    data: RetrievalData
    encoders: Mapping[float, str]


def look(data: RetrievalData, encoder: str, work: Path, held: Embedded | None = None) -> Embedded:
    """Embed a setting and score its prompts; `held` are held-out examples under the same kind of encoder."""
    embedder = KeptEmbedder(SentenceTransformerEmbedder(encoder, batch_size=16), work / "embeddings")
    settings = Settings(embedder.name, embedder.revision, embedder.dimension, INSTRUCTION)
    flat = [text for group in data.profiles.values() for text in group]
    made = embed([*flat, *data.prompts], settings, embedder)
    examples, prompts = made[: len(flat)], made[len(flat) :]
    scorings = score(data, examples, prompts)
    fits = {name: scorings.fits[theirs] for name, theirs in SCORINGS.items()}
    chosen = {key: value for key, value in asdict(scorings.fitted).items() if key != "calibration"}
    if held is not None:
        pool = read_pool(list(data.profiles.values()), split(data, examples))
        other = fitted_on(scorings.fitted, held.data, held.examples, held.prompts)
        fits[CROSSED] = fitted_hybrid(pool.spectra, pool.lexicon, pool.forms, other).fits(prompts, data.prompts)
    return Embedded(data, examples, prompts, fits, chosen)


def summary(found: Embedded, before: Embedded) -> dict[str, Any]:
    """Hits of each scoring, gains against the untouched encoder, likelihood and calibration."""
    result: dict[str, Any] = {}
    for name, fits in found.fits.items():
        result[name] = {}
        for part, here in found.data.parts.items():
            own, scores = found.data.own[here], fits[here]
            old = before.fits[name][here]
            logs = log_softmax(scores)
            result[name][part] = {
                "hit": hits(scores, own),
                "gain": gains(own_ranks(scores, own), own_ranks(old, own)),
                "nll": -float(logs[np.arange(len(own)), own].mean()),
                "calibration_error": calibration_error(reliability(logs, own)),
            }
    return result


def thinned(data: RetrievalData) -> RetrievalData:
    """All prompts of unseen phrasings, and every `SEEN`-th of the others."""
    kept = data.unseen | (np.cumsum(~data.unseen) % SEEN == 0)
    prompts = tuple(prompt for prompt, keep in zip(data.prompts, kept, strict=True) if keep)
    return RetrievalData(data.profiles, prompts, data.own[kept], data.unseen[kept])


def trained(name: str, data: RetrievalData, recipe: EncoderRecipe, share: float, work: Path) -> tuple[str, dict]:
    """The encoder trained on a setting's examples, and its record."""
    folder = work / "encoders" / f"{name}-{round(100 * share)}"
    clock = folder.with_suffix(".cpu")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        train_retriever(dict(data.profiles), folder, share=share, recipe=recipe, device="cpu", progress=False)
        clock.write_text(f"{time.process_time() - start:.1f}")
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    losses = record["losses"]
    cpu = {"cpu_seconds": float(clock.read_text())} if clock.is_file() else {}
    return str(folder), {key: record[key] for key in ("share", "examples", "steps")} | cpu | {
        "adapters": len(record["adapters"]),
        "first_losses": losses[:5],
        "last_losses": losses[-5:],
    }


class Run:
    """The result so far; the file is written anew with every encoder that is measured, and read again at the start."""

    def __init__(self, output: Path, about: dict[str, Any]) -> None:
        self.output = output
        self.result = json.loads(json.dumps(rounded(about)))
        if output.is_file():
            before = json.loads(output.read_text(encoding="utf-8"))
            if any(before.get(key) != value for key, value in self.result.items()):
                raise ValueError(f"{output} was measured with other rows, recipes or versions: delete it to begin anew")
            self.result = before

    def has(self, table: str, label: str) -> bool:
        """Whether this was measured before."""
        return label in self.result.get(table, {})

    def note(self, table: str, label: str, training: dict, found: Embedded, before: Embedded) -> None:
        """Add what was found under one encoder."""
        entry = {"training": training, "fitted": found.chosen, "scorings": summary(found, before)}
        self.result.setdefault(table, {})[label] = entry
        self.write()
        for scoring, parts in entry["scorings"].items():
            for part, of in parts.items():
                shares = "/".join(f"{hit['share']:.1f}" for hit in of["hit"].values())
                gain = "{points:+.1f} [{low:+.1f}, {high:+.1f}]".format(**of["gain"]["1"])
                print(f"{table} {label:13}{scoring:37}{part:8}{shares}  @1 {gain}  NLL {of['nll']:.3f}", flush=True)

    def write(self) -> None:
        """Write the file, whole or not at all."""
        write_whole(self.output, json.dumps(rounded(self.result), indent=1) + "\n")


def choose(run: Run, data: RetrievalData, work: Path) -> tuple[str, str]:
    """The best recipe's name, and the encoder it trains on the examples that are not held out."""
    encoders = {
        label: trained(f"choice-{label.replace(' ', '-')}", data, RECIPES[label], 1.0, work) for label in RECIPES
    }
    missing = [label for label in RECIPES if not run.has("choice", label)]
    if missing:
        untouched = look(data, DEFAULT_ENCODER, work)
        run.note("choice", "untouched", {}, untouched, untouched)
        for label in missing:
            encoder, record = encoders[label]
            run.note("choice", label, record, look(data, encoder, work), untouched)
    best = min(RECIPES, key=lambda label: run.result["choice"][label]["scorings"]["hybrid"]["all"]["nll"])
    run.result["chosen"] = best
    return best, encoders[best][0]


def measure(
    run: Run,
    table: str,
    data: RetrievalData,
    recipe: EncoderRecipe,
    shares: Sequence[float],
    held: Held | None,
    work: Path,
) -> None:
    """Train on each share of the adapters and search all prompts; what was measured before is not measured again."""
    missing = [share for share in shares if not run.has(table, f"{100 * share:.0f}")]
    if not missing:
        return
    crossed = {share: look(held.data, encoder, work) for share, encoder in held.encoders.items()} if held else {}
    before = look(data, DEFAULT_ENCODER, work, crossed.get(0.0))
    for share in missing:
        encoder, record = trained(table, data, recipe, share, work) if share else (DEFAULT_ENCODER, {})
        found = look(data, encoder, work, crossed.get(share)) if share else before
        run.note(table, f"{100 * share:.0f}", record, found, before)


def main() -> None:
    args = read_arguments(__doc__)

    flan48 = read_retrieval_data(args.flan48)
    tasks = thinned(with_profiles(read_retrieval_data(args.tasks), read_profiles(args.pool)))
    about = {
        "encoder": DEFAULT_ENCODER,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"loracompose": loracompose.__version__, "torch": version("torch")},
        "recipes": {label: asdict(recipe) for label, recipe in RECIPES.items()},
        "rows": {"flan48": len(flan48.prompts), "tasks": {n: int(p.sum()) for n, p in tasks.parts.items()}},
        "reduced": REDUCED,
        "paper": PAPER,
    }
    run = Run(args.output, about)
    held_out = without_fourths(flan48)
    best, encoder = choose(run, held_out, args.work)
    held = Held(held_out, {0.0: DEFAULT_ENCODER, 1.0: encoder})
    measure(run, "flan48", flan48, RECIPES[best], (0.0, 1.0), held, args.work)
    measure(run, "tasks", tasks, RECIPES[best], (0.0, 1.0), None, args.work)
    measure(run, "flan48", flan48, RECIPES[best], (0.4,), held, args.work)


if __name__ == "__main__":
    main()
