"""The recipe: its schedule and its refusals."""

from __future__ import annotations

import pytest

from loracompose.training.recipe import Recipe


def test_the_rate_rises_over_the_warm_up_and_falls_along_half_a_cosine():
    recipe = Recipe(learning_rate=1.0, warmup=4)
    rates = [recipe.rate(step, 24) for step in range(24)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == pytest.approx(0.5)
    assert 0 < rates[23] < 0.01
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_other_schedules_fall_along_a_line_or_not_at_all():
    assert Recipe(learning_rate=1.0, warmup=0, schedule="linear").rate(15, 20) == pytest.approx(0.25)
    assert Recipe(learning_rate=1.0, warmup=0, schedule="constant").rate(19, 20) == 1.0


def test_alpha_is_twice_the_rank_unless_given():
    assert Recipe(rank=6).lora_alpha == 12
    assert Recipe(rank=6, alpha=3).lora_alpha == 3


@pytest.mark.parametrize(
    "field",
    [
        {"rank": 0},
        {"alpha": 0},
        {"batch_size": 0},
        {"max_length": 1},
        {"save_every": 0},
        {"warmup": -1},
        {"eval_every": -1},
        {"weight_decay": -0.1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"clip": float("inf")},
        {"epochs": 0},
        {"steps": 0},
        {"dropout": 1.0},
        {"schedule": "cubic"},
        {"target_modules": ()},
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Recipe(**field)
