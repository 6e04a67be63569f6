"""Write the tables of docs/speed.md and of the README from what `loracompose bench` measured.

loracompose bench speed -o benchmarks/results/speed.json --figure docs/speed.svg
loracompose bench speed --dtype bfloat16 --no-slow -o benchmarks/results/speed_bfloat16.json --figure docs/speed_bfloat16.svg
loracompose bench speed -o benchmarks/results/speed_avx2.json --figure docs/speed_avx2.svg  # on a CPU without AVX-512
loracompose bench speed --dtype bfloat16 --case "16 rows, 3 adapters each" -o benchmarks/results/speed_avx2_bfloat16.json  # the same
python benchmarks/step_profile.py
python benchmarks/step_profile.py --dtype float32 --rounds 9 -o benchmarks/results/step_profile_avx2.json  # on a CPU without AVX-512
python benchmarks/step_profile.py --dtype bfloat16 --rounds 3 -o benchmarks/results/step_profile_avx2_bfloat16.json  # the same
loracompose bench composing -o benchmarks/results/composing.json --figure docs/composing.svg
loracompose bench answers INDEX -o benchmarks/results/answers.json --figure docs/answers.svg
loracompose bench answers INDEX --dtype bfloat16 -o benchmarks/results/answers_bfloat16.json  # INDEX with --encoder :bfloat16
loracompose bench stream POOL -o benchmarks/results/stream.json --figure docs/stream.svg
python benchmarks/speed_report.py
"""
# ruff: noqa: E501  lines of a table are as long as they are

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from loracompose.durable import write_whole
from loracompose.marked import fill

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PHASES = {"first_token": "64 tokens", "decode": "a step"}
SHOWN = "PEFT add_weighted_adapter(cat), then adapter_names", "PEFT adapter_names, one adapter a row"


