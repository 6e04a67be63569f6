from __future__ import annotations

import pytest
import torch

from loracompose.composition.pooling import POOLERS, pool_attention

TOKENS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
QUERY = torch.linspace(-1, 1, 4, dtype=torch.float64)


def attention(tokens, mask):
    return pool_attention(tokens, mask, QUERY)


ALL = {**POOLERS, "attention": attention}
BY_HAND = {
    "mean": lambda rows: torch.stack([row.sum(dim=0) / len(row) for row in rows]),
    "max": lambda rows: torch.stack([row.max(dim=0).values for row in rows]),
    "last": lambda rows: torch.stack([row[-1] for row in rows]),
    "attention": lambda rows: torch.stack([(row @ QUERY).softmax(dim=0) @ row for row in rows]),
}


@pytest.mark.parametrize("name", ALL)
def test_a_row_is_pooled_over_the_tokens_of_its_mask_alone(name):
    want = BY_HAND[name]([TOKENS[i, MASK[i]] for i in range(3)])
    assert torch.allclose(ALL[name](TOKENS, MASK), want, atol=1e-14)
    hostile = TOKENS.masked_fill(~MASK[..., None], torch.inf)  # what is masked may be anything
    if name != "attention":
        assert torch.allclose(ALL[name](hostile, MASK), want, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_without_a_mask_all_tokens_count(name):
    assert torch.allclose(ALL[name](TOKENS, None), ALL[name](TOKENS, torch.ones_like(MASK)), atol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_a_row_without_tokens_is_zero_and_its_gradient_finite(name):
    tokens = TOKENS.clone().requires_grad_()
    pooled = ALL[name](tokens, MASK & torch.tensor([[True], [False], [True]]))
    assert not pooled[1].any()
    pooled.sum().backward()
    assert torch.isfinite(tokens.grad).all()
    assert not tokens.grad[1].any()
