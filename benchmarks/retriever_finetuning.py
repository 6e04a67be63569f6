"""Does fine-tuning the encoder on the adapters' examples find more prompts? LoraRetriever's 0, 40 and 100 % settings.

    python benchmarks/retriever_finetuning.py FLAN48 TASKS POOL --work DIR -o results/retriever_finetuning.json

FLAN48 holds profiles.jsonl ("adapter", "prompt") and dev.jsonl; TASKS holds *.test.jsonl ("task", "prompt",
"template"), of which template 5 occurs in no example; POOL is the folder of adapters, with cards, of the tasks.

First the choice, on profiles alone: a fourth of each profile is held out, encoders are trained on the rest, and the
held-out examples searched in an index of the rest. Then the measurement. Encoders and embeddings are kept in DIR, so a
stopped run goes on, and deleting DIR reruns everything. All searches are those of `AdapterIndex`, whose fits see the
examples that the encoder was trained on, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from retrieval import hits, read_examples, read_rows, rounded

from loracompose import Adapter, AdapterIndex, LoraFactors, __version__, save_adapter
from loracompose.locating import DEFAULT_ENCODER
from loracompose.retrieval.embedding import INSTRUCTION, SentenceTransformerEmbedder
from loracompose.retrieval.encoder_recipe import EncoderRecipe
from loracompose.retrieval.finetuning import train_retriever

SCORINGS = ("mean", "discriminant", "hybrid")
HELD_OUT = 4
"""Every fourth example is held out for the choice."""

CANDIDATES = {
    "default": EncoderRecipe(),
}
SHARES = (0.0, 0.4, 1.0)
PAPER = {  # LoraRetriever, Table 2: instructor-xl, 1.5 B parameters
    "0.0": [60.80, 79.29, 85.57, 91.58],
    "0.4": [63.16, 89.09, 95.45, 98.97],
    "1.0": [74.08, 97.37, 99.15, 99.82],
}


@dataclass(frozen=True)
class Setting:
    """Profiles to index, and prompts to search with the adapter that each belongs to, by parts."""

    name: str
    examples: dict[str, list[str]]
    prompts: list[str]
    own: list[str]
    parts: dict[str, np.ndarray]


class Kept:
    """An embedder that keeps what it embedded in a file."""

    def __init__(self, encoder: str, folder: Path) -> None:
        self._embedder = SentenceTransformerEmbedder(encoder, batch_size=16)
        self.name, self.revision = encoder, self._embedder.revision
        self._file = folder / f"{self.revision.replace(':', '-')}.npz"
        self._known: dict[str, np.ndarray] = {}
        if self._file.is_file():
            with np.load(self._file) as stored:
                self._known = dict(zip(stored["texts"].tolist(), stored["vectors"], strict=True))

    @property
    def dimension(self) -> int:
        return len(self(["dimension"])[0])

    def learn(self, texts: list[str]) -> None:
        """Embed them together, those of like length side by side."""
        missing = sorted({text for text in texts if text not in self._known}, key=len)
        if missing:
            self._known.update(zip(missing, self._embedder(missing), strict=True))
            self._file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(self._file, texts=np.array(list(self._known)), vectors=np.stack(list(self._known.values())))

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.learn(list(texts))
        return np.stack([self._known[text] for text in texts])


def without_fourths(setting: Setting) -> Setting:
    """The examples of a setting searched in an index of the others."""
    kept = {n: [p for i, p in enumerate(g) if i % HELD_OUT != HELD_OUT - 1] for n, g in setting.examples.items()}
    out = {n: g[HELD_OUT - 1 :: HELD_OUT] for n, g in setting.examples.items()}
    prompts = [prompt for group in out.values() for prompt in group]
    own = [name for name, group in out.items() for _ in group]
    return Setting(f"{setting.name}-held-out", kept, prompts, own, {"all": np.ones(len(own), dtype=bool)})


def measure(setting: Setting, encoder: str, work: Path) -> dict:
    """Hits, likelihood and calibration of each scoring."""
    embedder = Kept(encoder, work / "embeddings")
    texts = setting.prompts + [text for group in setting.examples.values() for text in group]
    embedder.learn([*texts, *(INSTRUCTION + text for text in texts)])
    found: dict[str, dict] = {}
    with AdapterIndex.build(
        pool(setting, work), work / "indexes" / setting.name / embedder.revision[7:], embedder=embedder, overwrite=True
    ) as index:
        for scoring in SCORINGS:
            result = index.search(setting.prompts, k=len(index), scoring=scoring)
            names = [card.name for card in result.cards]
            own = np.array([names.index(name) for name in setting.own])
            scores = result.scores.numpy().astype(np.float64)
            found[scoring] = {part: summary(scores[rows], own[rows], scoring) for part, rows in setting.parts.items()}
    return found


def summary(scores: np.ndarray, own: np.ndarray, scoring: str) -> dict:
    result: dict = {"hit": hits(scores, own)}
    if scoring != "mean":  # whose scores are cosines; the others are log p(adapter | prompt)
        sure, right = np.exp(scores.max(axis=1)), scores.argmax(axis=1) == own
        place = np.minimum((sure * 15).astype(int), 14)
        gaps = [abs(sure[place == i].mean() - right[place == i].mean()) * (place == i).mean() for i in np.unique(place)]
        result |= {"calibration_error": float(sum(gaps)), "nll": float(-scores[np.arange(len(own)), own].mean())}
    return result


def pool(setting: Setting, work: Path) -> Path:
    """Adapters that do nothing, with the setting's examples on their cards."""
    folder = work / "pools" / setting.name
    if not folder.is_dir():
        aside = work / "pools" / f".{setting.name}"
        shutil.rmtree(aside, ignore_errors=True)
        zero = LoraFactors(torch.zeros(1, 1), torch.zeros(1, 1))
        for name, examples in setting.examples.items():
            save_adapter(Adapter(name, {"layer": zero}), aside / name)
            (aside / name / "card.json").write_text(json.dumps({"examples": examples}))
        aside.rename(folder)
    return folder


