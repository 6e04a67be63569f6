"""Run notebooks from top to bottom and keep what they print and draw, without times and versions of the machine.

python notebooks/execute.py notebooks/*.ipynb
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(file: Path) -> None:
    """Run one notebook in its folder; it is written only if every cell ran."""
    book = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(file.parent)}}
    NotebookClient(book, resources=resources, record_timing=False, coalesce_streams=True).execute()
    book.metadata["language_info"] = {"name": "python"}
    nbformat.write(book, file)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(Path(name))
