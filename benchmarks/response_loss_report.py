"""Write the tables of response losses into docs/learned_methods.md and the README.

python benchmarks/response_loss_report.py
"""
# ruff: noqa: E501  lines of a table are as long as they are

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loracompose.durable import write_whole
from loracompose.evaluation.statistics import Estimate, Scores
from loracompose.marked import fill

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "response_loss.json"
EVERY_LINEAR = ROOT / "benchmarks" / "results" / "response_loss_every_linear.json"
LOAD = ROOT / "benchmarks" / "results" / "smora_load.json"
COST = ROOT / "benchmarks" / "results" / "router_cost.json"
LITTLE = 1.1  # times the plain sum of the same adapters
BEAM = ROOT / "benchmarks" / "results" / "beam.json"
DOCUMENT = ROOT / "docs" / "learned_methods.md"
README = ROOT / "README.md"
PROTOCOLS = ("in-domain", "masked")
EQUAL = "equal weights"

METHODS = {
    "base": "no adapter",
    "own adapter": "the row's own adapter alone",
    "selection": "the nearest adapter alone",
    "mixture": "the posterior's weights",
    EQUAL: "equal weights",
    "cat": "`cat`, shipped",
    "lora_flow": "`lora_flow`, shipped",
    "milora": "`milora`, shipped",
    "mole": "`mole`, shipped",
    "ramole": "`ramole`, shipped",
    "smora": "`smora`, shipped",
    "mole, a gate per matrix": "`mole`, a gate a matrix",
    "mole, a gate per layer": "`mole`, a gate a layer",
    "mole, a gate per block": "`mole`, a gate a block",
    "mole, a gate per network": "`mole`, one gate",
    "xlora": "`xlora`",
}
MATRIX, LAYER, BLOCK, NETWORK = (f"mole, a gate per {name}" for name in ("matrix", "layer", "block", "network"))
NO_DROPOUT, DROPOUT = "ramole, adapter dropout 0.0", "ramole, adapter dropout 0.5"
RANKS, TWO = (f"smora, 16 of 64 ranks in blocks of {size}" for size in (1, 8))
CLAIMS = (
    ("sharp weights beat equal weights (posterior)", "mixture", EQUAL),
    ("a gate a layer and token beats equal weights (LoRA-Flow)", "lora_flow", EQUAL),
    ("a gate a block beats equal weights (MoLE)", "mole", EQUAL),
    ("routing once a prompt beats equal weights (MiLoRA)", "milora", EQUAL),
    ("a router per token beats equal weights (RAMoLE)", "ramole", EQUAL),
    ("gates per rank beat equal weights (SMoRA's form for pools)", "smora", EQUAL),
    ("a head on the base's states beats equal weights (X-LoRA)", "xlora", EQUAL),
    ("one learned weight a module beats equal weights (CAT)", "cat", EQUAL),
    ("a dynamic gate beats the best static weights (LoRA-Flow over CAT)", "lora_flow", "cat"),
    ("a gate a block beats a gate a matrix (MoLE)", BLOCK, MATRIX),
    ("a gate a block beats one gate for all (MoLE)", BLOCK, NETWORK),
    ("adapter dropout helps adapters never seen (RAMoLE)", DROPOUT, NO_DROPOUT),
    ("sixteen ranks of their own beat two whole experts of rank 8 (SMoRA)", RANKS, TWO),
)
# A gate a layer, that is a part of a block, is a gate a block in the shipped pool, which adapts attention alone. So these
# are of a pool that adapts every linear module.
EVERY_LINEAR_CLAIMS = (
    ("a gate a layer beats a gate a matrix (MoLE, adapters of every linear module)", LAYER, MATRIX),
    ("a gate a layer beats a gate a block (MoLE, adapters of every linear module)", LAYER, BLOCK),
    ("a gate a block beats a gate a matrix (MoLE, adapters of every linear module)", BLOCK, MATRIX),
    ("a gate a layer beats one gate for all (MoLE, adapters of every linear module)", LAYER, NETWORK),
    ("a gate a block beats one gate for all (MoLE, adapters of every linear module)", BLOCK, NETWORK),
)


