"""Listing and removing load neither torch, faiss nor the encoder."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loracompose import AdapterIndex
from loracompose.retrieval.catalog import Catalog, Settings
from tests.retrieval.test_catalog import card, unit

BARRED = "import sys\nfor heavy in ('torch', 'faiss', 'transformers', 'peft'): sys.modules[heavy] = None\n"


def run(code, *arguments):
    """Run in a process in which those packages cannot be imported."""
    ran = subprocess.run([sys.executable, "-c", BARRED + code, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


@pytest.fixture
def stored(tmp_path):
    """An index folder of an encoder that is not on this machine."""
    (tmp_path / "index").mkdir()
    settings = Settings("nobody/has-this", "1", dimension=4, instruction="i: ", loadable=True, copies=True)
    catalog = Catalog.create(tmp_path / "index" / "catalog.sqlite", settings)
    for name, digit in zip("xyz", "123", strict=True):
        catalog.add(card(name), f"adapters/{digit * 12}/{name}", unit())
        (tmp_path / "index" / "adapters" / (digit * 12) / name).mkdir(parents=True)
    catalog.close()
    return tmp_path / "index"


def test_an_index_is_listed_changed_compacted_and_saved_without_torch_and_encoder(stored, tmp_path):
    code = (
        "from loracompose import AdapterIndex\n"
        "with AdapterIndex.open(sys.argv[1]) as index:\n"
        "    index.remove('y')\n"
        "    index.compact()\n"
        "    index.snapshot(sys.argv[2])\n"
        "    print(*[card.name for card in index.cards], index.path('z').name, index)\n"
    )
    assert run(code, str(stored), str(tmp_path / "saved"))[:3] == ["x", "z", "z"]
    assert sorted(path.name for path in (stored / "adapters").iterdir()) == ["1" * 12, "3" * 12]
    with AdapterIndex.open(tmp_path / "saved") as saved:
        assert [entry.card.name for entry in saved.catalog.entries()] == ["x", "z"]


def test_the_commands_that_list_and_remove_need_neither(stored):
    code = "from loracompose.cli import app\napp(sys.argv[1:], standalone_mode=False)\n"
    run(code, "index", "remove", str(stored), "y")
    assert "z" in run(code, "index", "list", str(stored))
    run(code, "index", "compact", str(stored))
