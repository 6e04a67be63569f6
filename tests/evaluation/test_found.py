"""One search serves every k and every weighting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loracompose import AdapterIndex, Retriever
from loracompose.evaluation.found import Found, check_weighting, cosines_of
from loracompose.retrieval.embedding import CallableEmbedder
from tests.retrieval.material import PROMPTS, TASKS, bag_of_words, make_adapter


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    for seed, (name, examples) in enumerate(TASKS.items()):
        make_adapter(folder / "pool" / name, examples, seed)
    return AdapterIndex.build(folder / "pool", folder / "index", embedder=CallableEmbedder(bag_of_words, "bag", "1"))


def found(index, exclude=None):
    exclude = exclude or [frozenset()] * len(PROMPTS)
    best = index.search(PROMPTS, 4, exclude=exclude)
    return Found(best, cosines_of(index, PROMPTS, exclude, best), 0.0)


def by_name(names, weights):
    return [{n: w for n, w in zip(names, row, strict=True) if w} for row in weights.tolist()]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(("weighting", "temperature"), [("posterior", None), ("uniform", None), ("softmax", 3.0)])
def test_the_weights_of_the_k_best_are_those_of_a_search_for_k(index, k, weighting, temperature):
    shared = found(index)
    alone = Retriever(index, k=k, weighting=weighting, temperature=temperature).retrieve(PROMPTS)
    got = by_name(shared.best.names, shared.weights(k, weighting, temperature))
    for mine, theirs in zip(got, by_name(alone.names, alone.weights), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)


def test_lorauter_weighs_the_retrieved_by_a_softmax_of_cosines_at_a_fifth(index):
    shared = found(index)
    kept = torch.isfinite(shared.first(2).scores)
    for i, prompt in enumerate(PROMPTS):
        means = index.search([prompt], 4, scoring="mean")
        cosine = dict(zip(means.names, means.scores[0].tolist(), strict=True))
        mine = [name for name, keep in zip(shared.best.names, kept[i], strict=True) if keep]
        powers = {name: torch.tensor(cosine[name] / 0.2).exp().item() for name in mine}
        want = {name: power / sum(powers.values()) for name, power in powers.items()}
        got = by_name(shared.best.names, shared.weights(2, "lorauter", None)[i : i + 1])[0]
        assert got == pytest.approx(want, rel=1e-4)


def test_the_cautious_posterior_is_flat_only_where_a_prompt_is_not_typical(index):
    shared = found(index)
    typicality = torch.tensor([0.5, 0.05, 0.01, 0.06], dtype=torch.float64)
    shared = replace(shared, best=replace(shared.best, typicality=typicality))
    got, sharp, flat = (shared.weights(3, *way) for way in (("cautious", 9.0), ("posterior", None), ("softmax", 9.0)))
    assert not torch.allclose(sharp, flat, atol=0.05)
    torch.testing.assert_close(got, torch.stack([sharp[0], flat[1], flat[2], sharp[3]]))
    torch.testing.assert_close(shared.weights(3, "cautious", None)[1], shared.weights(3, "softmax", 4.0)[1])
    with pytest.raises(ValueError, match="how typical"):
        replace(shared, best=replace(shared.best, typicality=None)).weights(3, "cautious", None)


def test_places_count_from_1_and_an_excluded_adapter_has_none(index):
    own = ["french", "sql", "mood", "sums"]
    assert found(index).place(own) == [1, 1, 1, 1]
    assert found(index).top() == own
    masked = found(index, [{name} for name in own])
    assert masked.place(own) == [None] * 4
    assert not set(zip(masked.top(), own, strict=True)) & {(name, name) for name in own}
    assert found(index, [set(own)] * 4).top() == [None] * 4


@pytest.mark.parametrize(
    ("weighting", "temperature", "message"),
    [
        ("mean", None, "must be one of posterior"),
        ("softmax", None, "needs a temperature"),
        ("uniform", 0.2, "uses no temperature"),
        ("lorauter", 0.0, "above 0"),
    ],
)
def test_a_weighting_that_cannot_be_is_refused(weighting, temperature, message):
    with pytest.raises(ValueError, match=message):
        check_weighting(weighting, temperature)
