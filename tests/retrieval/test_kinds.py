"""An adapter of several kinds of prompt in an index, from its card to what a search finds and says."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from loracompose import AdapterIndex
from loracompose.cli.tables import explanation_json, explanation_table
from loracompose.retrieval.cards import Card
from loracompose.retrieval.centres import Centres
from loracompose.retrieval.embedding import features
from loracompose.retrieval.explanation import explain_candidates
from loracompose.retrieval.lexicon import Lexicon
from loracompose.retrieval.snapshot import take_snapshot
from tests.retrieval.material import PROMPTS, TASKS, assert_alike, contents, make_adapter
from tests.retrieval.scale.material import EMBEDDER, texts

KINDS = {"french": TASKS["french"], "sums": [*TASKS["sums"], "seven times three"]}
FLAT = [prompt for prompts in KINDS.values() for prompt in prompts]


def build(folder, embedder, cards, **options):
    """An index of adapters with these examples; it stays open."""
    for seed, (name, examples) in enumerate(cards.items()):
        make_adapter(folder / "pool" / name, (), seed, card={"examples": examples})
    return AdapterIndex.build(folder / "pool", folder / "index", embedder=embedder, **options)


@pytest.fixture
def index(tmp_path, embedder):
    """Two adapters of one kind and one of two."""
    with build(tmp_path, embedder, {"both": KINDS, "mood": TASKS["mood"], "sql": TASKS["sql"]}) as built:
        yield built


def table(found, names):
    """Probabilities of these adapters for each prompt, (batch, len(names))."""
    matches = [{match.card.name: match.score for match in found.for_prompt(row)} for row in range(len(PROMPTS))]
    return np.exp([[scores[name] for name in names] for scores in matches])


@pytest.mark.parametrize("scoring", ["hybrid", "discriminant"])
def test_the_posterior_is_that_of_kinds_as_cards_of_their_own_summed_with_their_shares(
    index, tmp_path, embedder, scoring
):
    cards = {"french": KINDS["french"], "sums": KINDS["sums"], "mood": TASKS["mood"], "sql": TASKS["sql"]}
    with build(tmp_path / "apart", embedder, cards) as apart:
        alone = table(apart.search(PROMPTS, k=4, scoring=scoring), ["french", "sums", "mood", "sql"])
    weighed = alone * [3 / 7, 4 / 7, 1, 1]
    joined = np.column_stack([weighed[:, :2].sum(axis=1), weighed[:, 2:]])
    found = table(index.search(PROMPTS, k=3, scoring=scoring), ["both", "mood", "sql"])
    np.testing.assert_allclose(found, joined / joined.sum(axis=1, keepdims=True), rtol=1e-5)


def test_means_are_of_all_examples_whatever_their_kinds(index, tmp_path, embedder):
    with build(tmp_path / "flat", embedder, {"both": FLAT, "mood": TASKS["mood"], "sql": TASKS["sql"]}) as flat:
        ours, theirs = (one.search(PROMPTS, k=3, scoring="mean") for one in (index, flat))
        assert ours.names == theirs.names
        assert ours.scores.tolist() == theirs.scores.tolist()
        assert ours.weights.tolist() == theirs.weights.tolist()
        assert ours.typicality.tolist() == theirs.typicality.tolist()


def test_a_single_kind_changes_nothing(tmp_path, embedder):
    with build(tmp_path / "list", embedder, TASKS) as plain:
        expected = contents(plain)
    with build(tmp_path / "named", embedder, {name: {"only": given} for name, given in TASKS.items()}) as named:
        assert contents(named) == expected
        snapshot, asked = named._snapshot, features(embedder, PROMPTS, named.catalog.settings)
        fits = snapshot.hybrid.fits(asked, PROMPTS)
        assert snapshot.fits("hybrid", asked, PROMPTS).tolist() == fits.tolist()


def test_adapters_of_unlike_kinds_are_found_better_by_their_kinds_than_by_one_centre(tmp_path):
    names = [f"a{adapter}" for adapter in range(6)]
    kinds = {name: {"x": texts(2 * place, 10), "y": texts(2 * place + 1, 10)} for place, name in enumerate(names)}
    known = {name: {kind: given[:8] for kind, given in of.items()} for name, of in kinds.items()}
    asked = [text for of in kinds.values() for given in of.values() for text in given[8:]]
    own = np.repeat(np.arange(6), 4)
    hits, likelihood = {}, {}
    for way, cards in {"one": {name: [*of["x"], *of["y"]] for name, of in known.items()}, "kinds": known}.items():
        with build(tmp_path / way, EMBEDDER, cards) as index:
            for scoring in ("hybrid", "discriminant"):
                scores = index.search(asked, k=6, scoring=scoring).scores.numpy()
                hits[way, scoring] = int((scores.argmax(axis=1) == own).sum())
                likelihood[way, scoring] = float(scores[np.arange(24), own].mean())
    assert hits["kinds", "discriminant"] > hits["one", "discriminant"] + 2
    assert hits["kinds", "hybrid"] == 24
    assert likelihood["kinds", "discriminant"] > likelihood["one", "discriminant"] + 0.3
    assert likelihood["kinds", "hybrid"] > likelihood["one", "hybrid"]


def test_kinds_go_through_the_catalog_a_snapshot_and_back(index, tmp_path, embedder):
    labels = ("french",) * 3 + ("sums",) * 4
    expected = contents(index)
    report = index.snapshot(tmp_path / "saved")
    for place in (index.folder, report.folder):
        with AdapterIndex.open(place, embedder=embedder) as opened:
            assert (opened.card("both").examples, opened.card("both").kinds) == (tuple(FLAT), labels)
            assert opened.card("sql").kinds == ()
            assert contents(opened) == expected
            assert opened.verify().ok
    assert AdapterIndex.restore(report.folder, tmp_path / "index").ok
    with AdapterIndex.open(tmp_path / "index", embedder=embedder) as restored:
        assert restored.card("both").kinds == labels
        restored.rebuild()
        assert restored.card("both").kinds == labels
        assert_alike(contents(restored), expected)


def test_a_card_whose_kinds_changed_is_found_and_an_update_mends_it(index, tmp_path):
    (tmp_path / "pool" / "both" / "card.json").write_text(
        json.dumps({**json.loads((tmp_path / "pool" / "both" / "card.json").read_text()), "examples": FLAT})
    )
    (problem,) = index.verify().problems
    assert (problem.adapter, problem.what) == ("both", "its card.json changed since it entered")
    index.update(tmp_path / "pool" / "both")
    assert index.verify().ok
    assert index.card("both").kinds == ()


def test_an_adapter_that_moved_is_found_by_its_kinds_too(index, tmp_path):
    card = json.loads((tmp_path / "pool" / "both" / "card.json").read_text())
    other = tmp_path / "other" / "both"
    shutil.move(tmp_path / "pool" / "both", other)
    (other / "card.json").write_text(json.dumps({**card, "examples": FLAT}))
    assert not index.repair(look_in=[tmp_path / "other"]).ok
    (other / "card.json").write_text(json.dumps(card))
    assert index.repair(look_in=[tmp_path / "other"]).ok


def test_what_comes_and_goes_with_kinds_leaves_what_a_rebuild_would_derive(index, tmp_path, embedder):
    late = tmp_path / "late"

    def search():
        return index.search(PROMPTS, k=9)

    search()
    index.add(make_adapter(late / "poem", (), 7, card={"examples": {"sea": ["rhyme on sea"], "moon": ["o", "moon?"]}}))
    search()
    index.update(make_adapter(late / "both", (), 8, card={"examples": {**KINDS, "ode": ["an ode", "write an ode"]}}))
    search()
    index.update(make_adapter(late / "mood", (), 9, card={"examples": {"a": ["is it good"], "b": ["mood of this"]}}))
    index.remove("poem")
    search()
    index.update(make_adapter(late / "both", FLAT, 8))
    index.add(late / "poem")
    found = search()
    changed, rebuilt = index._snapshot, take_snapshot(index.catalog, tmp_path / "elsewhere.faiss")
    assert changed.centres.kinds == ("", "a", "b", "", "sea", "moon")
    for mine, expected in zip(changed.statistics, rebuilt.statistics, strict=True):
        np.testing.assert_array_equal(mine.counts, expected.counts)
        np.testing.assert_allclose(mine.sums, expected.sums, atol=1e-5)
        np.testing.assert_allclose(mine.scatter, expected.scatter, atol=1e-5)
    for mine, expected in zip(changed.hybrid.lexicon.profiles, rebuilt.hybrid.lexicon.profiles, strict=True):
        assert [keys.tolist() for keys in mine] == [keys.tolist() for keys in expected]
    with AdapterIndex.open(index.folder, embedder=embedder) as other:
        assert_alike(contents(index), contents(other))
    assert found.names == index.search(PROMPTS, k=9).names


def test_an_explanation_names_the_kind_that_adds_most_and_shows_its_channels(index):
    for prompt, kind in (("translate the cat into french", "french"), ("what is six minus two", "sums")):
        explained, found = index.explain(prompt), index.search([prompt], k=3)
        best = explained.candidates[0]
        assert (best.card.name, best.kind) == ("both", kind)
        assert [other.kind for other in explained.candidates[1:]] == ["", ""]
        assert [c.score for c in explained.candidates] == pytest.approx(
            [match.score for match in found.for_prompt(0)], abs=1e-5
        )
        assert best.nearest[0].prompt in KINDS[kind]
        assert best.wordings
        assert all(any(text in example for example in KINDS[kind]) for text in best.wordings)
        snapshot = index._snapshot
        parts = snapshot.hybrid.channels(features(index.embedder, [prompt], index.catalog.settings), [prompt])
        column, other = snapshot.centres.kinds.index(kind), snapshot.centres.owner.tolist().index(1)
        rival = next(candidate for candidate in explained.candidates if candidate.card.name == "mood")
        for name, part in parts.items():
            assert best.channels[name] - rival.channels[name] == pytest.approx(part[0, column] - part[0, other])


@pytest.mark.parametrize("prompt", ["say seven", "what is french", "french times a house", "nothing of it"])
def test_an_explanation_is_as_typical_as_what_the_search_finds(index, prompt):
    assert index.explain(prompt).typicality == pytest.approx(float(index.search([prompt]).typicality[0]))


def test_what_decides_is_told_for_the_adapter_that_is_ahead_though_a_kind_of_another_fits_better():
    cards = (Card("one", examples=("a",)), Card("two", examples=("b", "c"), kinds=("x", "y")))
    explained = explain_candidates(
        "d",
        np.ones((1, 8), dtype=np.float32),
        cards=cards,
        examples=lambda row: np.ones((len(cards[row].examples), 8), dtype=np.float32),
        centres=Centres.of(cards),
        shares=np.array([[1.0, 0.0, 0.0], [0.5, 2.0, -9.0]]),  # 1.5 against log(e^2 / 2) = 1.3
        lexicon=Lexicon.of([("a",), ("b",), ("c",)]),
        typicality=1.0,
        k=2,
    )
    assert [(c.card.name, c.kind, c.decisive) for c in explained.candidates] == [
        ("one", "", "meaning"),
        ("two", "x", "meaning"),
    ]


def test_the_kind_stands_in_the_table_and_in_the_json(index):
    explained = index.explain("translate the cat into french")
    console = Console(width=200, record=True)
    console.print(explanation_table(explained))
    lines = console.export_text().splitlines()
    (row,) = (place for place, line in enumerate(lines) if line.startswith(" both "))
    assert lines[row + 1].startswith(" french ")
    assert [found["kind"] for found in explanation_json(explained)["found"]] == ["french", "", ""]


def test_a_large_pool_takes_all_examples_for_one_kind(tmp_path, embedder):
    others = {"mood": TASKS["mood"], "sql": TASKS["sql"]}
    found = []
    for name, examples in {"kinds": KINDS, "list": FLAT}.items():
        with build(tmp_path / name, embedder, {"both": examples, **others}, exact_limit=2) as index:
            found.append(contents(index))
            assert {candidate.kind for candidate in index.explain(PROMPTS[0]).candidates} == {""}
    assert found[0] == found[1]
