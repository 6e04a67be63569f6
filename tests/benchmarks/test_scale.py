"""The measurement of scale: synthetic pools, what their searches are compared with, and the table in the README."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loracompose.benchmarks import scale, scale_pool, scale_search
from loracompose.benchmarks.scale_pool import Plan
from loracompose.benchmarks.scale_report import BLOCK, markdown
from loracompose.benchmarks.scale_search import Given, every_channel, exact_rows
from loracompose.benchmarks.synthesis import Profiles, draw_block, draw_queries, unit_quarters
from loracompose.marked import fill, marks
from loracompose.retrieval.embedding import CallableEmbedder, features, whole
from loracompose.retrieval.scale.parts import parts_of
from loracompose.retrieval.tables import Settings
from tests.retrieval.scale.material import EMBEDDER, PROMPTS, make_index

ROOT = Path(__file__).parents[2]


def profiles(adapters=5, prompts=6, width=16):
    draw = np.random.default_rng(0)
    owners = np.repeat(np.arange(adapters), prompts)
    rows = draw.standard_normal((adapters, width))[owners] + 0.3 * draw.standard_normal((len(owners), width))
    texts = tuple(f"kind {owner} prompt {place} of it" for place, owner in enumerate(owners))
    return Profiles(unit_quarters(rows.astype(np.float32)), owners, texts)


def test_prompts_that_are_embedded_already_have_the_features_they_were_given():
    rows = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    texts = ["Question: how many?\nAnswer briefly.", "Name the capital.\nOf France"]
    given = rows.reshape(2, 12)
    settings = Settings("synthetic", "1", 3, "Represent the sentence for similar task retrieval: ")
    found = features(CallableEmbedder(Given(given, texts), "synthetic", "1"), texts, settings)
    np.testing.assert_allclose(found, given, rtol=1e-6)


def test_synthetic_prompts_vary_within_and_between_adapters_as_real_ones_do():
    real = profiles()
    drawn = draw_block(real, 0, 4, 2000)
    assert drawn.embeddings.shape == (2000, 4, 16)
    assert [len(texts) for texts in drawn.texts] == [4] * 2000
    between = np.trace(np.cov(real.differences.T)), np.trace(np.cov((drawn.truths - real.means[drawn.bases]).T))
    assert between[1] == pytest.approx(between[0] + 0.04 * np.trace(np.cov(real.deviations.T)), rel=0.05)
    quarters = np.linalg.norm(drawn.embeddings.reshape(2000, 4, 4, 4), axis=3)
    np.testing.assert_allclose(quarters, 1.0, rtol=1e-5)


def test_an_adapter_is_the_same_in_every_pool_and_so_are_its_prompts():
    real = profiles()
    few, many = (draw_block(real, 3, 2, count) for count in (7, 7))
    np.testing.assert_array_equal(few.embeddings, many.embeddings)
    assert few.texts == many.texts
    rows = np.array([1, 5])
    np.testing.assert_array_equal(draw_queries(real, few, rows, 0)[0], draw_queries(real, many, rows, 0)[0])


def test_recall_is_measured_against_all_adapters_under_the_present_metric(tmp_path):
    with make_index(tmp_path / "pool", range(30), exact_limit=5) as index:
        index.search(PROMPTS)
        index.remove("a00011")
        view = index._large.view()
        vectors = features(EMBEDDER, PROMPTS, view.settings)
        means = np.stack([whole(index.catalog.embeddings(id)).mean(axis=0) for id in index.catalog.ids()])
        inverse = np.stack([row.vector for row in view.metrics[0].turned(np.eye(24, dtype=np.float32))])
        gaps = whole(vectors)[:, None] - means
        expected = np.argsort(np.einsum("pkd,de,pke->pk", gaps, inverse, gaps), axis=1)[:, :3]
        np.testing.assert_array_equal(exact_rows(view, vectors, 3), np.array(index.catalog.ids())[expected])


def test_every_channel_is_asked_while_that_is_timed_and_the_fitted_ones_afterwards(tmp_path):
    with make_index(tmp_path / "pool", range(30), exact_limit=5) as index:
        before = index.search(PROMPTS)
        view = index._large.view()
        with every_channel(index):
            assert index._large.view().version.fitted.weights == (1.0,) * 4
            found = index.search(PROMPTS, 30)
            (query,) = index._large.view().queries(
                parts_of(features(EMBEDDER, PROMPTS[:1], view.settings), PROMPTS[:1])
            )
            (asked,) = view.version.frequencies.asked(PROMPTS[:1])
            places = np.arange(30)
            meaning = view.fits(query, places)
            fits = sum(
                (meaning, view.fits(query, places, 1), view.evidence(asked, places), view.fits(query, places, 2))
            )
            np.testing.assert_allclose(
                found.scores[0], fits - fits.max() - np.log(np.exp(fits - fits.max()).sum()), atol=1e-3
            )
        assert index._large.view() is view
        np.testing.assert_array_equal(index.search(PROMPTS).scores, before.scores)


def test_a_pool_that_is_kept_is_searched_again_and_not_built(tmp_path, monkeypatch):
    """Stages run in this process; what adding leaves behind is removed."""
    real = profiles()
    np.savez(tmp_path / "profiles.npz", features=real.features, owners=real.owners, texts=np.array(real.texts))
    built = []
    monkeypatch.setattr(scale, "_apart", lambda stage, plan: built.append(stage.__name__) or stage(plan))
    monkeypatch.setattr(scale_search, "_TIMED", 64)
    monkeypatch.setattr(scale_search, "_QUERIES", 8)
    monkeypatch.setattr(scale_pool, "_QUERIES", 8)
    (first,) = scale.measure(tmp_path / "none.jsonl", tmp_path, [40], keep=True)
    (again,) = scale.measure(tmp_path / "none.jsonl", tmp_path, [40], keep=True)
    assert built == ["build_pool", "search_pool", "search_pool"]
    assert first["bytes"] == again["bytes"]
    assert first["search_hybrid"]["p50_ms"] > 0
    plan = Plan(40, tmp_path / "pool-40", tmp_path / "profiles.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pool-40",
        "pool-40.json",
        "pool-40.npz",
        "profiles.npz",
    ]
    (last,) = scale.measure(tmp_path / "none.jsonl", tmp_path, [40])
    assert last["adapters"] == 40
    assert not plan.folder.exists()


def test_pools_of_other_sizes_stay_in_the_results(tmp_path):
    file = tmp_path / "scale.json"
    file.write_text(json.dumps(scale.result_of([{"adapters": 7, "open_s": 0.123456}, {"adapters": 9}])))
    result = scale.result_of([{"adapters": 9, "open_s": 2.0}], file)
    assert result["pools"] == [{"adapters": 7, "open_s": 0.1235}, {"adapters": 9, "open_s": 2.0}]


def test_the_table_of_scale_in_the_readme_is_made_from_its_results():
    file = ROOT / "benchmarks" / "results" / "scale.json"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if not file.exists():
        assert marks(BLOCK)[0] not in readme  # a table without results would be typed by hand
        return
    assert fill(readme, {BLOCK: markdown(json.loads(file.read_text(encoding="utf-8")))}) == readme
