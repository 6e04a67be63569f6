from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loracompose.composition.delta import LowRankDelta
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
