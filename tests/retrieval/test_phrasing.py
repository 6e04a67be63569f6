from __future__ import annotations

import time

import numpy as np
import pytest

from loracompose.retrieval.discriminant import Discriminant, Spectrum, Statistics
from loracompose.retrieval.lexicon import Lexicon, ngram_keys, read_profile
from loracompose.retrieval.phrasing import (
    GROUPS,
    LINKED,
    View,
    _distances,
    held_out_scores,
    phrasing_folds,
    phrasings,
)

TEMPLATES = [
    "Translate to French: the {}",
    "How do you say {} in French?",
    "French for {} please",
    "{}\nPut it in French.",
]
WORDS = ["dog", "sea", "house", "moon", "tree"]
FRENCH = [template.format(word) for word in WORDS for template in TEMPLATES]
SUMS = [f"Add {word} to the list of sums" for word in WORDS]
ONE = ["Only this"]


def profiles():
    return [read_profile(group) for group in (FRENCH, SUMS, ONE)]


def test_examples_of_one_template_are_one_phrasing():
    found = phrasings(profiles()[0]).reshape(len(WORDS), len(TEMPLATES))
    assert (found == found[0]).all()
    assert sorted(found[0]) == list(range(GROUPS))


def test_of_many_examples_the_others_go_with_the_nearest_of_those_that_are_linked():
    many = [template.format(f"word{number}") for number in range(LINKED) for template in TEMPLATES]
    start = time.process_time()
    found = phrasings(read_profile(many)).reshape(LINKED, len(TEMPLATES))
    assert (found == found[0]).all()
    assert len(set(found[0])) == len(TEMPLATES)
    assert time.process_time() - start < 10  # comparing all with all took a minute


@pytest.mark.parametrize("count", [2, 3, 5, LINKED + 40])
def test_equal_examples_are_not_all_held_out_at_once(count):
    for fold in phrasing_folds([read_profile(["The very same words"] * count)]):
        assert len(fold.kept[0])


def test_distances_of_phrasings_are_those_of_the_sets_of_shared_ngrams():
    profile = profiles()[0]
    common = {key for i, keys in enumerate(profile) for key in keys if any(key in o for o in profile[:i])}
    sets = [set(keys.tolist()) & {int(key) for key in common} for keys in profile]
    expected = [[1 - len(one & other) / len(one | other) for other in sets] for one in sets]
    np.testing.assert_allclose(_distances(profile, np.arange(len(profile))), expected)


def test_every_example_is_held_out_once_but_the_only_one_of_an_adapter():
    folds = phrasing_folds(profiles())
    for adapter, count in ((0, len(FRENCH)), (1, len(SUMS)), (2, 0)):
        held = np.concatenate([fold.held[adapter] for fold in folds])
        assert sorted(held) == list(range(count))
    for fold in folds:
        for kept, held, profile in zip(fold.kept, fold.held, profiles(), strict=True):
            assert sorted([*kept, *held]) == list(range(len(profile)))
            assert len(kept)


def test_channels_score_what_is_held_out_from_what_is_kept_alone():
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=(len(texts), 3)).astype(np.float32) for texts in (FRENCH, SUMS, ONE)]
    seen = []

    def channel(kept, queries):
        seen.append((kept, queries))
        return np.array([[float(q @ group.mean(axis=0)) for group in kept] for q in queries])

    folds = phrasing_folds(profiles())
    (meaning, wording), own = held_out_scores(folds, profiles(), [View(groups, channel)])
    row = 0
    for fold in folds:
        for adapter, held in enumerate(fold.held):
            for place in held:
                kept = [group[part] for group, part in zip(groups, fold.kept, strict=True)]
                expected = [groups[adapter][place] @ group.mean(axis=0) for group in kept]
                np.testing.assert_allclose(meaning[row], expected, rtol=1e-5)
                texts = [[(FRENCH, SUMS, ONE)[k][i] for i in part] for k, part in enumerate(fold.kept)]
                text = (FRENCH, SUMS, ONE)[adapter][place]
                np.testing.assert_allclose(wording[row], Lexicon.of(texts).scores(ngram_keys(text)))
                assert own[row] == adapter
                row += 1
    assert row == len(own) == len(FRENCH) + len(SUMS)


def test_a_pool_of_single_examples_has_nothing_to_hold_out():
    single = [read_profile(ONE), read_profile(["Another"])]
    groups = [np.ones((1, 2), dtype=np.float32)] * 2
    (meaning, wording), own = held_out_scores(
        phrasing_folds(single), single, [View(groups, lambda kept, queries: None)]
    )
    assert meaning.shape == wording.shape == (0, 2)
    assert len(own) == 0


def test_the_discriminant_by_cholesky_is_that_by_eigenvectors():
    rng = np.random.default_rng(1)
    statistics = Statistics.of([rng.normal(size=(5, 6)).astype(np.float32) for _ in range(4)], 6)
    queries = rng.normal(size=(7, 6)).astype(np.float32)
    for shrinkage in (0.1, 0.7, 1.0):
        direct = Discriminant.directly(statistics, shrinkage, 2.0)
        np.testing.assert_allclose(
            direct.fits(queries), Discriminant.of(Spectrum.of(statistics), shrinkage, 2.0).fits(queries), rtol=1e-9
        )