def results(name: str) -> dict[str, Any]:
    """What one measurement wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def ratio(part: dict[str, float]) -> str:
    """Median and quartiles."""
    return f"{part['median']:.2f} ({part['low']:.2f}–{part['high']:.2f})"


def conditions(result: dict[str, Any]) -> str:
    """One line on what it was measured with."""
    of = result["machine"]
    return (
        f"{result['model']} in {result.get('dtype', 'float32')}, {of['processor']}, {of['threads']} thread{'s' * (of['threads'] != 1)}, "
        f"torch {of['torch']}, transformers {of['transformers']}, peft {of['peft']}, load {of['load']} at the start."
    )


def ways(file: str = "speed") -> str:
    """Every way on the first case."""
    result = results(file)
    name, case = next(iter(result["cases"].items()))
    lines = [
        f"{name} ({case['adapters']} adapters of ranks {', '.join(map(str, case['case']['ranks']))} in turn on two, four and "
        f"seven kinds of modules, {case['case']['tokens']} tokens of prompt). {conditions(result)} Medians of "
        f"{result['setting']['rounds']} rounds, quartiles in parentheses.",
        "",
        "| way | decoding step / base | first token / base | ms a prompt, 64 tokens | before the first batch, s |",
        "|---|---|---|---|---|",
    ]
    for way, part in case["ways"].items():
        star = "" if part["computes"] == "the mixture" or way == "base model" else " *"
        once = f"{part['once_seconds']:.1f}" if part["once_seconds"] else ""
        ratios = part["ratio_to_base"]
        lines.append(
            f"| {way}{star} | {ratio(ratios['decode'])} | {ratio(ratios['first_token'])} | {part['ms_a_prompt']:,.0f} | {once} |"
        )
    lines += ["", "\\* computes something else: one adapter for each row, or a merge that is not the weighted sum."]
    return "\n".join(lines)


CASE_WAYS = {
    "loracompose": "loracompose",
    SHOWN[1]: "PEFT adapter_names *",
    SHOWN[0]: "PEFT cat, then adapter_names",
    "LoraRetriever's einsum, mixture": "LoraRetriever's einsum",
    "PEFT, one adapter for all rows": "PEFT, one adapter for all *",
}


def cases(phase: str, file: str = "speed") -> str:
    """Every case in one phase: ours beside the others."""
    result = results(file)
    lines = [
        f"In {result['dtype']}; times that of the base model, medians of {result['setting']['rounds']} rounds, quartiles in parentheses.",
        "",
        "| case | adapters | " + " | ".join(CASE_WAYS.values()) + " | base, ms | base and floor / base |",
        "|---|---|" + "---|" * (len(CASE_WAYS) + 2),
    ]
    for name, case in result["cases"].items():
        found = case["ways"]
        cells = [ratio(found[way]["ratio_to_base"][phase]) if way in found else "" for way in CASE_WAYS]
        base = found["base model"]["seconds"][phase]["median"]
        least = 1 + case["floor_seconds"][phase] / base
        lines.append(f"| {name} | {case['adapters']} | {' | '.join(cells)} | {1000 * base:,.1f} | {least:.2f} |")
    lines += ["", "\\* one adapter for each row, or for all."]
    return "\n".join(lines)


def answers(file: str = "answers") -> str:
    """What an answer's time is made of."""
    result = results(file)
    asked = result["asked"]
    lines = [
        f"Milliseconds a batch of {asked['rows']} prompts with {asked['k']} of {result['adapters']} adapters each at equal weights, {asked['new_tokens']} tokens an "
        f"answer; medians of {asked['rounds']} rounds. {conditions(result)}",
        "",
        "| composer | sets | retrieve | load | compose | generate | before the model |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, passes in result["composers"].items():
        for key, label in (("anew", "composed anew"), ("again", "composed before")):
            part = passes[key]
            ms = (f"{1000 * stage['median']:,.1f}" for stage in part["seconds"].values())
            share = part["share_before_the_model"]
            percent = f"{share['median']:.1%} ({share['low']:.1%}–{share['high']:.1%})"
            lines.append(f"| `{name}` | {label} | {' | '.join(ms)} | {percent} |")
    return "\n".join(lines)


def profile(file: str = "step_profile") -> str:
    """What the passes of both phases spend their time on, in each dtype."""
    result = results(file)
    of = result["machine"]
    lines = [
        f"Milliseconds of a pass, {result['model']}, {of['processor']}, {of['threads']} threads, torch {of['torch']}; medians of "
        f"{result['rounds']} rounds. Kernels: what the profiler sees of a pass with adapters beyond one of the base, largest first.",
        "",
        "| dtype | pass | form | base | with adapters | floor of the adapters | times base | times base and floor | the same kernels, with adapters less base: ms (calls) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for dtype, phase, found in (
        (dtype, phase, found) for dtype, part in result["dtypes"].items() for phase, found in part["phases"].items()
    ):
        base = found["ways"]["base model"]
        for form, own in found["ways"].items():
            if own is not base:
                least = base["ms"] + found["floor_ms"]
                cells = (
                    dtype,
                    PHASES[phase],
                    form,
                    *(f"{ms:.1f}" for ms in (base["ms"], own["ms"], found["floor_ms"])),
                    f"{own['ratio']:.2f}",
                    f"{own['ms'] / least:.2f}",
                )
                lines.append(f"| {' | '.join(cells)} | {_more(own['kernels'], base['kernels'])} |")
    return "\n".join(lines)


def _more(own: dict[str, Any], base: dict[str, Any], shown: int = 5) -> str:
    """The kernels that a step with adapters spends more time in, those that cost most."""
    nothing = {"ms": 0.0, "calls": 0.0}
    more = {
        name: (part["ms"] - base.get(name, nothing)["ms"], part["calls"] - base.get(name, nothing)["calls"])
        for name, part in own.items()
    }
    largest = sorted(more, key=lambda name: -more[name][0])[:shown]
    return ", ".join(f"`{name}` {more[name][0]:.1f} ({more[name][1]:.0f})" for name in largest)


def stream() -> str:
    """A stream of prompts from a small and a large pool."""
    result = results("stream")
    asked = result["stream"]
    lines = [
        f"{asked['prompts']:,} prompts, {asked['k']} adapters each, the n-th most popular drawn in proportion to 1/n; batches of {asked['rows']}, "
        f"{asked['new_tokens']} tokens an answer, a store of {asked['store_bytes'] / 1e6:.0f} MB. {conditions(result)}",
        "",
        "| adapters on disk | prompts a second | time / smallest pool | adapters used | read from disk | loading, s | store, MB | peak memory, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, part in result["pools"].items():
        cells = (
            f"{int(size):,}",
            f"{part['prompts_a_second']:.2f}",
            f"{result['seconds_to_smallest'][size]:.2f}",
            f"{part['distinct_adapters']:,}",
            f"{part['reads']:,}",
            f"{part['stages_seconds'].get('load', 0.0):.1f}",
            f"{part['store_mb']:.0f}",
            f"{part['peak_mb']:,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def serving() -> str:
    """The same requests from one client and from many."""
    result = results("serving")
    lines = [
        f"{result['requests']} requests of {result['tokens']} tokens at most, each with its own adapters; {conditions(result)} Medians of {result['rounds']} "
        "rounds, quartiles in parentheses.",
        "",
        "| clients at once | requests a second | times one client | seconds of a request | equal answers |",
        "|---|---|---|---|---|",
    ]
    for clients, part in result["clients"].items():
        cells = (
            clients,
            f"{result['requests'] / part['seconds']['median']:.2f}",
            ratio(part["throughput"]),
            ratio(part["wait"]),
            f"{part['equal_answers']} of {result['requests']}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def composing() -> str:
    """What composing costs."""
    result = results("composing")
    lines = [
        f"{result['adapters']} adapters of rank {result['ranks'][0]} on {result['modules']} modules of {conditions(result)} "
        f"{result['rounds']} rounds, {result['slow_rounds']} of what takes seconds.",
        "",
        "| method | ms | quartiles |",
        "|---|---|---|",
    ]
    for name, part in result["seconds"].items():
        lines.append(
            f"| `{name}` | {1000 * part['median']:,.1f} | {1000 * part['low']:,.1f}–{1000 * part['high']:,.1f} |"
        )
    linear = result["linear"]
    lego = (
        f"{part['times_faster']:,.0f} times as fast at {part['inertia_ratio']:.3f} times the inertia with {effort}"
        for effort, part in result["lego"]["efforts"].items()
    )
    lines += [
        "",
        f"LEGO's clustering alone beside scikit-learn's `KMeans(n_init=10)` module by module: {'; '.join(lego)}; the first is what "
        f"`Lego()` does, `Lego(n_init=..., max_iter=...)` does others. `linear` is {linear['times_faster']:,.0f} times as fast as "
        f'PEFT\'s `add_weighted_adapter(combination_type="svd")`, from which it differs by {linear["difference"]:.1e} of the '
        f"largest entry; from the same in float64 it differs by {linear['error']:.1e}, and PEFT's by {linear['peft_error']:.1e}.",
    ]
    return "\n".join(lines)


def summary() -> str:
    """Three lines for the README."""
    result = results("speed")
    name, case = next(iter(result["cases"].items()))
    found = case["ways"]
    lines = [
        f"{name}, a weighted sum of its own for every row; {conditions(result)}",
        "",
        "| | decoding step / base | first token / base | ms a prompt, 64 tokens |",
        "|---|---|---|---|",
    ]
    chosen = ("loracompose", *SHOWN[::-1], "LoraRetriever's einsum, mixture", "PEFT set_adapter, row by row")
    for way in chosen:
        if way in found:
            ratios = found[way]["ratio_to_base"]
            lines.append(
                f"| {'**loracompose**' if way == 'loracompose' else way} | {ratio(ratios['decode'])} | "
                f"{ratio(ratios['first_token'])} | {found[way]['ms_a_prompt']:,.0f} |"
            )
    return "\n".join(lines)


DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "docs/speed.md": {
        "ways": ways,
        "bfloat16": partial(ways, "speed_bfloat16"),
        "ways_avx2": partial(ways, "speed_avx2"),
        "bfloat16_avx2": partial(ways, "speed_avx2_bfloat16"),
        "cases": partial(cases, "decode"),
        "prompts": partial(cases, "first_token"),
        "cases_bfloat16": partial(cases, "decode", "speed_bfloat16"),
        "prompts_bfloat16": partial(cases, "first_token", "speed_bfloat16"),
        "cases_avx2": partial(cases, "decode", "speed_avx2"),
        "prompts_avx2": partial(cases, "first_token", "speed_avx2"),
        "profile": profile,
        "profile_avx2": partial(profile, "step_profile_avx2"),
        "profile_avx2_bfloat16": partial(profile, "step_profile_avx2_bfloat16"),
        "answers": answers,
        "answers_bfloat16": partial(answers, "answers_bfloat16"),
        "composing": composing,
        "stream": stream,
    },
    "docs/serving.md": {"serving": serving},
    "README.md": {"speed": summary},
}


def filled(document: str, text: str) -> str:
    """The text of a document with every block made anew from the results."""
    return fill(text, {name: make() for name, make in DOCUMENTS[document].items()})


def main() -> None:
    """Fill the documents."""
    for document in DOCUMENTS:
        file = ROOT / document
        write_whole(file, filled(document, file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
