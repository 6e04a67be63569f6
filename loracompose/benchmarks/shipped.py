"""What measurements on the shipped pool share: their options, and an engine over the pool."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loracompose.engine import Engine
from loracompose.retrieval.index import AdapterIndex


def options(about: str | None, output: Path) -> argparse.ArgumentParser:
    """A parser of where the index and the result are, and how long to measure.

    Args:
        about: the script's own documentation.
        output: where the result goes unless -o says otherwise.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=output)
    parser.add_argument("--index", type=Path, required=True, help="of the shipped pool; built if it is not there")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    return parser


@contextmanager
def engine_over(pool: Path, index: Path, dtype: str) -> Iterator[Engine]:
    """An engine on the CPU over the index of a pool, which is built if it is not there."""
    if not index.exists():
        AdapterIndex.build(pool, index).close()
    with Engine.from_pretrained(index=index, device="cpu", dtype=dtype) as engine:
        yield engine
