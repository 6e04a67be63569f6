from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from loracompose import Retriever
from loracompose.retrieval.weighting import softmax_weights

PROMPTS = ["translate the cat into french", "count the users with a query", "xylophone"]


def test_the_default_is_the_search_of_the_index(index):
    found, searched = Retriever(index).retrieve(PROMPTS), index.search(PROMPTS, k=3)
    assert found.cards == searched.cards
    assert torch.equal(found.scores, searched.scores)
    assert torch.equal(found.weights, searched.weights)
    assert torch.equal(found.weights, softmax_weights(found.scores, index.temperature))


def test_each_weighting_weighs_the_same_scores_its_own_way(index):
    searched = index.search(PROMPTS, k=2)
    uniform = Retriever(index, 2, weighting="uniform").retrieve(PROMPTS)
    top1 = Retriever(index, 2, weighting="top1").retrieve(PROMPTS)
    flat = Retriever(index, 2, weighting="softmax", temperature=1e6).retrieve(PROMPTS)
    assert all(torch.equal(found.scores, searched.scores) for found in (uniform, top1, flat))
    retrieved = torch.isfinite(searched.scores)
    assert torch.equal(uniform.weights, retrieved.float() / 2)
    torch.testing.assert_close(flat.weights, uniform.weights)
    assert torch.equal(top1.weights.argmax(-1), searched.scores.argmax(-1))
    assert torch.equal(top1.weights.sum(-1), torch.ones(3))


@pytest.mark.parametrize("weighting", ["posterior", "softmax", "uniform", "top1", "cautious"])
def test_abstaining_zeroes_weights_and_never_scores(index, weighting):
    plain = Retriever(index, weighting=weighting).retrieve(PROMPTS)
    best = plain.scores.amax(-1)
    assert len(best.unique()) == 3
    low, middle, high = best.argsort().tolist()
    threshold = float(best[middle])  # a score at the threshold is enough
    found = Retriever(index, weighting=weighting, abstain=threshold).retrieve(PROMPTS)
    assert torch.equal(found.scores, plain.scores)
    assert torch.equal(found.weights[[middle, high]], plain.weights[[middle, high]])
    assert plain.weights[low].sum() > 0
    assert (found.weights[low] == 0).all()


def test_exclude_and_where_reach_the_search(index):
    retriever = Retriever(index, 1, abstain=-100.0)
    assert retriever.retrieve(PROMPTS[:1], exclude=[["french"]]).names != ("french",)
    assert retriever.retrieve(PROMPTS[:1], where={"name": "sums"}).names == ("sums",)
    assert retriever.retrieve(PROMPTS, where={"license": "none"}).weights.shape == (3, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be an integer of at least 1, got 0"),
        ({"weighting": "best"}, r"one of \['posterior', 'softmax', 'uniform', 'top1', 'cautious'\], got 'best'"),
        ({"weighting": "softmax", "temperature": 0.0}, "above 0 and finite, got 0.0"),
        ({"weighting": "softmax", "temperature": float("nan")}, "above 0 and finite, got nan"),
        ({"weighting": "uniform", "temperature": 0.1}, "uses no temperature"),
        ({"weighting": "posterior", "temperature": 0.1}, "uses no temperature"),
        ({"abstain": float("inf")}, "abstain must be a finite score"),
        ({"abstain": "always"}, "abstain must be a finite score"),
        ({"abstain": "conformal", "alpha": 0.0}, "alpha must be between 0 and 1, got 0.0"),
        ({"scoring": "cosine"}, "scoring must be one of"),
    ],
)
def test_a_retriever_that_could_not_work_is_refused_when_made(index, arguments, message):
    with pytest.raises(ValueError, match=message):
        Retriever(index, **arguments)


def test_a_retriever_is_a_value(index):
    with pytest.raises(FrozenInstanceError):
        Retriever(index).k = 5
    assert Retriever(index) == Retriever(index, 3, weighting="posterior")


def test_the_scoring_of_a_retriever_goes_before_that_of_the_index(index):
    found = Retriever(index, scoring="mean").retrieve(PROMPTS)
    assert torch.equal(found.scores, index.search(PROMPTS, scoring="mean").scores)
    assert not torch.equal(found.scores, index.search(PROMPTS).scores)


@pytest.mark.parametrize("scoring", ["hybrid", "discriminant", "mean"])
def test_conformal_abstention_is_a_share_of_the_pools_own_held_out_examples(index, scoring):
    snapshot = index._current()
    known = snapshot.fitted.calibration[scoring]
    assert known == sorted(known)
    assert len(known) == 12  # the pool's examples, each held out
    p = snapshot.typicality(scoring, torch.tensor(known).double().numpy())
    for alpha in (0.1, 0.3, 0.5):
        assert (p <= alpha).mean() <= alpha


@pytest.mark.parametrize(("given", "temperature"), [(None, 4.0), (9.0, 9.0)])
def test_cautious_weights_are_flatter_where_a_prompt_is_not_typical_at_alpha(index, given, temperature):
    sharp = Retriever(index).retrieve(PROMPTS)
    flat = Retriever(index, weighting="softmax", temperature=temperature).retrieve(PROMPTS)
    alpha = float(sharp.typicality[2])
    usual = sharp.typicality > alpha
    assert usual.any()
    assert not usual[2]
    got = Retriever(index, weighting="cautious", alpha=alpha, temperature=given).retrieve(PROMPTS)
    torch.testing.assert_close(got.weights, torch.where(usual[:, None], sharp.weights, flat.weights))
    assert got.weights[2].amax() < sharp.weights[2].amax()


def test_conformal_abstention_follows_typicality_and_leaves_scores(index):
    plain = Retriever(index).retrieve(PROMPTS)
    assert plain.typicality[2] < plain.typicality[0]  # a word that nobody knows against a known template
    alpha = float(plain.typicality[2])
    found = Retriever(index, abstain="conformal", alpha=alpha).retrieve(PROMPTS)
    assert torch.equal(found.scores, plain.scores)
    assert (found.weights[2] == 0).all()
    assert torch.equal(found.weights[0], plain.weights[0])
    assert index.catalog.tombstones() == []
