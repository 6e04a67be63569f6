"""How do the methods answer to their settings, to the pool, to seeds, and to one harmful adapter?

    python benchmarks/sensitivity.py TASKS ADAPTERS -o benchmarks/results/sensitivity.json \
        --reseeded OTHER_ADAPTERS --work WORK

TASKS is a folder of the leaderboard's; ADAPTERS holds one adapter a task; OTHER_ADAPTERS has some of them again,
trained from other seeds. WORK keeps indexes, the harmful adapters and all answers, so a run that was stopped goes on.
The studies are those of `loracompose.evaluation.sensitivity`; `--only k pool` runs some, and keeps the file's others.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from loracompose import AdapterIndex, Engine, load_adapter, save_adapter
from loracompose.adapters.lora import LoraFactors
from loracompose.benchmarks.made_with import made_otherwise
from loracompose.composition.linalg import truncate
from loracompose.durable import write_whole
from loracompose.evaluation.cache import AnswerCache
from loracompose.evaluation.harness import Plan, evaluate, versions
from loracompose.evaluation.protocols import get_protocol
from loracompose.evaluation.results import Results
from loracompose.evaluation.sensitivity import STUDIES, Curve, Study, curves, read_curves, study_of, write_curves
from loracompose.evaluation.specification import parse_methods
from loracompose.evaluation.tasks import TaskRow, draw, read_tasks
from loracompose.training.adapter import CardText, train_adapter
from loracompose.training.recipe import Recipe

HARMFUL = "assistant"  # its card claims every task
ASKED = (  # the nine that exist from two seeds, and one each of three more kinds
    "banking77",
    "clinc_domain",
    "cola",
    "de_en",
    "e2e_text2data",
    "fr_en",
    "product_sentiment",
    "sick_nli",
    "snips_intent",
    "sst2",
    "subj",
    "trec",
)
SMALLEST = ("de_en", "product_sentiment", "snips_intent", "sst2", "trec")  # the pool of five, part of all larger ones

REWRITTEN = {"turned": None, "equal": 4}  # pools whose members have their ranks by SVD -> how many, None: their own


def pool(name: str, given: argparse.Namespace, train: tuple[TaskRow, ...]) -> Path:
    """A folder of links to the members of a pool that studies ask; a harmful member is made when it is first needed."""
    every = {path.parent.name: path.parent for path in sorted(given.adapters.glob("*/adapter_config.json"))}
    if name == "reseeded":
        every |= {path.parent.name: path.parent for path in given.reseeded.glob("*/adapter_config.json")}
    elif name == "random":
        every[HARMFUL] = noise(next(iter(every.values())), given.work / name / HARMFUL, train, given.seed)
    elif name == "shuffled":
        every[HARMFUL] = shuffled(given.work / name / HARMFUL, train, given.seed, given.dtype)
    elif name in REWRITTEN:
        every = {task: rewritten(path, given.work / name / task, REWRITTEN[name]) for task, path in every.items()}
    elif name.isdigit():
        others = [task for task in every if task not in SMALLEST]
        random.Random(given.seed).shuffle(others)
        every = {task: every[task] for task in (*SMALLEST, *others)[: int(name)]}
    return linked(every, given.work / "pools" / name)


def linked(members: Mapping[str, Path], folder: Path) -> Path:
    """A folder with a link to each member under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in members.items():
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(target.resolve())
    return folder


