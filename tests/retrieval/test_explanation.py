from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from rich.console import Console

from loracompose import AdapterIndex
from loracompose.cli.tables import explanation_json, explanation_table
from loracompose.retrieval.hybrid import CHANNELS
from tests.retrieval.material import PROMPTS, TASKS, make_adapter


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_explanation_is_of_what_the_search_finds(index, prompt):
    found, explained = index.search([prompt], k=3), index.explain(prompt, k=3)
    matches = found.for_prompt(0)
    assert [c.card for c in explained.candidates] == [m.card for m in matches]
    assert [c.score for c in explained.candidates] == pytest.approx([m.score for m in matches], abs=1e-5)
    assert explained.typicality == pytest.approx(float(found.typicality[0]))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_differences_of_scores_are_differences_of_the_channels(index, prompt):
    first, *others = index.explain(prompt, k=4).candidates
    assert sum(c.probability for c in (first, *others)) == pytest.approx(1)
    for other in others:
        gaps = {name: first.channels[name] - other.channels[name] for name in CHANNELS}
        assert sum(gaps.values()) == pytest.approx(first.score - other.score)
        assert other.decisive == max(gaps, key=gaps.get)
    assert first.decisive == others[0].decisive


def test_nearest_examples_and_wordings_are_those_of_the_adapter_and_the_prompt(index):
    best = index.explain("translate the cat into french", k=1).candidates[0]
    assert best.card.name == "french"
    assert best.nearest[0].prompt == "translate the dog into french"
    assert best.nearest[0].similarity > best.nearest[1].similarity
    assert "into french" in best.wordings
    for text in best.wordings:
        assert any(text in example for example in TASKS["french"])


def test_an_adapter_alone_has_nothing_that_decides(tmp_path, embedder):
    make_adapter(tmp_path / "pool" / "sql", TASKS["sql"])
    with AdapterIndex.build(tmp_path / "pool", tmp_path / "index", embedder=embedder) as index:
        (only,) = index.explain("count", k=3).candidates
        assert (only.decisive, only.probability) == ("", 1.0)
        index.remove("sql")
        assert index.explain("count").candidates == ()


def test_an_explanation_is_a_value_and_refuses_what_a_search_refuses(index):
    with pytest.raises(FrozenInstanceError):
        index.explain("a").typicality = 1.0
    with pytest.raises(ValueError, match="k must be an integer"):
        index.explain("a", k=0)
    with pytest.raises(ValueError, match="every prompt must be a string"):
        index.explain(3)


def test_the_table_shows_every_candidate_and_survives_markup(index):
    explained = index.explain("translate [bold]the cat[/] into\nfrench", k=4)
    console = Console(width=200, record=True)
    console.print(explanation_table(explained))
    text = console.export_text()
    assert all(name in text for name in (*TASKS, *CHANNELS, "[bold]the cat[/]", "translate the dog into french"))
    assert [found["name"] for found in explanation_json(explained)["found"]] == [
        c.card.name for c in explained.candidates
    ]
