from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from torch import Tensor, nn

from loracompose.adapters.lora import Adapter, LoraFactors
from loracompose.composers import compose
from loracompose.composers.arrow import Arrow, top_directions
from loracompose.composition.bank import gather_banks
from loracompose.composition.delta import LowRankDelta
from tests.composers.one_module import factors, pool, tokens


def composed(composer: Arrow, adapters: list[Adapter], weights: list[list[float]]) -> LowRankDelta:
    return composer.compose(gather_banks(adapters), torch.tensor(weights, dtype=torch.float64))["m"]


def by_hand(x: Tensor, adapters: list[Adapter], members: list[int], top_k: int, temperature: float) -> Tensor:
    """One token after another, from dense updates."""
    updates = [adapters[i].factors["m"].B @ adapters[i].factors["m"].A for i in members]
    y = x.new_zeros(*x.shape[:-1], updates[0].shape[0])
    for place in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        token = x[tuple(place)]
        logits = torch.stack([(torch.linalg.svd(U).Vh[0] @ token).abs() / temperature for U in updates])
        kept = logits.argsort(descending=True)[:top_k].tolist()
        for i, share in zip(kept, logits[kept].softmax(dim=0), strict=True):
            y[tuple(place)] += share * (updates[i] @ token)
    return y


@pytest.mark.parametrize("top_k", [1, 2, 3, 7])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_each_token_mixes_the_outputs_of_the_adapters_whose_top_directions_it_points_along(top_k, temperature):
    adapters, x = pool(4, 2, 1, 6), tokens()
    got = composed(Arrow(top_k, temperature), adapters, [[1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]])(x)
    assert torch.allclose(got[:1], by_hand(x[:1], adapters, [0, 1, 3], top_k, temperature), atol=1e-12)
    assert torch.allclose(got[1:], by_hand(x[1:], adapters, [1, 2], top_k, temperature), atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_it_equals_the_arrow_layer_of_peft(top_k: int):
    adapters, x = pool(1, 1, 1), tokens()  # rank 1, because PEFT approximates singular vectors of higher ranks
    names = [adapter.name for adapter in adapters]
    config = ArrowConfig(top_k=top_k, router_temperature=0.7)
    config.task_adapter_names, config.gks_adapter_names = names, []
    layer = ArrowLoraLinearLayer(12, config)
    A, B = ({a.name: linear(getattr(a.factors["m"], side)) for a in adapters} for side in "AB")
    layer.build_prototypes(A, B)
    want = layer(x, A, B, nn.Identity(), dict.fromkeys(names, 1.0))
    got = composed(Arrow(top_k, temperature=0.7), adapters, [[1.0, 1.0, 1.0]] * 2)(x)
    assert torch.allclose(got, want, atol=1e-5)  # PEFT finds its prototypes in float32


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def test_the_size_of_a_weight_does_not_enter():
    adapters, x = pool(4, 2), tokens()
    one, other = (composed(Arrow(), adapters, [row] * 2)(x) for row in ([0.9, 0.1], [-3.0, 1e-9]))
    assert torch.equal(one, other)


@pytest.mark.parametrize("top_k", [2, None])
def test_an_adapter_that_does_not_change_the_module_takes_no_share(top_k: int | None):
    x = tokens()
    plain, other = pool(3, 2)
    dead = Adapter("dead", {"m": LoraFactors(torch.randn(3, 12).double(), torch.zeros(9, 3).double())})
    elsewhere = Adapter("elsewhere", {"n": factors(2, 5)})
    want = composed(Arrow(top_k), [plain, other], [[1.0, 1.0]] * 2)(x)
    got = composed(Arrow(top_k), [dead, plain, elsewhere, other], [[1.0] * 4] * 2)(x)
    assert torch.allclose(got, want, atol=1e-14)
    assert torch.equal(composed(Arrow(), [dead, plain], [[1.0, 0.0]] * 2)(x), torch.zeros(2, 5, 9).double())


def test_the_x_of_an_embedding_is_the_one_hot_vector_of_the_token():
    tables = [LoraFactors(f.A, f.B, "embedding") for f in (factors(3, 1), factors(2, 2))]
    adapters = [Adapter(f"a{i}", {"m": table}) for i, table in enumerate(tables)]
    ids = torch.randint(0, 12, (2, 5), generator=torch.Generator().manual_seed(3))
    got = composed(Arrow(temperature=0.1), adapters, [[1.0, 1.0]] * 2)(ids)
    one_hot = torch.nn.functional.one_hot(ids, 12).double()
    assert torch.allclose(got, by_hand(one_hot, adapters, [0, 1], 2, 0.1), atol=1e-12)


def test_top_directions_are_unit_singular_vectors_and_zero_where_there_is_no_update():
    adapters = [*pool(4, 2), Adapter("elsewhere", {"n": factors(2, 5)})]
    V = top_directions(gather_banks(adapters))["m"]
    for i in range(2):
        f = adapters[i].factors["m"]
        truth = torch.linalg.svd(f.B @ f.A).Vh[0]
        assert (V[i] @ truth).abs().item() == pytest.approx(1.0, abs=1e-12)
    assert not V[2].any()


def test_it_cannot_be_merged():
    with pytest.raises(ValueError, match="gates the ranks by token"):
        compose(pool(2, 2), composer=Arrow())


@pytest.mark.parametrize("fields", [{"top_k": 0}, {"temperature": 0.0}, {"temperature": float("nan")}])
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must be"):
        Arrow(**fields)
