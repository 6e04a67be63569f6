"""Build an index over a folder of adapters: `python index/build.py ADAPTERS INDEX [--copy] [--overwrite] ...`."""

from __future__ import annotations

import argparse
from pathlib import Path

from loracompose import AdapterIndex


def main() -> None:
    """Build, and say what was taken and what was left out and why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapters", type=Path, help="folder whose subfolders are adapters with a card.json")
    parser.add_argument("index", type=Path, help="folder to write")
    parser.add_argument("--copy", action="store_true", help="copy the adapters into the index")
    parser.add_argument("--strict", action="store_true", help="fail if an adapter cannot be taken")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing index")
    parser.add_argument("--encoder", help="sentence encoder, a folder or a Hub name; or NAME:bfloat16")
    options = parser.parse_args()
    index = AdapterIndex.build(
        options.adapters,
        options.index,
        embedder=options.encoder,
        copy=options.copy,
        strict=options.strict,
        overwrite=options.overwrite,
        progress=True,
    )
    print(f"{options.index}: {len(index)} adapters")
    for name, reason in index.report.skipped.items():
        print(f"left out {name}: {reason}")


if __name__ == "__main__":
    main()
