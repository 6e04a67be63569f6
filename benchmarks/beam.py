"""Does BeamLoRA beat LoRA at equal rank? Dev loss and greedy exact match, paired by task and seed.

    python benchmarks/beam.py TASKS -o benchmarks/results/beam.json --seeds 0 1 2 --dtype bfloat16

TASKS holds `<task>.{train,dev,test}.jsonl` with "prompt" and "response". The methods of a pair share the recipe, the
first factors and the order of the data; "scores" is BeamLoRA without pruning. What is exported is what is measured:
exact match comes from the written folder, loaded by the engine. A run that is already in the output file is not run
again, and a file whose runs had another recipe is refused. With --summary the file is only read.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loracompose import Engine, __version__
from loracompose.durable import write_whole
from loracompose.training.adapter import TrainingReport, train_adapter
from loracompose.training.beam_settings import BeamSettings
from loracompose.training.recipe import Recipe

METHODS: Mapping[str, BeamSettings | None] = {
    "lora": None,
    "scores": BeamSettings(threshold=1.0),
    "beam": BeamSettings(),
}
DRAWS = 5_000


def normal(text: str) -> str:
    """Lower case, without full stops and outer white space."""
    return text.lower().replace(".", "").strip()


def exact_match(engine: Engine, folder: Path, rows: list[dict[str, str]]) -> str:
    """One digit a row, 1 for a right answer."""
    prompts = [row["prompt"] for row in rows]
    answers = engine.generate(prompts, adapters=[[str(folder)]] * len(rows), max_new_tokens=12, batch_size=25)
    return "".join(str(int(normal(a.text) == normal(row["response"]))) for a, row in zip(answers, rows, strict=True))


def events(report: TrainingReport) -> list[dict[str, Any]]:
    """What every event did, with the number of pruned ranks by module instead of the pairs."""
    told = []
    for event in report.events:
        facts = asdict(event)
        replaced = facts.pop("replaced")
        told.append(facts | {"pruned": event.pruned, "by_module": {name: len(p) for name, p in replaced.items()}})
    return told


def run(engine: Engine, tasks: Path, task: str, seed: int, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train, write and measure one adapter."""
    recipe = Recipe(
        rank=options.rank,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=seed,
        dtype=options.dtype,
        beam=METHODS[method],
    )
    rows = [json.loads(line) for line in (tasks / f"{task}.test.jsonl").read_text(encoding="utf-8").splitlines()]
    cpu = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / f"{task}-{method}"
        report = train_adapter(
            tasks / f"{task}.train.jsonl",
            folder,
            recipe=recipe,
            dev=tasks / f"{task}.dev.jsonl",
            device="cpu",
            progress=False,
        )
        trained = time.process_time()
        hits = exact_match(engine, folder, rows)
    return {
        "task": task,
        "seed": seed,
        "method": method,
        "recipe": asdict(recipe),
        "dev_loss": report.dev_loss,
        "last_losses": [round(loss, 4) for loss in report.losses[-5:]],
        "exact_match": round(100 * hits.count("1") / len(hits), 1),
        "hits": hits,
        "seconds": round(report.seconds, 1),
        "cpu_seconds": {"training": round(trained - cpu, 1), "test": round(time.process_time() - trained, 1)},
        "events": events(report),
    }


def interval(draws: np.ndarray) -> list[float]:
    """Bounds of 95 % of the draws."""
    return [round(float(bound), 4) for bound in np.quantile(draws, (0.025, 0.975))]


