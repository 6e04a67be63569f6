"""The notebooks run from top to bottom in a clean clone, and what they show is what a run printed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
KILOBYTES = 600
# an absolute path of two folders or more; a notebook names files relative to the repository
MACHINE = re.compile(r"(?<![\w.:/<])/[A-Za-z_]\w*/[\w.-]+/|\b[A-Z]:\\\\|site-packages")

every = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(book):
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]


def noise(book):
    """What no reader wants to see: errors, warnings and progress bars."""
    return [output for output in outputs(book) if output.output_type == "error" or output.get("name") == "stderr"]


def test_the_four_notebooks_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.real
@every
def test_a_notebook_runs_from_top_to_bottom_without_noise_and_writes_nothing_beside_itself(
    notebook, tmp_path, monkeypatch
):
    home = shutil.copytree(FOLDER, tmp_path / "clone" / "notebooks", ignore=shutil.ignore_patterns(".*"))
    for room in ("index", "tests"):
        (tmp_path / "clone" / room).symlink_to(ROOT / room)
    (tmp_path / "written").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "written"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("LORACOMPOSE_NOTEBOOK_FAST", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    before = sorted(home.iterdir())
    book = nbformat.read(notebook, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(home)}}).execute()
    assert noise(book) == []
    assert outputs(book)
    assert sorted(home.iterdir()) == before


@every
def test_kept_outputs_are_of_one_run_from_top_to_bottom_without_errors_or_warnings(notebook):
    book = nbformat.read(notebook, as_version=4)
    counts = [cell.execution_count for cell in book.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert noise(book) == []
    printed = [output for output in outputs(book) if output.output_type == "stream"]
    drawn = [o for o in outputs(book) if {"image/png", "image/svg+xml"} & set(o.get("data", {}))]
    assert printed
    assert drawn
    assert notebook.stat().st_size < KILOBYTES * 1000


@every
def test_a_notebook_names_no_folder_of_a_machine(notebook):
    book = nbformat.read(notebook, as_version=4)
    texts = [cell.source for cell in book.cells]
    for output in outputs(book):
        shown = output.get("data", {})
        texts += [output.get("text", ""), *(str(value) for kind, value in shown.items() if kind != "image/png")]
    assert [text for text in texts if MACHINE.search(text)] == []


@pytest.mark.parametrize("text", ["in /tmp/x/index", "/home/me/pool", r"C:\\Users", "lib/site-packages/torch"])
def test_a_folder_of_a_machine_would_be_noticed(text):
    assert MACHINE.search(text)
    assert not MACHINE.search("index/pool/home/ and ../docs/tmp/")


def test_the_rows_of_the_notebooks_are_of_tasks_that_the_shipped_pool_has():
    from loracompose.evaluation.tasks import read_tasks

    rows = read_tasks(FOLDER / "rows.jsonl")
    pool = {card.parent.name for card in (ROOT / "index" / "pool").glob("*/card.json")}
    assert {row.task for row in rows} <= pool
    assert len({row.prompt for row in rows}) == len(rows)
