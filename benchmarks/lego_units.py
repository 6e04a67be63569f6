"""Which ranks should LEGO cluster, and into how many? Exact match of LEGO's settings on real adapters.

    python benchmarks/lego_units.py TASKS shared_seed=POOL own_seeds=OTHER_POOL -o benchmarks/results/lego_units.json

TASKS holds `<task>.test.jsonl` files with "prompt", "response" and "metric"; each POOL one adapter per task. Every
prompt retrieves three adapters, which are weighed equally, as in the paper: the regime in which the choice matters.
All settings answer the same prompts. A result that is already in the output file is not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from loracompose import AdapterIndex, Engine, __version__
from loracompose.composers import Composer
from loracompose.composers.fusion import Fusion
from loracompose.composers.lego import Lego
from loracompose.composers.linear import Linear
from loracompose.composers.mixture import Mixture
from loracompose.durable import write_whole

REFERENCE = "lego raw k=r"


def settings() -> dict[str, Composer]:
    """The contenders by name: LEGO's units with k, and what it reweights, one at a time."""
    made: dict[str, Composer] = {"mixture": Mixture(), "fusion": Fusion(), "linear": Linear()}
    for units in ("raw", "normalised", "canonical"):
        for k in (None, 16, 32):
            size = "r" if k is None else k
            made[f"lego {units} k={size}"] = Lego(units=units, k=k)
        made[f"lego {units} k=r unit"] = Lego(units=units, cluster_weight="unit")
    made["lego raw k=r, no parameter reweighting"] = Lego(parameter_reweighting=False)
    for k in (None, 16, 32):
        made[f"lego raw k={'r' if k is None else k}, output reweighted"] = Lego(k=k, output_reweighting=True)
    return made


def normal(text: str) -> str:
    """Lower case, without full stops and outer white space."""
    return text.lower().replace(".", "").strip()


def interval(hits: list[int], seed: int = 0) -> list[float]:
    """95 % bootstrap interval of the mean over prompts, in percent."""
    values = np.asarray(hits, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), (0.025, 0.975))
    return [round(100 * low, 1), round(100 * high, 1)]


def against(hits: str, other: str, seed: int = 0) -> str:
    """Mean difference in points with its 95 % paired bootstrap interval."""
    gap = np.asarray([int(a) - int(b) for a, b in zip(hits, other, strict=True)], dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(gap), (2000, len(gap)))
    low, high = 100 * np.quantile(gap[draws].mean(axis=1), (0.025, 0.975))
    return f"{100 * gap.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def report(measured: dict[str, Any]) -> str:
    """The results as a Markdown table, one row a setting, the pools side by side."""
    pools = list(dict.fromkeys(row["pool"] for row in measured["results"]))
    rows = {(row["pool"], row["setting"]): row for row in measured["results"]}
    heads = [f"{pool}: exact match | against {REFERENCE}" for pool in pools]
    lines = [f"| setting | {' | '.join(heads)} |", "|---" * (1 + 2 * len(pools)) + "|"]
    for setting in dict.fromkeys(row["setting"] for row in measured["results"]):
        cells = []
        for pool in pools:
            row, reference = rows[pool, setting], rows[pool, REFERENCE]
            cells += [f"{row['exact_match']:.1f}", against(row["hits"], reference["hits"])]
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def questions(tasks: Path, pool: Path, rows: int) -> list[dict[str, str]]:
    """The first rows of every accuracy task that the pool has an adapter for."""
    found = []
    for folder in sorted(p for p in pool.iterdir() if (p / "adapter_config.json").is_file()):
        lines = (tasks / f"{folder.name}.test.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        found += [row for row in map(json.loads, lines) if row["metric"] == "accuracy"]
    return found


def measure(engine: Engine, asked: list[dict[str, str]], composer: Composer | None, seconds: list[float]) -> list[int]:
    """1 for every right answer; without a composer the oracle: each prompt's own adapter."""
    prompts = [row["prompt"] for row in asked]
    if composer is None:
        sets = [[row["task"]] for row in asked]
    else:
        found = engine.retrieve(prompts, k=3)
        sets = [[match.card.name for match in found.for_prompt(i)] for i in range(len(prompts))]
    answers = engine.generate(
        prompts, adapters=sets, composer=composer or "mixture", max_new_tokens=8, batch_size=28, do_sample=False
    )
    seconds.extend({answer.timings["compose"] for answer in answers})
    return [int(normal(a.text) == normal(row["response"])) for a, row in zip(answers, asked, strict=True)]


def check_same(key: str, kept: Mapping[str, Any], prompts: int, composer: str, output: Path) -> None:
    """Refuse to put results of other prompts or settings into one table.

    Raises:
        SystemExit: what is kept was made otherwise.
    """
    if (kept["prompts"], kept["composer"]) != (prompts, composer):
        raise SystemExit(
            f"{output}: {key!r} has {kept['prompts']} prompts of {kept['composer']}, asked for are {prompts} of "
            f"{composer}; ask for the same, or choose another file"
        )


def run(engine: Engine, asked: list[dict[str, str]], pool: str, done: dict[str, dict], output: Path) -> None:
    """Measure what is not in the output file yet, writing after every setting."""
    contenders: Mapping[str, Composer | None] = {"oracle adapter": None, **settings()}
    for name, composer in track(contenders.items(), description=pool, total=len(contenders)):
        key = f"{pool} | {name}"
        if key in done:
            check_same(key, done[key], len(asked), repr(composer), output)
            continue
        seconds: list[float] = []
        start = time.perf_counter()
        hits = measure(engine, asked, composer, seconds)
        done[key] = {
            "pool": pool,
            "setting": name,
            "composer": repr(composer),
            "exact_match": round(100 * sum(hits) / len(hits), 1),
            "interval_95": interval(hits),
            "prompts": len(hits),
            "compose_ms_per_batch_of_28": round(1000 * float(np.median(seconds)), 1),
            "seconds": round(time.perf_counter() - start, 1),
            "hits": "".join(map(str, hits)),
        }
        about = {
            "loracompose": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(),
            "base": engine.base.name,
            "dtype": str(engine.base.dtype),
        }
        write_whole(output, json.dumps({"about": about, "results": list(done.values())}, indent=1) + "\n")


def main() -> None:
    """Run every setting on every pool and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("pools", nargs="+", help="name=folder")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=12, help="test rows per task")
    options = parser.parse_args()
    pools = {name: Path(folder) for name, _, folder in (p.partition("=") for p in options.pools)}
    shared_tasks = set.intersection(*({p.name for p in folder.iterdir() if p.is_dir()} for folder in pools.values()))
    done = {}
    if options.output.is_file():
        done = {f"{r['pool']} | {r['setting']}": r for r in json.loads(options.output.read_text())["results"]}
    for name, folder in pools.items():
        with tempfile.TemporaryDirectory() as scratch:
            same = Path(scratch) / "pool"
            same.mkdir()
            for task in sorted(shared_tasks):  # every pool has an adapter for the same tasks
                (same / task).symlink_to((folder / task).resolve(), target_is_directory=True)
            index = AdapterIndex.build(same, Path(scratch) / "index", copy=True)
            engine = Engine.from_pretrained(index=index)
            run(engine, questions(options.tasks, same, options.rows), name, done, options.output)
    print(report(json.loads(options.output.read_text())))


if __name__ == "__main__":
    main()
