from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext
from tests.runtime.toy import Recorder, random_delta

WEIGHTS = torch.tensor([[1.0, 0.0, 2.0, 0.0, -1.0], [0.0, 0.5, 0.0, 0.0, 0.0]], dtype=torch.float64)


def test_rows_are_repeated_one_after_another_as_generate_lays_out_beams():
    delta = random_delta(weights=WEIGHTS)
    assert torch.equal(delta.repeat(2).weights, WEIGHTS[[0, 0, 1, 1]])
    own = replace(delta, A=torch.stack([delta.A, 2 * delta.A]), B=torch.stack([delta.B, 3 * delta.B]))
    assert torch.equal(own.repeat(2).A, own.A[[0, 0, 1, 1]])
    assert torch.equal(own.repeat(2).B, own.B[[0, 0, 1, 1]])
    assert delta.repeat(1) is delta


@pytest.mark.parametrize("per_row", [False, True])
def test_an_embedding_looks_up_its_tokens(per_row: bool):
    delta = random_delta(weights=WEIGHTS, kind="embedding")
    if per_row:
        delta = replace(delta, A=torch.stack([delta.A, 2 * delta.A]), B=torch.stack([delta.B, delta.B]))
    ids = torch.tensor([[3, 0, 11], [5, 5, 1]])
    scale = torch.tensor([1.0, 2.0 if per_row else 1.0], dtype=torch.float64)
    A, B = (delta.A[0], delta.B[0]) if per_row else (delta.A, delta.B)
    want = torch.stack([scale[i] * (A[:, ids[i]].T * WEIGHTS[i]) @ B.T for i in range(2)])
    assert torch.allclose(delta(ids), want, atol=1e-13)


def test_a_gate_moves_with_its_delta():
    gate = Recorder()
    delta = replace(random_delta(weights=WEIGHTS), gate=gate).to(torch.device("cpu"), torch.float32)
    assert {delta.A.dtype, delta.B.dtype, delta.weights.dtype} == {torch.float32}
    assert gate.moved_to == [torch.float32]


@dataclass(frozen=True)
class Fixed:
    """A gate whose multipliers are given."""

    g: torch.Tensor

    needs_layer_input: ClassVar[bool] = False

    def to(self, device: torch.device, dtype: torch.dtype) -> Fixed:
        return self

    def __call__(self, x: torch.Tensor, h: torch.Tensor, w: torch.Tensor, context: GateContext) -> torch.Tensor:
        return self.g


def test_a_share_of_0_has_a_gradient_for_members_alone_and_no_rank_that_overflows_makes_it_nan():
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    g = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64)[:, None].requires_grad_()
    delta = replace(random_delta(ranks=3, weights=weights), gate=Fixed(g))
    delta.A[2] = torch.inf
    x = torch.rand(2, 1, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    got = delta(x)
    got.sum().backward()
    want = ((x @ delta.A.mT) * delta.B.sum(dim=0))[:, 0]  # (batch, R)
    assert torch.allclose(got[:, 0], (x @ delta.A[:1].mT)[:, 0] * g[:, 0, :1] @ delta.B[:, :1].mT)
    assert torch.allclose(g.grad[0, 0, :2], want[0, :2])
    assert torch.allclose(g.grad[1, 0, 0], want[1, 0])
    assert g.grad[0, 0, 2] == g.grad[1, 0, 1] == g.grad[1, 0, 2] == 0


@pytest.mark.parametrize(
    ("A", "B", "w"),
    [
        ((4, 12), (9, 5), (2, 5)),
        ((5, 12), (9, 4), (2, 5)),
        ((5, 12), (9, 5), (2, 4)),
        ((3, 5, 12), (3, 9, 5), (2, 5)),
        ((2, 5, 12), (9, 5), (2, 5)),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(A, B, w):
    with pytest.raises(ValueError, match="must be"):
        LowRankDelta(torch.zeros(A), torch.zeros(B), torch.zeros(w))
