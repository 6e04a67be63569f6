from __future__ import annotations

import numpy as np
import pytest

from loracompose.retrieval.hybrid import CHANNELS, Queries, fit_weights
from loracompose.retrieval.weighting import log_softmax


def channel(strength, seed, queries=300, adapters=5):
    """Scores that tell the own adapter (query mod adapters) with this strength."""
    scores = np.random.default_rng(seed).normal(size=(queries, adapters))
    own = np.arange(queries) % adapters
    scores[np.arange(queries), own] += strength
    return scores, own


def likelihood(channels, own, weights):
    total = sum(weight * scores for weight, scores in zip(weights, channels, strict=True))
    return log_softmax(total)[np.arange(len(own)), own].mean()


@pytest.mark.parametrize("strengths", [(2.0, 1.0), (0.5, 1.5), (1.0, 0.1)])
def test_the_weights_have_the_best_likelihood(strengths):
    (first, own), (second, _) = channel(strengths[0], 1), channel(strengths[1], 2)
    found = fit_weights([Queries([first, second], own)])
    best = likelihood([first, second], own, found)
    for change in np.random.default_rng(0).normal(scale=0.2, size=(50, 2)):
        assert likelihood([first, second], own, np.array(found) + change) < best + 2e-3  # the prior moves it a little
    assert (found[0] > found[1]) == (strengths[0] > strengths[1])


def test_a_channel_that_misleads_gets_no_weight():
    (good, own), (bad, _) = channel(2.0, 1), channel(-1.0, 2)
    found = fit_weights([Queries([good, bad], own)])
    assert found[0] > 0
    assert found[1] == 0


def test_weights_stay_finite_where_every_held_out_example_is_right():
    scores = 10.0 * np.eye(4)[np.arange(40) % 4]
    found = fit_weights([Queries([scores, scores], np.arange(40) % 4)])
    assert all(0 < weight < 5 for weight in found)


def test_with_nothing_to_fit_all_channels_count_alike():
    assert fit_weights([Queries([np.zeros((0, 3))] * 2, np.zeros(0, dtype=np.int64))]) == (1.0, 1.0)
    assert fit_weights([Queries([np.zeros((2, 1))] * 3, np.zeros(2, dtype=np.int64))]) == (1.0, 1.0, 1.0)
    assert len(CHANNELS) == 4


def test_of_three_channels_one_that_misleads_does_not_silence_the_others():
    (first, own), (bad, _), (second, _) = channel(2.0, 1), channel(-1.0, 2), channel(1.0, 3)
    found = fit_weights([Queries([first, bad, second], own)])
    pair = fit_weights([Queries([first, second], own)])
    assert found[1] == 0
    assert (found[0], found[2]) == pytest.approx(pair)


def test_kinds_of_queries_count_by_their_weight():
    (first, own), (second, _) = channel(2.0, 1), channel(0.0, 2)
    other = Queries([second, first], own)  # there the second channel is the one that knows
    ratios = []
    for weight in (0.0, 0.1, 1.0):
        found = fit_weights([Queries([first, second], own), Queries(other.channels, own, weight)])
        ratios.append(found[1] / found[0])
    assert ratios[0] < ratios[1] < ratios[2]
    assert ratios[2] == pytest.approx(1)
