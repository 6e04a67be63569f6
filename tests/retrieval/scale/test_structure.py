"""The faiss structure: chosen by size and by measured recall."""

from __future__ import annotations

import numpy as np
import pytest

from loracompose.retrieval.scale import choosing
from loracompose.retrieval.scale.choosing import build_structure, coded_together, found_share
from loracompose.retrieval.scale.deriving import arranged
from loracompose.retrieval.scale.metric import stored_width
from loracompose.retrieval.scale.structure import Breadth, read_structure, write_structure


def cloud(count, seed=0, width=16):
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((20, width)) * 3
    return (centres[draw.integers(0, 20, count)] + draw.standard_normal((count, width))).astype(np.float32)


def nearest(vectors, queries):
    gaps = ((queries[:, None] - vectors) ** 2).sum(axis=2)
    return list(np.argsort(gaps, axis=1)[:, :10])


def built(vectors, queries):
    return build_structure(lambda: iter([vectors]), len(vectors), vectors, queries, nearest(vectors, queries))


def test_few_vectors_are_compared_one_by_one():
    vectors, queries = cloud(200), cloud(20, 1)
    chosen = built(vectors, queries)
    assert chosen.spec == "Flat"
    rows, distances = chosen.near(queries)
    assert found_share(list(rows), nearest(vectors, queries)) == 1.0
    assert (np.diff(distances, axis=1) >= 0).all()


def test_many_vectors_get_a_structure_that_reaches_the_recall_with_less_than_all(monkeypatch):
    monkeypatch.setattr(choosing, "_FLAT", 500)
    vectors, queries = cloud(2000), cloud(64, 1)
    chosen = built(vectors, queries)
    assert chosen.spec != "Flat"
    assert chosen.breadth.candidates < 2000
    assert found_share(list(chosen.near(queries)[0]), nearest(vectors, queries)) >= choosing.TARGET


def test_where_one_structure_misses_the_recall_the_next_is_tried(monkeypatch):
    monkeypatch.setattr(choosing, "_specs", lambda count, width: ["IVF64,PQ2x4fs", "Flat"])
    vectors, queries = cloud(9000), cloud(32, 1)
    assert built(vectors, queries).spec == "Flat"


def test_looking_wider_finds_all(monkeypatch):
    monkeypatch.setattr(choosing, "_FLAT", 10)
    vectors, queries = cloud(300), cloud(3, 1)
    chosen = built(vectors, queries)
    rows, _ = chosen.near(queries, Breadth(1 << 12, 300, 4))
    assert [sorted(row) for row in rows.tolist()] == [list(range(300))] * 3


@pytest.mark.parametrize("spec", ["Flat", "HNSW32,SQ8", "IVF16,SQ8", "IVF16,PQ8x4fs,Refine(SQ8)"])
def test_every_structure_comes_back_from_its_file(tmp_path, monkeypatch, spec):
    monkeypatch.setattr(choosing, "_specs", lambda count, width: [spec])
    vectors, queries = cloud(600), cloud(8, 1)
    chosen = built(vectors, queries)
    write_structure(chosen, tmp_path / "vectors")
    back = read_structure(chosen.spec, tmp_path / "vectors", chosen.breadth)
    np.testing.assert_array_equal(back.near(queries)[0], chosen.near(queries)[0])


def test_where_few_candidates_miss_the_recall_more_are_fetched(monkeypatch):
    monkeypatch.setattr(choosing, "_CANDIDATES", (2, 30, 200))
    vectors, queries = cloud(400), cloud(20, 1)
    assert built(vectors, queries).breadth.candidates == 30


def test_many_are_weighed_again_where_few_need_be_fetched(monkeypatch):
    monkeypatch.setattr(choosing, "_specs", lambda count, width: ["IVF16,PQ2x4fs,Refine(SQ8)"])
    monkeypatch.setattr(choosing, "_CANDIDATES", (10, 20, 200))
    monkeypatch.setattr(choosing, "_WEIGHED", (10, 20, 600))
    vectors, queries = cloud(600), cloud(64, 1)
    chosen = built(vectors, queries)
    assert chosen.breadth.candidates == 20  # ten are too few, for eight bits take neighbours for each other
    assert chosen.breadth.factor == 30.0
    assert found_share(list(chosen.near(queries)[0]), nearest(vectors, queries)) >= choosing.TARGET


def test_lists_are_added_as_long_as_that_is_cheaper(monkeypatch):
    seconds = {1: 5.0, 2: 3.0, 3: 4.0, 4: 2.0, 5: 3.0, 6: 3.0, 7: 1.0}
    tried = []

    def cheapest(spec, index, probes, *given):
        tried.append(probes)
        return Breadth(probes, 64), 0.5 if probes == 1 else 1.0, seconds[probes]

    monkeypatch.setattr(choosing, "_probes", lambda spec, index: list(seconds))
    monkeypatch.setattr(choosing, "_cheapest", cheapest)
    assert choosing._tuned("any", None, cloud(1), [], 0.0) == (Breadth(4, 64), 1.0, 2.0)
    assert tried == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("count", [5, 24, 511])
def test_each_code_of_four_bits_has_one_of_the_leading_axes(count):
    width = stored_width(count)
    together = coded_together(width)
    found = arranged(np.eye(count))
    np.testing.assert_allclose(found.T @ found, np.eye(count), atol=1e-12)
    leading = np.flatnonzero((found**2)[: -(-count // together)].sum(axis=0) > 0.5)
    assert leading.tolist() == list(range(0, count, together))
    assert (np.abs(found[:, leading]).max(axis=0) < 1.0).all()  # turned among themselves
