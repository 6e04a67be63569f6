from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracompose import AdapterIndex
from loracompose.retrieval import snapshot
from loracompose.retrieval.embedding import edges, whole
from loracompose.retrieval.fit_note import CHANGED, SMALL, FitNote
from loracompose.retrieval.fitting import Fitted
from loracompose.retrieval.snapshot import FITTED_KEY
from tests.retrieval.material import make_adapter

FITTED = Fitted(0.5, 1.0, 0.5, 1.0, (1.0, 1.0, 1.0, 1.0), 0.05, {"hybrid": [1.0], "discriminant": [], "mean": []})


def examples(number: int) -> list[str]:
    return [f"topic{number} please do thing{number % 7} {word}" for word in ("now", "later", "again")]


@pytest.fixture
def large(tmp_path: Path, embedder):
    """An index of more adapters than are fitted anew at every change."""
    for number in range(SMALL + 16):
        make_adapter(tmp_path / "pool" / f"a{number:03}", examples(number), number)
    with AdapterIndex.build(tmp_path / "pool", tmp_path / "index", embedder=embedder) as built:
        yield built


def note(index: AdapterIndex) -> FitNote:
    return FitNote.read(index.catalog.noted(FITTED_KEY, index.catalog.generation))


def late(tmp_path: Path, number: int) -> Path:
    return make_adapter(tmp_path / "late" / f"z{number:03}", examples(1000 + number), number)


def test_one_change_of_a_large_pool_is_found_without_fitting_anew(large, tmp_path):
    large.prepare()
    before = note(large)
    with mock.patch.object(snapshot, "fit", side_effect=AssertionError("fitted anew")):
        large.add(late(tmp_path, 0))
        assert large.search(["topic1000 please do thing6 soon"], k=1).names == ("z000",)
        large.remove("a003")
        assert "a003" not in large.search(["topic3 please do thing3 now"], k=99).names
    assert note(large) == before


def test_what_is_not_fitted_anew_follows_the_change_exactly(large, tmp_path):
    large.prepare()
    large.add(late(tmp_path, 0))
    large.remove("a003")
    found = large._current()
    groups = [large.catalog.embeddings(entry.id) for entry in found.entries]
    for part, half in ((found.hybrid.discriminant, whole), (found.hybrid.edges, edges)):
        means = np.stack([half(group).mean(axis=0, dtype=np.float64) for group in groups])
        centred = np.concatenate([half(group) - half(group).mean(axis=0, dtype=np.float64) for group in groups])
        covariance = centred.T @ centred / (sum(map(len, groups)) - len(groups))
        width = len(covariance)
        shrunk = (1 - part.shrinkage) * covariance + part.shrinkage * np.trace(covariance) / width * np.eye(width)
        np.testing.assert_allclose(part.whitening @ part.whitening.T @ shrunk, np.eye(width), atol=1e-5)
        np.testing.assert_allclose(part.means, means @ part.whitening, atol=1e-5)


def test_after_a_twentieth_of_the_pool_changed_everything_is_fitted_anew(large, tmp_path):
    large.prepare()
    before, changes = note(large), int(CHANGED * len(large)) + 1
    for number in range(changes):
        large.add(late(tmp_path, number))
    large.prepare()
    assert note(large).count == before.count + changes


def test_a_small_pool_is_fitted_anew_at_every_change(index, pool, tmp_path):
    index.prepare()
    index.add(make_adapter(tmp_path / "late" / "poem", ["write a poem", "a poem, please"], seed=9))
    index.prepare()
    assert note(index).count == 5


def test_whoever_opens_an_index_after_a_change_scores_as_whoever_had_it_open(large, tmp_path, embedder):
    large.prepare()
    large.add(late(tmp_path, 0))
    prompts = ["topic5 please do thing5 soon", "topic1000 please"]
    with AdapterIndex.open(tmp_path / "index", embedder=embedder) as other:
        theirs = other.search(prompts, k=5)
    mine = large.search(prompts, k=5)
    assert mine.names == theirs.names
    np.testing.assert_allclose(mine.scores.numpy(), theirs.scores.numpy(), atol=1e-5)


def test_embedding_anew_fits_anew(large):
    large.prepare()
    before = note(large)
    large.rebuild()
    assert note(large).epoch == before.epoch + 1


@given(st.integers(SMALL + 1, 400), st.integers(0, 30), st.integers(0, 30))
def test_a_note_serves_a_pool_of_which_at_most_a_twentieth_changed(count, came, went):
    fitted = FitNote.of(FITTED, range(1, count + 1), 0)
    ids = [*range(1 + went, count + 1), *range(count + 1, count + 1 + came)]
    changed = came + went
    assert fitted.serves(ids, 0) == (not changed or (changed <= CHANGED * count and len(ids) > SMALL))
    assert not fitted.serves(ids, 1)


def test_a_note_is_read_as_it_was_written_and_nothing_else_is_read():
    fitted = FitNote.of(FITTED, [3, 9], 2)
    assert FitNote.read(fitted.text()).text() == fitted.text()
    for wrong in ("", "[]", "{}", '{"weights": [1.0]}', '{"fitted": 3}'):
        with pytest.raises(ValueError, match="no note of a fit"):
            FitNote.read(wrong)
