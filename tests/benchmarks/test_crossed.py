"""What is fitted on held-out examples: they are in no profile, and what is chosen suits them."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from loracompose.benchmarks.crossed import fitted_on, without_fourths
from loracompose.benchmarks.retrieval_data import RetrievalData
from loracompose.benchmarks.retrieval_scorings import embed, read_pool, score, split
from loracompose.retrieval.embedding import INSTRUCTION, CallableEmbedder
from loracompose.retrieval.fitting import fitted_hybrid
from loracompose.retrieval.tables import Settings
from loracompose.retrieval.weighting import log_softmax
from tests.retrieval.material import bag_of_words

SUBJECTS = ("dog", "cat", "house", "river", "stone", "cloud", "train", "bread")


@pytest.fixture(scope="module")
def held():
    """Eight examples of three adapters, two of each held out, and all features."""
    wordings = {"french": "say {} in french", "sums": "add up every {} here", "mood": "is the {} good or bad"}
    profiles = {name: tuple(wording.format(subject) for subject in SUBJECTS) for name, wording in wordings.items()}
    data = without_fourths(RetrievalData(profiles, (), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_)))
    settings = Settings("bag", "1", 64, INSTRUCTION)
    flat = [text for group in data.profiles.values() for text in group]
    made = embed([*flat, *data.prompts], settings, CallableEmbedder(bag_of_words, "bag", "1"))
    return data, made[: len(flat)], made[len(flat) :]


def test_every_fourth_example_is_asked_for_and_is_in_no_profile(held):
    data, _, _ = held
    assert [len(group) for group in data.profiles.values()] == [6, 6, 6]
    assert data.own.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.prompts[:2] == ("say river in french", "say bread in french")
    assert not set(data.prompts) & {text for group in data.profiles.values() for text in group}


def test_what_is_fitted_on_prompts_gives_them_a_better_likelihood_than_what_was_fitted_before(held):
    data, examples, prompts = held
    swapped = replace(data, own=data.own[::-1].copy())  # prompts whose adapters are not those that they resemble
    fitted = score(data, examples, prompts).fitted
    pool = read_pool(list(data.profiles.values()), split(data, examples))

    def likelihood(given):
        fits = fitted_hybrid(pool.spectra, pool.lexicon, pool.forms, given).fits(prompts, data.prompts)
        return log_softmax(fits)[np.arange(len(swapped.own)), swapped.own].mean()

    anew = fitted_on(fitted, swapped, examples, prompts)
    assert likelihood(anew) > likelihood(fitted) + 0.1
    changed = {field.name for field in fields(anew) if getattr(anew, field.name) != getattr(fitted, field.name)}
    assert changed >= {"spread", "weights"}
    assert not changed & {"mean_temperature", "calibration"}
