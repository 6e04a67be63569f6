from __future__ import annotations

import json
import shutil
import sqlite3

import numpy as np
import pytest

from loracompose import AdapterIndex
from loracompose.retrieval import verification
from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.verification import verify
from tests.retrieval.material import TASKS, make_adapter


def edit(index, statement, *values):
    with sqlite3.connect(index.catalog.path) as other:
        other.execute(statement, values)


def only(report):
    assert not report.ok
    assert len(report.problems) == 1
    return report.problems[0]


def test_a_sound_index_has_no_problems_and_is_not_changed_by_looking(index):
    before = index.catalog.generation
    report = index.verify()
    assert report.ok
    assert report.checked == 4
    assert report.problems == ()
    assert index.catalog.generation == before


def test_a_missing_adapter_is_found(index, pool):
    shutil.rmtree(pool / "sql")
    problem = only(index.verify())
    assert problem.adapter == "sql"
    assert "is missing" in problem.what
    assert "remove(name)" in problem.remedy


def test_changed_weights_are_found_and_an_update_mends_them(index, pool):
    make_adapter(pool / "sql", TASKS["sql"], seed=99)
    problem = only(index.verify())
    assert (problem.adapter, "fingerprint" in problem.what) == ("sql", True)
    index.update(pool / "sql")
    assert index.verify().ok


def test_torn_weights_are_found(index, pool):
    (pool / "sql" / "adapter_model.safetensors").write_bytes(b"torn")
    assert "does not load" in only(index.verify()).what


def test_a_changed_card_is_found_and_an_update_mends_it(index, pool):
    card = json.loads((pool / "sql" / "card.json").read_text())
    (pool / "sql" / "card.json").write_text(json.dumps({**card, "tags": ["new"]}))
    assert "card.json changed" in only(index.verify()).what
    index.update(pool / "sql")
    assert index.verify().ok


def test_a_lost_card_is_found(index, pool):
    (pool / "sql" / "card.json").unlink()
    assert "no card.json" in only(index.verify()).what


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (np.full(256, np.nan, dtype="<f4").tobytes(), "not finite"),
        (np.ones(256, dtype="<f4").tobytes(), "not of norm 1"),
        (b"1234", "has 4 bytes, expected 1024"),
    ],
)
def test_a_broken_embedding_is_found_and_reembedding_mends_it(index, tmp_path, embedder, blob, message):
    edit(
        index,
        "UPDATE examples SET embedding = ? WHERE position = 1 AND adapter = (SELECT id FROM adapters WHERE name='sql')",
        blob,
    )
    problem = only(index.verify())
    assert problem.adapter == "sql"
    assert message in problem.what
    assert "reembed=True" in problem.remedy
    with AdapterIndex.open(tmp_path / "index", embedder=embedder, reembed=True) as mended:
        assert mended.verify().ok


def test_a_lost_example_is_found(index):
    edit(index, "DELETE FROM examples WHERE position = 2 AND adapter = (SELECT min(id) FROM adapters)")
    assert "card.json changed" in " ".join(problem.what for problem in index.verify().problems)


@pytest.mark.parametrize(("harm", "message"), [("remove", "is missing"), ("damage", "is damaged")])
def test_a_broken_faiss_file_is_found(index, tmp_path, harm, message):
    file = tmp_path / "index" / "vectors.faiss"
    old = file.read_bytes()
    file.unlink() if harm == "remove" else file.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
    problem = only(index.verify())
    assert problem.adapter is None
    assert message in problem.what


def test_a_faiss_file_that_disagrees_with_the_embeddings_is_found(index):
    edit(
        index,
        "UPDATE examples SET embedding = (SELECT embedding FROM examples WHERE adapter = "
        "(SELECT max(id) FROM adapters) AND position = 0) WHERE adapter = (SELECT id FROM adapters WHERE name = 'sql')",
    )
    problem = only(index.verify())
    assert (problem.adapter, "disagrees" in problem.what) == ("sql", True)


def test_a_faiss_file_that_waits_for_the_next_search_is_no_problem(index):
    index.remove("sql")
    assert index.verify().ok


def test_a_damaged_catalog_is_found(index, tmp_path):
    index.close()
    path = tmp_path / "index" / "catalog.sqlite"
    content = bytearray(path.read_bytes())
    content[-2 * 4096 : -4096] = b"\xff" * 4096
    path.write_bytes(bytes(content))
    catalog = Catalog.open(path)
    report = verify(catalog, tmp_path / "index")
    catalog.close()
    assert report.problems[0].what.startswith("catalog: ")
    assert not report.ok


def test_a_leftover_copy_is_found(pool, tmp_path, embedder):
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, copy=True) as index:
        (tmp_path / "index" / "adapters" / "0123456789ab").mkdir()
        assert "belongs to no adapter" in only(index.verify()).what


def test_an_adapter_that_is_removed_while_it_is_verified_is_no_problem(pool, tmp_path, embedder, monkeypatch):
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, copy=True) as index:
        load = verification.load_adapter

        def meanwhile(folder):
            if "sql" in index:
                index.remove("sql")
            return load(folder)

        monkeypatch.setattr(verification, "load_adapter", meanwhile)
        report = index.verify()
    assert (report.checked, report.problems) == (4, ())


def test_half_a_faiss_file_is_found(index, tmp_path):
    (tmp_path / "index" / ".vectors.faiss.1.2").write_bytes(b"half")
    assert only(index.verify()).kind == "leftover"
