from __future__ import annotations

import numpy as np
import pytest

from loracompose.retrieval.cards import Card
from loracompose.retrieval.centres import Centres
from loracompose.retrieval.discriminant import own_columns
from loracompose.retrieval.fitting import HeldOut, choose
from loracompose.retrieval.hybrid import Queries
from loracompose.retrieval.weighting import fit_temperature

CARDS = (
    Card("one", examples=("a", "b")),
    Card("two", examples=("c", "d", "e", "f"), kinds=("x", "x", "x", "y")),
    Card("also one", examples=("g",), kinds=("z",)),
    Card("three", examples=("h", "i", "j"), kinds=("y", "x", "z")),
)


def fits(rows=5, columns=7):
    return np.random.default_rng(0).normal(scale=4.0, size=(rows, columns))


def test_each_kind_of_a_card_is_a_centre_with_its_share_of_the_examples():
    centres = Centres.of(CARDS)
    assert centres.owner.tolist() == [0, 1, 1, 2, 3, 3, 3]
    assert centres.share.tolist() == pytest.approx([1, 0.75, 0.25, 1, 1 / 3, 1 / 3, 1 / 3])
    assert centres.kinds == ("", "x", "y", "", "y", "x", "z")
    texts = [("a", "b"), ("c", "d", "e"), ("f",), ("g",), ("h",), ("i",), ("j",)]
    assert centres.split([card.examples for card in CARDS]) == texts


def test_the_posterior_of_an_adapter_is_the_sum_over_its_kinds_weighed_by_their_shares():
    centres, given = Centres.of(CARDS), fits()
    expected = np.zeros((5, 4))
    for column, (owner, share) in enumerate(zip(centres.owner, centres.share, strict=True)):
        expected[:, owner] += share * np.exp(given[:, column])
    np.testing.assert_allclose(centres.joined(given), np.log(expected), rtol=1e-12)
    np.testing.assert_allclose(centres.joined(given - 5000), np.log(expected) - 5000, rtol=1e-12)  # exp of it is 0
    assert centres.joined(given[:0]).shape == (0, 4)


def test_an_adapter_of_one_kind_beside_others_keeps_its_fit():
    given = fits()
    assert Centres.of(CARDS).joined(given)[:, [0, 2]].tolist() == given[:, [0, 3]].tolist()


@pytest.mark.parametrize("centres", [Centres.of(CARDS[::2]), Centres.one_each(2)], ids=["of cards", "one each"])
def test_where_every_adapter_has_one_kind_nothing_is_computed(centres):
    given, groups = fits(columns=2), [np.zeros((2, 3)), np.zeros((1, 3))]
    assert centres.joined(given) is given
    assert all(part is group for part, group in zip(centres.split(groups), groups, strict=True))
    assert centres.best(given[0]).tolist() == [0, 1]


def test_a_pool_without_adapters_has_no_centres():
    for centres in (Centres.of(()), Centres.one_each(0)):
        assert centres.split([]) == []
        assert centres.joined(np.zeros((2, 0))).shape == (2, 0)
        assert centres.best(np.zeros(0)).tolist() == []


def test_the_best_kind_is_the_one_that_adds_most_and_the_first_of_equals():
    centres = Centres.of(CARDS)
    assert centres.best(np.array([0.0, 0, 1, 0, 5, 5, 4])).tolist() == [0, 1, 3, 4]  # 0.75 is more than e / 4
    assert centres.best(np.array([0.0, 0, 2, 0, 1, 2, 3])).tolist() == [0, 2, 3, 6]


def test_typicality_is_told_on_the_scale_of_adapters_and_means_are_of_whole_adapters():
    random = np.random.default_rng(1)
    centres = Centres.of(CARDS)
    groups = [random.normal(size=(len(card.examples), 4 * 8)).astype(np.float32) for card in CARDS]
    means = random.normal(size=(4, 8)).astype(np.float32)
    own = own_columns(centres.split(groups), range(7))  # of the kinds with more than one example
    channels = [random.normal(size=(len(own), 7)) for _ in range(4)]
    held = HeldOut(range(7), Queries(channels, own), Queries(channels, own, 0.1), [(0.5, 2.0)] * 3)
    found = choose(means, groups, held, centres)
    total = sum(weight * part for weight, part in zip(found.weights, channels, strict=True))
    for scoring, scores in {"hybrid": total, "discriminant": channels[0]}.items():
        expected = np.sort(centres.joined(scores).max(axis=1))
        np.testing.assert_allclose(found.calibration[scoring], expected)
    assert len(found.calibration["mean"]) == 9  # the examples of adapters with more than one, whatever their kinds
    assert found.mean_temperature == fit_temperature(means, [group[:, 8:16] for group in groups], range(4))


@pytest.mark.parametrize(
    "kinds",
    [("x", "y"), ("x", "y", "x"), ("x", "y", "z", "z")],
    ids=["too few", "apart", "too many"],
)
def test_kinds_that_are_not_one_for_each_example_side_by_side_are_refused(kinds):
    with pytest.raises(ValueError, match=r"^bad: kinds must name the kind of each of its 3 examples.*update\(folder\)"):
        Centres.of([CARDS[0], Card("bad", examples=("a", "b", "c"), kinds=kinds)])
