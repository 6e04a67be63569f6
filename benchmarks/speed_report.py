"""Write the tables of docs/speed.md and of the README from what `loracompose bench` measured.

loracompose bench speed -o benchmarks/results/speed.json --figure docs/speed.svg
loracompose bench composing -o benchmarks/results/composing.json
loracompose bench stream POOL -o benchmarks/results/stream.json
python benchmarks/speed_report.py
"""
# ruff: noqa: E501  lines of a table are as long as they are

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "docs" / "speed.md", ROOT / "README.md")
MARK = "<!-- {name}: {end} -->"
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
        f"{result['model']} in {result.get('dtype', 'float32')}, {of['processor']}, {of['threads']} threads, "
        f"torch {of['torch']}, transformers {of['transformers']}, peft {of['peft']}, load {of['load']} at the start."
    )


def ways() -> str:
    """Every way on the first case."""
    result = results("speed")
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
    to_floor = case["ratio_to_floor"]
    lines += [
        "",
        "\\* computes something else: one adapter for each row, or a merge that is not the weighted sum.",
        "",
        f"The adapters' bytes and operations alone would take {1000 * case['floor_seconds']['decode']:.1f} ms a decoding step and "
        f"{1000 * case['floor_seconds']['first_token']:.0f} ms for the first token on this machine; `loracompose` takes "
        f"{ratio(to_floor['decode'])} and {ratio(to_floor['first_token'])} times the base model and these together.",
    ]
    return "\n".join(lines) + "\n"


def cases() -> str:
    """A decoding step on every case."""
    result = results("speed")
    shown = ("loracompose", "loracompose, rank_gating", *SHOWN, "LoraRetriever's einsum, mixture")
    lines = [
        "| batch | " + " | ".join(shown) + " | first token: loracompose |",
        "|---" * (len(shown) + 2) + "|",
    ]
    for name, case in result["cases"].items():
        found = case["ways"]
        cells = [f"{found[way]['ratio_to_base']['decode']['median']:.2f}" for way in shown]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {found['loracompose']['ratio_to_base']['first_token']['median']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def composing() -> str:
    """What composing costs."""
    result = results("composing")
    lines = [
        f"{result['adapters']} adapters of rank {result['ranks'][0]} on {result['modules']} modules of {conditions(result)}",
        "",
        "| method | ms | quartiles |",
        "|---|---|---|",
    ]
    for name, part in result["seconds"].items():
        lines.append(
            f"| `{name}` | {1000 * part['median']:,.1f} | {1000 * part['low']:,.1f}–{1000 * part['high']:,.1f} |"
        )
    lego, linear = result["lego"], result["linear"]
    lines += [
        "",
        f"LEGO's clustering alone is {lego['times_faster']:,.0f} times as fast as scikit-learn's `KMeans(n_init=10)` module by "
        f"module, at {lego['inertia_ratio']:.3f} times its inertia. `linear` is {linear['times_faster']:,.0f} times as fast as "
        f'PEFT\'s `add_weighted_adapter(combination_type="svd")`, from which it differs by {linear["difference"]:.0e} of the '
        "largest entry.",
    ]
    return "\n".join(lines) + "\n"


def stream() -> str:
    """What a large pool costs."""
    result = results("stream")
    of = result["stream"]
    lines = [
        f"{of['prompts']:,} prompts, {of['k']} adapters each, drawn by Zipf's law, {of['new_tokens']} new tokens, "
        f"{of['rows']} rows at a time, {of['store_bytes'] / 1e6:.0f} MB for adapters in memory.",
        "",
        "| adapters on disk | prompts a second | time / smallest pool | distinct adapters used | reads | MB held | peak MB of the process |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, part in result["pools"].items():
        lines.append(
            f"| {int(size):,} | {part['prompts_a_second']:.2f} | {result['seconds_to_smallest'][size]:.2f} | "
            f"{part['distinct_adapters']:,} | {part['reads']:,} | {part['store_mb']:.0f} | {part['peak_mb']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


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
    return "\n".join(lines) + "\n"


BLOCKS = {"speed": summary, "ways": ways, "cases": cases, "composing": composing, "stream": stream}


def filled(text: str) -> str:
    """The text with every block made anew from the results."""
    for name, make in BLOCKS.items():
        begin, end = (MARK.format(name=name, end=side) for side in ("begin", "end"))
        if begin in text:
            before, _, rest = text.partition(begin + "\n")
            _, _, after = rest.partition(end)
            text = f"{before}{begin}\n{make()}{end}{after}"
    return text


def main() -> None:
    """Fill the documents."""
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
