"""What gates share: a softmax over members that survives rows of nobody, and decisions made once."""

from __future__ import annotations

import pytest
import torch

from loracompose.composition.gates import masked_softmax, once

LOGITS = torch.tensor([[1.0, 2.0, 3.0], [0.5, 900.0, -2.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
MASK = torch.tensor([[True, False, True], [True, False, False], [False, False, False]])


def test_members_share_1_and_the_others_get_nothing_however_large_their_logits():
    shares = masked_softmax(LOGITS, MASK)
    first = torch.tensor([1.0, 3.0], dtype=torch.float64).softmax(dim=0)
    assert torch.allclose(shares[0], torch.tensor([first[0], 0, first[1]], dtype=torch.float64))
    assert shares[1].tolist() == [1, 0, 0]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_row_of_nobody_is_zero_and_no_nan_arises_on_the_way_back():
    logits = LOGITS.clone().requires_grad_()
    with torch.autograd.detect_anomaly():
        shares = masked_softmax(logits, MASK)
        (shares * torch.arange(3)).sum().backward()
    assert not shares[2].any()
    assert logits.grad is not None
    assert not logits.grad[2].any()
    assert torch.isfinite(logits.grad).all()


def test_a_decision_is_made_once():
    store: dict[str, torch.Tensor] = {}
    first = once(store, "key", lambda: torch.ones(1))
    assert once(store, "key", lambda: torch.zeros(1)) is first
