from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loracompose.composers import compose
from loracompose.composers.fusion import Fusion
from loracompose.composers.lorahub import LoraHub
from loracompose.composers.mixture import Mixture
from loracompose.composition.bank import gather_banks
from tests.composers.one_module import pool, tokens

ROWS = torch.tensor([[0.5, 0.3, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)


def fitted(adapters, *weights: float) -> dict[str, float]:
    return {adapter.fingerprint: weight for adapter, weight in zip(adapters, weights, strict=True)}


def test_without_fitted_weights_it_sums_factors_at_the_weights_of_the_row():
    banks, x = gather_banks(pool(4, 2, 3)), tokens()
    assert torch.equal(LoraHub().compose(banks, ROWS)["m"](x), Fusion().compose(banks, ROWS)["m"](x))


def test_the_exact_sum_is_the_mixture():
    banks, x = gather_banks(pool(4, 2, 3)), tokens()
    assert torch.equal(LoraHub(exact_sum=True).compose(banks, ROWS)["m"](x), Mixture().compose(banks, ROWS)["m"](x))


@pytest.mark.parametrize("exact_sum", [False, True])
def test_fitted_weights_replace_those_of_the_members_and_make_no_member(exact_sum: bool):
    adapters, x = pool(4, 2, 3), tokens()
    banks = gather_banks(adapters)
    got = LoraHub(fitted(adapters, -0.8, 1.2, 0.1), exact_sum).compose(banks, ROWS)["m"](x)
    rows = torch.tensor([[-0.8, 1.2, 0.0], [0.0, 1.2, 0.1]], dtype=torch.float64)
    want = LoraHub(None, exact_sum).compose(banks, rows)["m"](x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)  # rows stand in another order


@pytest.mark.parametrize("exact_sum", [False, True])
def test_adapters_of_one_content_share_its_fitted_weight(exact_sum: bool):
    adapters, x = pool(4, 2), tokens(batch=3)
    composer = LoraHub(fitted(adapters, 0.8, -1.2), exact_sum)
    copies = [adapters[0], adapters[1], replace(adapters[0], name="copy"), replace(adapters[0], name="again")]
    rows = torch.tensor([[0.5, 0.1, 0.5, 0.0], [0.2, 0.0, 0.3, 0.5], [0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    once = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    got = composer.compose(gather_banks(copies), rows)["m"](x)
    torch.testing.assert_close(got, composer.compose(gather_banks(adapters), once)["m"](x), rtol=0, atol=1e-12)


def test_a_member_without_fitted_weight_is_named():
    adapters = pool(4, 2, 3)
    composer = LoraHub(fitted(adapters[:2], 0.5, 0.5))
    composer.compose(gather_banks(adapters), ROWS[:1])  # the third is no member of this row
    with pytest.raises(LookupError, match=adapters[2].fingerprint[:12]):
        composer.compose(gather_banks(adapters), ROWS)


def test_fitted_weights_make_a_value_equal_and_hashable_whatever_their_order():
    learned = {"b": 1, "a": 0.5}
    composer = LoraHub(learned)
    assert composer.learned == (("a", 0.5), ("b", 1.0))
    assert hash(composer) == hash(LoraHub((("a", 0.5), ("b", 1.0))))
    learned["a"] = 9.0
    assert composer == LoraHub({"a": 0.5, "b": 1.0})


def test_its_recipe_holds_the_fitted_weights():
    adapters = pool(4, 2)
    composer = LoraHub(fitted(adapters, 0.9, -0.4), exact_sum=True)
    merged = compose(adapters, composer=composer)
    assert merged.recipe["hyper_parameters"]["learned"] == composer.learned
    want = sum(w * a.factors["m"].B @ a.factors["m"].A for w, a in zip([0.9, -0.4], adapters, strict=True))
    assert torch.allclose(merged.factors["m"].B @ merged.factors["m"].A, want)