EVERY_LINEAR_SAID = (
    "The same for adapters that adapt every linear module ([response_loss_every_linear.json]"
    "(../benchmarks/results/response_loss_every_linear.json), `benchmarks/every_linear.py`), where a gate a layer is not the same "
    "as a gate a block:"
)


def scores(results: Mapping[str, Any]) -> dict[str, Scores]:
    """The losses of every protocol with their sign turned, so that more is better."""
    tasks, unseen = results["about"]["tasks"], results["about"]["unseen"]
    found = {}
    for protocol in PROTOCOLS:
        columns: dict[str, list[float | None]] = {}
        for label, method in results["methods"].items():
            if protocol in method:
                counted = unseen if label in (DROPOUT, NO_DROPOUT) else tasks
                columns[label] = [
                    -loss if task in counted else None for task, loss in zip(tasks, method[protocol], strict=True)
                ]
        found[protocol] = Scores.of(tasks, columns)
    return found


def said(gap: Estimate) -> str:
    """A difference with its interval."""
    return f"{gap.value:+.3f} [{gap.low:.3f}, {gap.high:.3f}]"


def load_told(record: Mapping[str, Any]) -> str:
    """How evenly a SMoRA training used its ranks, in one sentence and its figure."""
    excess, settings, recipe = record["load"]["violation"], record["settings"], record["recipe"]
    first, worst, last = (1 + value for value in (excess[0], max(excess), excess[-1]))
    return (
        f"SMoRA's balancing, {record['steps']} steps, {settings['active']} of {recipe['rank']} ranks a token: the "
        f"fullest rank of a module had {first:.2f} times the mean load in the first step, {worst:.2f} at its worst and "
        f"{last:.2f} in the last (mean over modules).\n\n![How SMoRA spread its tokens over its ranks](smora_load.svg)"
    )


def cost_told(result: Mapping[str, Any]) -> str:
    """What routers cost in time, as a table."""
    of = result["machine"]
    lines = [
        f"Time of {result['rows']} prompts with {result['adapters']} adapters each and {result['tokens']} tokens an answer, composing "
        f"included, beside the plain sum of the same adapters ([router_cost.json](../benchmarks/results/router_cost.json), "
        f"{result['dtype']}, {of['processor']}, {of['threads']} threads, {result['rounds']} rounds, quartiles in brackets):",
        "",
        "| method | seconds | times the plain sum |",
        "|---|---|---|",
    ]
    for name, part in result["methods"].items():
        ratio = part["ratio"]
        lines.append(
            f"| `{name}` | {part['seconds']['median']:.2f} | {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] |"
        )
    return "\n".join(lines)


def beam_told(result: Mapping[str, Any]) -> str:
    """BeamLoRA beside LoRA, in a table and a verdict."""
    gap = result["compared"]["beam - lora"]
    runs = [run for run in result["results"] if run["method"] == "beam"]
    recipe = runs[0]["recipe"]
    low, high = gap["dev_loss_95"]
    verdict = "confirmed" if high < 0 else "refuted" if low > 0 else "undecided"
    pruned = [event["pruned"] for run in runs for event in run["events"]]
    return (
        f"BeamLoRA beats LoRA at equal rank: **{verdict}** here. {gap['pairs']} pairs of trainings "
        f"({len({run['task'] for run in runs})} tasks, {len({run['seed'] for run in runs})} seeds, rank {recipe['rank']}, {recipe['steps']} steps of "
        f"{recipe['batch_size']} rows, [beam.json](../benchmarks/results/beam.json)): dev loss {gap['dev_loss']:+.4f} "
        f"[{low:+.4f}, {high:+.4f}] nats (95 %, tasks drawn, then seeds), lower in {gap['dev_loss_lower_in']}; exact match {gap['exact_match']:+.1f} "
        f"[{gap['exact_match_95'][0]:+.1f}, {gap['exact_match_95'][1]:+.1f}] points, higher in {gap['exact_match_higher_in']}. Three tasks say little about others. The schedule is "
        f"scaled to the run: {len(runs[0]['events'])} events a run, in each of which {min(pruned)} to {max(pruned)} ranks were pruned and as many expanded."
    )


