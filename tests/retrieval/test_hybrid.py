from __future__ import annotations

import numpy as np
import pytest

from loracompose.retrieval.hybrid import CHANNELS, fit_weights
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
    found = fit_weights([first, second], own)
    best = likelihood([first, second], own, found)
    for change in np.random.default_rng(0).normal(scale=0.2, size=(50, 2)):
        assert likelihood([first, second], own, np.array(found) + change) < best + 2e-3  # the prior moves it a little
    assert (found[0] > found[1]) == (strengths[0] > strengths[1])


def test_a_channel_that_misleads_gets_no_weight():
    (good, own), (bad, _) = channel(2.0, 1), channel(-1.0, 2)
    found = fit_weights([good, bad], own)
    assert found[0] > 0
    assert found[1] == 0


def test_weights_stay_finite_where_every_held_out_example_is_right():
    scores = 10.0 * np.eye(4)[np.arange(40) % 4]
    found = fit_weights([scores, scores], np.arange(40) % 4)
    assert all(0 < weight < 5 for weight in found)


def test_with_nothing_to_fit_all_channels_count_alike():
    assert fit_weights([np.zeros((0, 3)), np.zeros((0, 3))], np.zeros(0, dtype=np.int64)) == (1.0, 1.0)
    assert fit_weights([np.zeros((2, 1)), np.zeros((2, 1))], np.zeros(2, dtype=np.int64)) == (1.0, 1.0)
    assert len(CHANNELS) == 2