def compare(results: list[dict[str, Any]], method: str, other: str = "lora") -> dict[str, Any]:
    """The differences `method` - `other` over the pairs that both have, with 95 % bootstrap intervals.

    Trainings of one task are alike, so tasks are drawn first, then seeds within each and, for exact match, prompts,
    which all seeds of a task share. Means are over tasks. With three tasks the intervals are rough, and say little of
    a fourth.
    """
    found = {(row["task"], row["seed"], row["method"]): row for row in results}
    pairs: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for task, seed in dict.fromkeys((row["task"], row["seed"]) for row in results):
        if (task, seed, method) in found and (task, seed, other) in found:
            pairs.setdefault(task, []).append((found[task, seed, method], found[task, seed, other]))
    if not pairs:
        return {"pairs": 0}
    random = np.random.default_rng(0)
    losses = [np.array([[a["dev_loss"] - b["dev_loss"]] for a, b in own]) for own in pairs.values()]
    hits = [np.array([matches(a, b) for a, b in own]) for own in pairs.values()]
    return {
        "pairs": sum(map(len, losses)),
        "dev_loss": round(mean_over_tasks(losses), 4),
        "dev_loss_95": interval(nested(losses, random)),
        "dev_loss_lower_in": sum(int((own < 0).sum()) for own in losses),
        "exact_match": round(100 * mean_over_tasks(hits), 2),
        "exact_match_95": interval(100 * nested(hits, random)),
        "exact_match_higher_in": sum(int((own.mean(axis=1) > 0).sum()) for own in hits),
    }


def matches(method: Mapping[str, Any], other: Mapping[str, Any]) -> list[int]:
    """Prompt by prompt, 1 where only `method` is right, -1 where only `other` is."""
    return [int(x) - int(y) for x, y in zip(method["hits"], other["hits"], strict=True)]


def mean_over_tasks(values: list[np.ndarray]) -> float:
    """The mean of the means of tasks."""
    return float(np.mean([own.mean() for own in values]))


def nested(values: list[np.ndarray], random: np.random.Generator) -> np.ndarray:
    """Means over tasks, drawn with what is in them, (DRAWS,).

    Args:
        values: of each task, (pairs, values of a pair).
        random: draws.
    """
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        chosen = []
        for place in random.integers(0, len(values), len(values)):
            own = values[place]
            seeds = random.integers(0, len(own), len(own))
            prompts = random.integers(0, own.shape[1], own.shape[1])  # of one value, always itself
            chosen.append(own[np.ix_(seeds, prompts)].mean())
        means[draw] = np.mean(chosen)
    return means


def made_otherwise(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """What runs in a file were made with, where that is not what is asked for now; "" where all is the same."""
    for row in results:
        for name in ("rank", "steps", "batch_size", "dtype"):
            if row["recipe"][name] != getattr(options, name):
                run = f"{row['task']}, seed {row['seed']}, {row['method']}"
                return f"{run} was made with {name} {row['recipe'][name]!r}, asked for is {getattr(options, name)!r}"
    return ""


def write(output: Path, results: list[dict[str, Any]]) -> None:
    """The runs, the comparison and what they ran on."""
    about = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "loracompose": __version__,
        **{package: version(package) for package in ("torch", "transformers", "peft")},
        "base": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "dtype": sorted({row["recipe"]["dtype"] for row in results}),
    }
    methods = [name for name in METHODS if name != "lora"]
    compared = {f"{name} - lora": compare(results, name) for name in methods}
    write_whole(output, json.dumps({"about": about, "compared": compared, "results": results}, indent=1) + "\n")


def main() -> None:
    """Run what is missing, pair by pair, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["trec", "clinc_domain", "banking77"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["lora", "beam"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="auto", help="of the frozen base")
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    results = json.loads(options.output.read_text())["results"] if options.output.is_file() else []
    if not options.summary and (other := made_otherwise(results, options)):
        parser.error(f"{options.output}: {other}; ask for the same, or choose another file")
    done = {(row["task"], row["seed"], row["method"]) for row in results}
    missing = [
        key for key in product(options.seeds, options.tasks, options.methods) if (key[1], key[0], key[2]) not in done
    ]
    if missing and not options.summary:
        engine = Engine.from_pretrained(device="cpu", dtype=options.dtype)
        for seed, task, method in missing:
            results.append(run(engine, options.data, task, seed, method, options))
            write(options.output, results)
            row = results[-1]
            print(
                f"{task} {seed} {method}: dev {row['dev_loss']:.4f}, {row['exact_match']} %, {row['seconds']} s",
                flush=True,
            )
    for name in options.methods:
        print(name, json.dumps(compare(results, name)))


if __name__ == "__main__":
    main()