def report(results: Mapping[str, Any], without: str = "") -> str:
    """Losses of all methods but one, in Markdown."""
    found, tasks = scores(results), results["about"]["tasks"]
    few = min(set(tasks), key=lambda task: (tasks.count(task), task))
    lines = [f"{len(tasks)} rows of {len(set(tasks))} tasks, {tasks.count(few)} at least (`{few}`):", ""]
    lines += ["| runs | " + " | ".join(f"{p}: loss | gain over equal weights [95 %]" for p in PROTOCOLS) + " |"]
    lines.append("|---" * (1 + 2 * len(PROTOCOLS)) + "|")
    for label, name in METHODS.items():
        if label == without:
            continue
        cells = []
        for protocol in PROTOCOLS:
            if label not in found[protocol].labels:
                cells += ["", ""]
                continue
            gain = "" if label == EQUAL else said(found[protocol].difference(label, EQUAL).difference)
            cells += [f"{-found[protocol].score(label).value:.3f}", gain]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims(found: Mapping[str, Scores], every_linear: Mapping[str, Scores]) -> list[str]:
    """The table of claims, line by line; without those whose methods were not measured."""
    lines = ["| claim | " + " | ".join(f"{p}: gain [95 %]" for p in PROTOCOLS) + " | here |"]
    lines.append("|---" * (2 + len(PROTOCOLS)) + "|")
    of = [(claim, found) for claim in CLAIMS] + [(claim, every_linear) for claim in EVERY_LINEAR_CLAIMS]
    return [*lines, *(line for claim, measured in of if (line := claimed(*claim, measured)))]


def told_in_short(
    results: Mapping[str, Any], every_linear: Mapping[str, Any], beam: Mapping[str, Any], cost: Mapping[str, Any]
) -> str:
    """Every claim in one table: those about losses, BeamLoRA's, and what prompt routing costs."""
    gap, ratio = beam["compared"]["beam - lora"], cost["methods"]["milora"]["ratio"]
    low, high = (-bound for bound in reversed(gap["dev_loss_95"]))
    verdict = "confirmed" if low > 0 else "refuted" if high < 0 else "undecided"
    cheap = "confirmed" if ratio["high"] <= LITTLE else "refuted" if ratio["low"] > LITTLE else "undecided"
    lines = [
        *claims(scores(results), scores(every_linear)),
        f"| BeamLoRA beats LoRA at equal rank ({gap['pairs']} pairs, dev loss) | {-gap['dev_loss']:+.3f} [{low:.3f}, {high:.3f}] | | {verdict} |",
        f"| routing once a prompt costs little: at most {LITTLE} times the plain sum (MiLoRA) | {ratio['median']:.2f} times "
        f"(quartiles {ratio['low']:.2f} to {ratio['high']:.2f}) | | {cheap} |",
    ]
    return "\n".join(lines)


def claimed(claim: str, method: str, other: str, found: Mapping[str, Scores]) -> str:
    """The line of a claim; nothing where one of the two was not measured."""
    gaps = {
        protocol: own.difference(method, other).difference
        for protocol, own in found.items()
        if {method, other} <= set(own.labels)
    }
    words = {p: "confirmed" if gap.low > 0 else "refuted" if gap.high < 0 else "undecided" for p, gap in gaps.items()}
    if not gaps:
        return ""
    same = len(set(words.values())) == 1
    verdict = next(iter(words.values())) if same else ", ".join(f"{word} {p}" for p, word in words.items())
    return f"| {claim} | {' | '.join(said(gaps[p]) if p in gaps else '' for p in PROTOCOLS)} | {verdict} |"


def read(file: Path) -> dict[str, Any]:
    """What one measurement wrote."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def filled(document: Path) -> str:
    """A document with the tables between its marks."""
    results, every_linear, load, beam, cost = map(read, (RESULTS, EVERY_LINEAR, LOAD, BEAM, COST))
    table = "\n".join(claims(scores(results), scores(every_linear)))
    said = [report(results, without=LAYER), EVERY_LINEAR_SAID, report(every_linear), table]
    blocks = {
        DOCUMENT: {"losses": "\n\n".join([*said, load_told(load), beam_told(beam), cost_told(cost)])},
        README: {"claims": told_in_short(results, every_linear, beam, cost)},
    }
    return fill(document.read_text(encoding="utf-8"), blocks[document])


def main() -> None:
    """Put the tables between the marks."""
    for document in (DOCUMENT, README):
        write_whole(document, filled(document))


if __name__ == "__main__":
    main()