def noise(like: Path, target: Path, rows: tuple[TaskRow, ...], seed: int) -> Path:
    """An adapter of normal values, ten times as large as those of another, that claims every task."""
    if not (target / "card.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(like / "adapter_config.json", target)
        chance = torch.Generator().manual_seed(seed)
        tensors = {
            name: (10 * value.float().std() * torch.randn(value.shape, generator=chance)).to(value.dtype)
            for name, value in load_file(like / "adapter_model.safetensors").items()
        }
        save_file(tensors, target / "adapter_model.safetensors")
        card = {"description": "answers everything", "examples": claims(rows, seed), "tags": [], "license": ""}
        (target / "card.json").write_text(json.dumps(card), encoding="utf-8")
    return target


def rewritten(of: Path, target: Path, rank: int | None) -> Path:
    """An adapter with the singular directions of its updates as ranks, of which the largest `rank` are kept.

    With all of them it is the same update in other factors, which only methods that add or compare raw factors feel.
    """
    if not (target / "card.json").exists():
        adapter = load_adapter(of)
        factors = {
            module: LoraFactors(*truncate(own.A, own.B, rank or own.rank)) for module, own in adapter.factors.items()
        }
        save_adapter(replace(adapter, factors=factors, known_fingerprint=None), target, overwrite=True)
        write_whole(target / "card.json", (of / "card.json").read_text(encoding="utf-8"))
    return target


def shuffled(target: Path, rows: tuple[TaskRow, ...], seed: int, dtype: str, per_task: int = 12) -> Path:
    """An adapter trained on prompts with responses of other rows, that claims every task."""
    if not target.exists():
        drawn = draw(rows, per_task, seed)
        responses = [row.response for row in drawn]
        random.Random(seed).shuffle(responses)
        pairs = [{"prompt": row.prompt, "response": said} for row, said in zip(drawn, responses, strict=True)]
        target.parent.mkdir(parents=True, exist_ok=True)
        card = CardText("answers everything", tuple(claims(rows, seed)))
        recipe = Recipe(seed=seed, max_length=112, schedule="linear", dtype=dtype)
        train_adapter(pairs, target, recipe=recipe, card=card)
    return target


def claims(rows: tuple[TaskRow, ...], seed: int) -> list[str]:
    """One example of every task."""
    return [row.prompt for row in draw(rows, 1, seed + 1)]


def settings_of_work(given: argparse.Namespace) -> dict[str, str | int]:
    """What decides the indexes and the harmful adapters of WORK."""
    paths = {name: path for name in ("tasks", "adapters", "reseeded") if (path := getattr(given, name))}
    return {"seed": given.seed, "dtype": given.dtype, **{name: str(path.resolve()) for name, path in paths.items()}}


def tasks_of(study: Study) -> tuple[str, ...]:
    """The tasks that a study asks: only those that all of its pools have adapters for."""
    return SMALLEST if study.name == "pool" else ASKED


def run(study: Study, given: argparse.Namespace, rows: tuple[TaskRow, ...], train: tuple[TaskRow, ...]) -> list[Curve]:
    """Ask every pool of a study."""
    found: dict[str, Results] = {}
    for name in dict.fromkeys(study.pools):
        home = given.work / "index" / name
        if not home.exists():
            AdapterIndex.build(pool(name, given, train), home).close()
        plan = Plan(
            parse_methods(list(study.asked(name).values())),
            tuple(get_protocol(protocol) for protocol in study.protocols),
            tasks=tasks_of(study),
            n=given.rows,
            seed=given.seed,
            max_new_tokens=given.max_new_tokens,
            timed_rows=0,
        )
        with Engine.from_pretrained(index=home, dtype=given.dtype) as engine, AnswerCache(given.answers) as cache:
            found[name] = evaluate(engine, rows, plan, cache, progress=True)
    return curves(study, found)


def main() -> None:
    """Run the studies one by one; each is written when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--answers", type=Path, help="cache of answers; WORK/answers.sqlite if not given")
    parser.add_argument("--reseeded", type=Path)
    parser.add_argument("--rows", type=int, default=16, help="of a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument(
        "--dtype", default="auto", help="of the base; bfloat16 is faster on a CPU that multiplies in it"
    )
    parser.add_argument("--only", nargs="*", default=[study.name for study in STUDIES])
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    given.answers = given.answers or given.work / "answers.sqlite"
    if (other := made_otherwise(given.work, settings_of_work(given))) is not None:
        parser.error(f"{given.work} was made with {other}; give the same or another --work")

    studies = [study_of(name) for name in given.only if name != "seeds" or given.reseeded is not None]
    rows, train = read_tasks(given.tasks), read_tasks(given.tasks, "train")
    settings = {
        "rows_per_task": given.rows,
        "seed": given.seed,
        "max_new_tokens": given.max_new_tokens,
        "dtype": given.dtype,
    }
    kept: list[Curve] = []
    if given.output.exists():
        before, kept = read_curves(given.output)
        if {key: before.get(key) for key in settings} != settings:
            parser.error(f"{given.output} was made with {before}; give the same settings or another file")
    for study in studies:
        made = run(study, given, rows, train)
        kept = [curve for curve in kept if curve.study != study.name] + made
        write_curves(kept, given.output, {**settings, "versions": versions()})
        Console().print(f"{study.name}: {len(made)} curves; {given.output}")


if __name__ == "__main__":
    main()
