"""Rows of 16 bits under a scale of their own, and the cards that searches keep."""

from __future__ import annotations

import numpy as np
import pytest

from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.scale import rows as stored
from loracompose.retrieval.scale.rows import Rows, Scaled, packed
from loracompose.retrieval.scale.shelf import CardShelf, MovedError
from tests.retrieval.scale.material import card, make_index

DRAWN = np.random.default_rng(0).standard_normal((40, 7)).astype(np.float32) * np.logspace(-6, 3, 40)[:, None]


def rows_of(path, given):
    path.write_bytes(packed(given))
    return Rows(path, given.shape[1])


def test_each_row_comes_back_within_a_share_of_its_own_largest_number(tmp_path):
    given = np.vstack([DRAWN, np.zeros((1, 7))]).astype(np.float32)
    found = rows_of(tmp_path / "rows", given).take(np.arange(41))
    assert (np.abs(found.rows - given).max(axis=1) <= np.abs(given).max(axis=1) / 65_000).all()
    np.testing.assert_array_equal(found.rows[-1], 0.0)


@pytest.mark.parametrize("mapped", [0, 1 << 20], ids=["piece by piece", "mapped"])
def test_rows_are_the_same_whether_their_file_is_mapped_or_read_piece_by_piece(tmp_path, monkeypatch, mapped):
    monkeypatch.setattr(stored, "_MAPPED_BYTES", mapped)
    rows = rows_of(tmp_path / "rows", DRAWN.astype(np.float32))
    assert (rows._mapped is None) == (mapped == 0)
    (tmp_path / "rows").unlink()  # as when the next version is made
    assert len(rows) == 40
    order = np.array([7, 39, 0, 7])
    np.testing.assert_allclose(rows.take(order).rows, DRAWN[order], rtol=1e-3, atol=1e-9)
    blocks = [block for _, block in rows.blocks(16)]
    np.testing.assert_array_equal(np.concatenate(blocks), rows.take(np.arange(40)).rows)


def test_rows_that_are_written_again_stay_as_they_are(tmp_path):
    first = rows_of(tmp_path / "first", DRAWN.astype(np.float32)).take(np.arange(40))
    again = rows_of(tmp_path / "again", first.rows).take(np.arange(40))
    np.testing.assert_array_equal(again.codes, first.codes)
    np.testing.assert_allclose(again.scales, first.scales, rtol=1e-6)


def test_blocks_are_the_rows_in_their_order(tmp_path):
    rows = rows_of(tmp_path / "rows", DRAWN.astype(np.float32))
    blocks = list(rows.blocks(16))
    assert [start for start, _ in blocks] == [0, 16, 32]
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), rows.take(np.arange(40)).rows)


@pytest.mark.parametrize("other", [DRAWN[0], DRAWN[:3].T])
def test_products_are_those_of_the_rows(other):
    other = other.astype(np.float32)
    found = Scaled(np.ones((3, 7), dtype=np.float32), np.array([1, 2, 3], dtype=np.float32))
    np.testing.assert_allclose(found.times(other), found.rows @ other, rtol=1e-5)


def test_cards_that_a_search_lacks_are_read_at_once_and_kept(tmp_path, monkeypatch):
    with make_index(tmp_path / "index", range(12), exact_limit=100) as index:
        asked = []
        entries = Catalog.entries
        monkeypatch.setattr(Catalog, "entries", lambda self, ids: asked.append(list(ids)) or entries(self, ids))
        shelf = CardShelf(index.catalog, size=4)
        assert [found.name for found in shelf.take([3, 1, 2])] == [card(seed).name for seed in (2, 0, 1)]
        shelf.take([1])
        shelf.take([3, 4, 5])
        assert asked == [[3, 1, 2], [4, 5]]
        shelf.take([1, 2])  # the one that nobody asked for the longest made room
        assert asked[2:] == [[2]]
        with pytest.raises(MovedError):
            shelf.take([5, 99])
