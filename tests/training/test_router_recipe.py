from __future__ import annotations

import pytest

from loracompose.training.recipe import Recipe
from loracompose.training.router_recipe import RouterRecipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("clip", -1.0),
        ("hide_own", 1.1),
        ("adapter_dropout", -0.1),
        ("per_task", 0),
        ("dev_per_task", 0),
        ("k", 0),
        ("patience", -1),
        ("auxiliary", -1.0),
        ("auxiliary", float("nan")),
        ("members", "some"),
        ("schedule", "step"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(field: str, value: object):
    with pytest.raises(ValueError, match=field):
        RouterRecipe(**{field: value})  # type: ignore[arg-type]


def test_what_would_have_no_effect_is_refused():
    with pytest.raises(ValueError, match="leaves a row nothing"):
        RouterRecipe(members="own", hide_own=0.5)
    with pytest.raises(ValueError, match="set eval_every"):
        RouterRecipe(patience=2)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_goes_as_that_of_an_adapter(schedule):
    given = {"learning_rate": 0.1, "warmup": 3, "schedule": schedule}
    assert [RouterRecipe(**given).rate(i, 9) for i in range(9)] == [Recipe(**given).rate(i, 9) for i in range(9)]