def trained(setting: Setting, recipe: EncoderRecipe, label: str, share: float, work: Path) -> tuple[str, dict]:
    """The encoder trained on a setting's examples, and its record."""
    folder = work / "encoders" / f"{setting.name}-{label}-{round(100 * share)}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        train_retriever(setting.examples, folder, share=share, recipe=recipe, device="cpu")
    record = json.loads((folder / "training.json").read_text())
    losses = record.get("losses", [])
    kept = ("share", "examples", "steps", "seconds", "adapters")
    return str(folder), {key: record.get(key) for key in kept} | {
        "first_losses": losses[:5],
        "last_losses": losses[-5:],
    }


def read_settings(args: argparse.Namespace) -> tuple[Setting, Setting]:
    examples = read_examples(args.flan48 / "profiles.jsonl")
    rows = read_rows(args.flan48 / "dev.jsonl", list(examples))
    everything = {"all": np.ones(len(rows), dtype=bool)}
    flan = Setting("flan48", examples, [r.prompt for r in rows], [r.adapter for r in rows], everything)
    examples = read_examples(args.pool)
    rows = read_rows(args.tasks, list(examples))
    unseen = np.array([row.template == args.unseen_template for row in rows])
    parts = {"seen": ~unseen, "unseen": unseen}
    return flan, Setting("tasks", examples, [r.prompt for r in rows], [r.adapter for r in rows], parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flan48", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--unseen-template", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()

    start, recipe = time.process_time(), EncoderRecipe()
    flan, tasks = read_settings(args)
    result: dict = {
        "loracompose": __version__,
        "encoder": DEFAULT_ENCODER,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "recipe": asdict(recipe),
        "rows": {"flan48": len(flan.prompts), **{f"tasks {n}": int(rows.sum()) for n, rows in tasks.parts.items()}},
        "paper, instructor-xl": PAPER,
        "choice": {},
        "flan48": {},
        "tasks": {},
    }

    def note(table: str, label: str, setting: Setting, encoder: str, record: dict) -> None:
        result[table][label] = {"training": record, "scorings": measure(setting, encoder, args.work)}
        result["cpu_seconds"] = time.process_time() - start
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rounded(result), indent=1) + "\n")
        show(table, label, result[table][label]["scorings"])

    held_out = without_fourths(flan)
    note("choice", "untouched", held_out, DEFAULT_ENCODER, {})
    for label, candidate in CANDIDATES.items():
        note("choice", label, held_out, *trained(held_out, candidate, label, 1.0, args.work))
    for setting in (flan, tasks):
        for share in SHARES if setting is flan else (0.0, 1.0):
            note(setting.name, str(share), setting, *trained(setting, recipe, "default", share, args.work))


def show(table: str, label: str, scorings: dict) -> None:
    for scoring, parts in scorings.items():
        for part, numbers in parts.items():
            shares = "/".join(f"{hit['share']:.1f}" for hit in numbers["hit"].values())
            rest = f"  ECE {numbers['calibration_error']:.3f}  NLL {numbers['nll']:.3f}" if "nll" in numbers else ""
            print(f"{table:8}{label:12}{scoring:14}{part:8}{shares}{rest}", flush=True)


if __name__ == "__main__":
    main()
