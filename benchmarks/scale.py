"""Synthetic pools of 1e3 to 1e6 adapters: build, bytes, open, search, change, recall.

    OMP_NUM_THREADS=1 python benchmarks/scale.py profiles.jsonl WORK -o benchmarks/results/scale.json

WORK is a folder for the pools; a million adapters take about 15 GB for the time being.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from loracompose.benchmarks.scale import SIZES, measure


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    result = measure(args.profiles, args.work, args.sizes, print)
    if args.output.is_file():  # sizes that are not measured now stay
        before = json.loads(args.output.read_text())["pools"]
        kept = [pool for pool in before if pool["adapters"] not in args.sizes]
        result["pools"] = sorted([*kept, *result["pools"]], key=lambda pool: pool["adapters"])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rounded(result), indent=1) + "\n")
