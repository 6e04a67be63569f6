from __future__ import annotations

import pytest
import torch

from loracompose.composers.selection import Selection, top_one
from loracompose.composition.bank import gather_banks
from tests.composers.one_module import pool, tokens


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ([0.4, 0.3, 0.3], [1, 0, 0]),
        ([0.3, 0.3, 0.4], [0, 0, 1]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
        ([0.0, -0.2, -0.5], [0, 1, 0]),  # 0 is no member, however negative the members are
        ([0.5, 0.5, 0.0], [1, 0, 0]),  # the first of equals
        ([0.0, 0.0, 1e-30], [0, 0, 1]),
    ],
)
def test_the_largest_weight_other_than_0_wins_at_full_strength(row: list[float], want: list[int]):
    assert top_one(torch.tensor([row], dtype=torch.float64)).tolist() == [want]


def test_each_row_runs_its_own_winner_alone():
    adapters, x = pool(4, 2), tokens()
    weights = torch.tensor([[0.6, 0.4], [0.1, 0.2]], dtype=torch.float64)
    delta = Selection().compose(gather_banks(adapters), weights)["m"]
    for row, winner in enumerate(adapters):
        f = winner.factors["m"]
        assert torch.allclose(delta(x)[row], x[row] @ f.A.mT @ f.B.mT, atol=1e-12)
