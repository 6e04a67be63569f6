from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loracompose.adapters.lora import Adapter
from loracompose.composers import COMPOSERS, Composer, compose, get_composer
from loracompose.composers.base import Pool
from loracompose.composers.fusion import Fusion
from loracompose.composers.linear import Linear
from loracompose.composers.mixture import Mixture
from loracompose.composers.ties import Ties
from loracompose.composition.bank import content_order, gather_banks
from tests.composers.one_module import factors, pool
from tests.laws import ROWS

GATED = [name for name in COMPOSERS if COMPOSERS[name].scope != "static"]


def made(name: str, adapters: list[Adapter]) -> Composer:
    """The composer, one that learns with a router for these adapters as its training starts."""
    kind = COMPOSERS[name]
    if not hasattr(kind, "initial"):
        return kind()
    ordered = [adapters[i] for i in content_order(adapters)]
    start = kind.initial(Pool("base", 12, tuple(a.name for a in ordered), gather_banks(ordered)), 0, {})
    generator = torch.Generator().manual_seed(3)
    return kind(
        replace(start, tensors={n: torch.randn(t.shape, generator=generator) for n, t in start.tensors.items()})
    )


def update(adapter: Adapter, module: str = "m") -> torch.Tensor:
    return adapter.factors[module].B @ adapter.factors[module].A


def test_a_merged_mixture_is_the_weighted_sum_with_unused_ranks_left_out():
    adapters = pool(4, 2, 3)
    merged = compose(adapters, [0.5, 0.0, -0.2])
    assert merged.factors["m"].rank == 7
    assert torch.allclose(update(merged), 0.5 * update(adapters[0]) - 0.2 * update(adapters[2]))
    assert merged.recipe["relative_error"] < 1e-12


def test_no_weights_means_one_over_k_each():
    adapters = pool(4, 2)
    assert torch.allclose(update(compose(adapters)), (update(adapters[0]) + update(adapters[1])) / 2)


def test_the_recipe_names_method_parameters_sources_and_how_far_the_result_is_from_the_sum():
    adapters = pool(4, 2)
    recipe = compose(adapters, [0.7, 0.3], "fusion").recipe
    exact = 0.7 * update(adapters[0]) + 0.3 * update(adapters[1])
    off = update(compose(adapters, [0.7, 0.3], "fusion")) - exact
    assert recipe["method"] == "fusion"
    assert recipe["hyper_parameters"] == {}
    assert {(s["name"], s["fingerprint"], s["weight"]) for s in recipe["sources"]} == {
        (a.name, a.fingerprint, w) for a, w in zip(adapters, [0.7, 0.3], strict=True)
    }
    assert recipe["relative_error"] == pytest.approx((off.norm() / exact.norm()).item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_error_told_is_against_the_weights_given_not_against_them_rounded(dtype: torch.dtype):
    adapters, weights = [adapter.to(dtype=dtype) for adapter in pool(4, 2, 3)], [1 / 3, 1 / 3, 1 / 3]
    merged = compose(adapters, weights, "mixture")
    exact = sum(
        w * a.factors["m"].B.double() @ a.factors["m"].A.double() for w, a in zip(weights, adapters, strict=True)
    )
    off = merged.factors["m"].B.double() @ merged.factors["m"].A.double() - exact
    assert merged.recipe["relative_error"] == pytest.approx((off.norm() / exact.norm()).item(), rel=1e-6)


def test_base_model_and_task_are_kept_where_the_sources_agree():
    a, b = (Adapter(name, {"m": factors(2, s)}, "base", "CAUSAL_LM") for s, name in enumerate("ab"))
    assert (compose([a, b]).base_model, compose([a, b]).task_type) == ("base", "CAUSAL_LM")
    other = Adapter("c", {"m": factors(2, 3)}, "another base")
    assert (compose([a, other]).base_model, compose([a, other]).task_type) == ("", "CAUSAL_LM")


@pytest.mark.parametrize("name", GATED)
def test_a_gated_composer_refuses_to_merge_and_says_why(name: str):
    with pytest.raises(ValueError, match="multipliers depend on the input"):
        compose(pool(2, 2), composer=ROWS[name].settings[0])


@pytest.mark.parametrize("name", sorted(set(COMPOSERS) - set(GATED)))
def test_every_static_composer_merges_to_what_it_runs(name: str):
    adapters, weights = pool(4, 2), [0.7, 0.3]
    order = content_order(adapters)
    banks = gather_banks([adapters[i] for i in order])
    composer = made(name, adapters)
    delta = composer.compose(banks, torch.tensor([weights], dtype=torch.float64)[:, order])["m"]
    x = torch.randn(1, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(delta(x), x @ update(compose(adapters, weights, composer)).mT, atol=1e-10)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_must_be_one_finite_number_per_adapter(weights):
    with pytest.raises(ValueError, match="weight"):
        compose(pool(2, 2), weights)


def test_weights_by_name_are_refused_with_the_order_to_give_them_in():
    with pytest.raises(ValueError, match=r"sequence of 2 numbers in the order.*'a0', 'a1'"):
        compose(pool(2, 2), {"a0": 0.3, "a1": 0.7})


STATIC = sorted(set(COMPOSERS) - set(GATED))


def single(*ranks: int) -> list[Adapter]:
    return [adapter.to(dtype=torch.float32) for adapter in pool(*ranks)]


@pytest.mark.parametrize("name", [name for name in STATIC if name not in ("selection", "cat")])  # which apply no weight
def test_a_composition_that_overflows_names_the_module_and_the_largest_weight(name: str):
    with pytest.raises(ValueError, match=r"m: .* not finite in torch.float32; the largest weight is 1e\+39"):
        compose(single(4, 2), [1e39, 1.0], name)
    assert torch.isfinite(update(compose(single(4, 2), [1e3, 1.0], name))).all()


def test_the_module_named_is_the_one_that_overflows_also_where_a_decomposition_dies_of_it():
    quiet, loud = (Adapter(n, {m: factors(2, s).to(dtype=torch.float32)}) for s, (n, m) in enumerate(["am", "bn"]))
    for name in ("mixture", "linear"):
        composer = Linear(rank=1) if name == "linear" else name
        with pytest.raises(ValueError, match=r"^n: composed"):
            compose([quiet, loud], [1.0, 1e39], composer)


def test_a_composition_whose_composer_alone_overflows_is_refused():
    loud = [replace(a, factors={"m": replace(a.factors["m"], B=a.factors["m"].B * 1e19)}) for a in single(2, 2)]
    with pytest.raises(ValueError, match=r"m: composed by 'fusion' .* the largest weight is 1e\+25"):
        compose(loud, [1e25, 1e25], Fusion())
    with pytest.raises(ValueError, match=r"m: composed by 'ties' .* the largest weight is 1"):
        compose(single(2, 2), [1.0, 1.0], Ties(scale=1e300))


def test_nothing_to_merge_is_an_error():
    with pytest.raises(ValueError, match="nothing to merge"):
        compose(pool(2, 2), [0.0, 0.0])
    with pytest.raises(ValueError, match="at least one adapter is needed"):
        compose([])


def test_a_composer_is_a_known_name_or_an_instance():
    assert get_composer("mixture") == Mixture()
    with pytest.raises(LookupError, match="mixture"):
        get_composer("mixtur")
    with pytest.raises(TypeError, match="instance"):
        get_composer(Mixture)
