"""How a SMoRA training spread its tokens over the ranks, as a figure.

    python benchmarks/smora_load.py adapters/smora.router --keep benchmarks/results/smora_load.json
    python benchmarks/smora_load.py benchmarks/results/smora_load.json -o docs/smora_load.svg

Reads the record in the router's folder that `loracompose train smora` wrote, or what `--keep` kept of it; nothing is
measured anew. Left, the excess of the fullest rank over the mean, step by step, averaged over the modules; right, the
ranks of every module from the fullest to the emptiest, averaged over the modules, in the first and in the last tenth of
the steps. Needs the extra "eval".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt

from loracompose.composition.router import load_router
from loracompose.evaluation.results import write_whole

KEPT = ("recipe", "settings", "examples", "steps", "seconds", "losses", "load", "versions")


def sorted_loads(part: Mapping[str, Sequence[int]]) -> list[float]:
    """Load of the fullest, the second, ... to the emptiest block of a module over its mean, averaged over modules."""
    modules = [sorted((n * len(load) / max(1, sum(load)) for n in load), reverse=True) for load in part.values()]
    return [sum(column) / len(column) for column in zip(*modules, strict=True)]


def read(place: Path) -> dict[str, Any]:
    """What is kept of the record of a router.

    Raises:
        LookupError: the record has no load, as that of a router for pools.
    """
    record = load_router(place).training if place.is_dir() else json.loads(place.read_text(encoding="utf-8"))
    if "load" not in record:
        raise LookupError(f"{place} has no load in its record; give the router that `loracompose train smora` wrote")
    return {name: record[name] for name in KEPT if name in record}


def draw(load: Mapping[str, Any], output: Path) -> None:
    """Write the figure of a load."""
    with mpl.rc_context({"svg.hashsalt": "smora_load", "svg.fonttype": "none"}):  # the same record, the same file
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        left.plot(range(1, len(load["violation"]) + 1), load["violation"], color="tab:blue", linewidth=1)
        left.set(xlabel="step", ylabel="fullest rank over the mean, minus 1", ylim=(0, None))
        for part, style in (("first", "--"), ("last", "-")):
            loads = sorted_loads(load[part])
            right.plot(range(1, len(loads) + 1), loads, style, color="tab:orange", label=f"{part} tenth of the steps")
        right.axhline(1.0, color="grey", linewidth=0.5)
        right.set(xlabel="ranks, fullest first", ylabel="load over the mean", ylim=(0, None))
        right.legend(frameon=False)
        figure.savefig(output, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="router folder of a SMoRA adapter, or the JSON kept of it")
    parser.add_argument("--keep", type=Path, help="where to keep the record as JSON")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/smora_load.svg"))
    asked = parser.parse_args()
    record = read(asked.record)
    if asked.keep:
        write_whole(asked.keep, json.dumps(record) + "\n")
    draw(record["load"], asked.output)


if __name__ == "__main__":
    main()
