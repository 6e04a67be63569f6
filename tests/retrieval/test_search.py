from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loracompose import AdapterIndex
from loracompose.retrieval.embedding import INSTRUCTION, CallableEmbedder, features, representation, unit_vectors
from tests.retrieval.material import TASKS, bag_of_words, make_adapter

PROMPTS = ["translate the cat into french", "count the users with a query", "is it positive", "add six and two"]
WORDS = ["translate", "french", "query", "rows", "review", "positive", "add", "minus"]
WORDS += ["name", "the", "a", "of", "red", "house", "poem"]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Twelve adapters with tags, licences, bases and an extra key; read by every test here, changed by none."""
    root = tmp_path_factory.mktemp("search")
    rng = np.random.default_rng(0)
    for i in range(12):
        examples = [" ".join(rng.choice(WORDS, 5)) for _ in range(4)]
        card = {
            "tags": [["text"], ["text", "code"], []][i % 3],
            "license": ["mit", "apache-2.0"][i % 2],
            "language": ["fr", "de", ["fr", "de"]][i % 3],
        }
        make_adapter(root / "pool" / f"a{i:02}", examples, i, card=card, base_model=f"base-{i % 2}")
    with AdapterIndex.build(root / "pool", root / "index", embedder=CallableEmbedder(bag_of_words, "b")) as built:
        yield built


def brute_force(index, prompts, k, exclude, where):
    """For each prompt {name: score} of its best k, by numpy alone."""
    rows = {
        card.name: representation(features(index.embedder, card.examples, index.catalog.settings), card.name)
        for card in index.cards
        if where(card)
    }
    queries = unit_vectors(index.embedder, [INSTRUCTION + prompt for prompt in prompts])
    best = []
    for query, banned in zip(queries, exclude, strict=True):
        scores = {name: float(row @ query) for name, row in rows.items() if name not in (banned or ())}
        best.append(dict(sorted(scores.items(), key=lambda item: -item[1])[:k]))
    return best


names = st.sampled_from([f"a{i:02}" for i in range(12)])
filters = st.sampled_from(
    [
        (None, lambda card: True),
        ({"tags": "code"}, lambda card: "code" in card.tags),
        ({"tags": ["code", "text"], "license": "mit"}, lambda card: bool(card.tags) and card.license == "mit"),
        ({"base_model": {"base-1"}}, lambda card: card.base_model == "base-1"),
        ({"language": "fr"}, lambda card: "fr" in card.extra["language"]),
        ({"license": []}, lambda card: False),
        (lambda card: card.name > "a05", lambda card: card.name > "a05"),
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6), st.none() | st.sets(names)),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 14),
    filters,
)
def test_a_search_by_means_equals_brute_force_under_every_filter(index, asked, k, filtered):
    where, passes = filtered
    prompts = [" ".join(words) for words, _ in asked]
    exclude = [banned for _, banned in asked]
    found = index.search(prompts, k, exclude=exclude, where=where, scoring="mean")
    expected = brute_force(index, prompts, k, exclude, passes)
    order = [card.name for card in index.cards]
    temperature = index._current().temperature("mean")
    assert [order.index(name) for name in found.names] == sorted(order.index(name) for name in found.names)
    for i, best in enumerate(expected):
        matches = found.for_prompt(i)
        assert len(matches) == len(best)
        # Scores are compared, not names: of equal scores at the border either may be in.
        assert [match.score for match in matches] == pytest.approx(list(best.values()), abs=1e-5)
        full = brute_force(index, prompts[i : i + 1], 99, exclude[i : i + 1], passes)[0]
        for match in matches:
            assert match.score == pytest.approx(full[match.card.name], abs=1e-5)
        raw = [math.exp(match.score / temperature) for match in matches]
        assert [match.weight for match in matches] == pytest.approx([r / sum(raw) for r in raw], abs=1e-4)


def test_shapes_and_types_are_those_of_the_batch(index):
    found = index.search(PROMPTS, k=2)
    columns = len(found.cards)
    assert len(found) == 4
    assert 2 <= columns <= 8
    for tensor in (found.scores, found.weights):
        assert tensor.shape == (4, columns)
        assert tensor.dtype == torch.float32
    assert (torch.isfinite(found.scores).sum(-1) == 2).all()
    assert torch.isfinite(found.scores).any(0).all()
    assert torch.equal(found.weights > 0, torch.isfinite(found.scores))


def test_a_prompt_that_stands_twice_in_a_batch_is_found_twice_alike(index):
    found = index.search([PROMPTS[0], PROMPTS[1], PROMPTS[0]], exclude=[None, None, ["a00"]])
    again = index.search([PROMPTS[0]])
    assert found.for_prompt(0) == again.for_prompt(0)
    plain = index.search([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert plain.for_prompt(0) == plain.for_prompt(2)


def test_a_batch_finds_what_its_prompts_find_one_by_one(index):
    together = index.search(PROMPTS * 8, k=3)
    for i, prompt in enumerate(PROMPTS * 8):
        alone = index.search([prompt], k=3).for_prompt(0)
        assert [m.card.name for m in together.for_prompt(i)] == [m.card.name for m in alone]


def test_more_than_there_are_gives_all(index):
    found = index.search(PROMPTS, k=1000)
    assert found.names == tuple(card.name for card in index.cards)
    assert torch.isfinite(found.scores).all()


def test_excluding_everything_for_one_prompt_leaves_the_others(index):
    everything = [card.name for card in index.cards]
    found = index.search(PROMPTS[:2], k=3, exclude=[everything, None])
    assert found.for_prompt(0) == []
    assert len(found.for_prompt(1)) == 3
    assert found.weights[0].sum() == 0


def test_nothing_that_passes_is_an_empty_result(index):
    found = index.search(PROMPTS, where=lambda card: False)
    assert found.cards == ()
    assert found.scores.shape == found.weights.shape == (4, 0)
    assert found.for_prompt(3) == []


def test_equal_adapters_are_found_in_index_order(tmp_path, embedder):
    for name in ("b", "a", "c"):
        make_adapter(tmp_path / "pool" / name, TASKS["sql"])
    with AdapterIndex.build(tmp_path / "pool", tmp_path / "index", embedder=embedder) as index:
        for batch in (1, 3, 40):
            found = index.search(["count rows"] * batch, k=2)
            assert found.names == ("a", "b")
            assert [match.card.name for match in found.for_prompt(0)] == ["a", "b"]
        found = index.search(["count rows"] * 2, k=1, exclude=[["a", "b"], None])
        assert [found.for_prompt(i)[0].card.name for i in range(2)] == ["c", "a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": "one"}, "put a single prompt in a list"),
        ({"prompts": ["a", 3]}, "every prompt must be a string, got 3 of type int"),
        ({"prompts": [None]}, "every prompt must be a string, got None"),
        ({"k": 0}, "k must be an integer of at least 1, got 0"),
        ({"k": -1}, "got -1"),
        ({"k": 2.0}, "got 2.0"),
        ({"exclude": [None]}, "one entry a prompt, got 1 for 2 prompts"),
        ({"exclude": "a00"}, "one collection of names"),
        ({"exclude": ["a00", None]}, r"got the string 'a00'; use \['a00'\]"),
        ({"where": 3}, "must be a mapping or a callable"),
    ],
)
def test_what_cannot_be_asked_is_a_value_error(index, arguments, message):
    with pytest.raises(ValueError, match=message):
        index.search(**{"prompts": ["a", "b"], **arguments})


def test_unknown_names_and_keys_are_lookup_errors_that_list_what_exists(index):
    with pytest.raises(LookupError, match=r"exclude names 'zz', not in the index; it has \['a00', 'a01'"):
        index.search(["a"], exclude=[["a01", "zz"]])
    with pytest.raises(LookupError, match=r"where has \['tag'\], .* there are \[.*'language'.*'tags'"):
        index.search(["a"], where={"tag": "code"})


def test_scores_are_log_probabilities_and_weights_their_shares_of_the_retrieved(index):
    everything = index.search(PROMPTS, k=99)
    torch.testing.assert_close(everything.scores.exp().sum(-1), torch.ones(4))
    torch.testing.assert_close(everything.weights, everything.scores.exp())
    best = index.search(PROMPTS, k=2)
    shares = best.scores.exp() / best.scores.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(best.weights, shares)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.none() | st.sets(names), min_size=4, max_size=4), st.integers(1, 14), filters)
def test_a_search_takes_the_best_of_the_full_ranking_that_are_allowed(index, exclude, k, filtered):
    where, passes = filtered
    full = index.search(PROMPTS, k=99)
    found = index.search(PROMPTS, k, exclude=exclude, where=where)
    for i, banned in enumerate(exclude):
        allowed = [m for m in full.for_prompt(i) if passes(m.card) and m.card.name not in (banned or ())]
        assert [(m.card.name, m.score) for m in found.for_prompt(i)] == [(m.card.name, m.score) for m in allowed[:k]]


def test_an_unknown_scoring_is_refused_listing_what_exists(index, tmp_path):
    with pytest.raises(ValueError, match=r"scoring must be one of \['.*'mean'\], got 'cosine'"):
        index.search(PROMPTS, scoring="cosine")
    with pytest.raises(ValueError, match="got 'cosine'"):
        AdapterIndex.build(tmp_path, tmp_path / "index", embedder=index.embedder, scoring="cosine")


def test_the_scoring_of_the_build_is_stored_and_used(index, tmp_path):
    pool = index.folder.parent / "pool"
    with AdapterIndex.build(pool, tmp_path / "index", embedder=index.embedder, scoring="mean") as built:
        assert torch.equal(built.search(PROMPTS).scores, index.search(PROMPTS, scoring="mean").scores)
        assert built.temperature != index.temperature == 1.0
    with AdapterIndex.open(tmp_path / "index", embedder=index.embedder) as opened:
        assert opened.scoring == "mean"
