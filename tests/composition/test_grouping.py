from __future__ import annotations

import torch

from loracompose.composition.bank import gather_banks
from loracompose.composition.grouping import group_modules
from tests.composers.pool import hostile_pool, random_adapter


def test_modules_are_stacked_when_widths_members_and_ranks_agree():
    groups = group_modules(gather_banks(hostile_pool()))
    assert sorted(group.modules for group in groups) == [("k",), ("o",), ("q",), ("v",)]
    alike = group_modules(gather_banks([random_adapter("a", 2, seed=1), random_adapter("b", 3, seed=2)]))
    assert sorted(group.modules for group in alike) == [("k", "o", "q"), ("v",)]


def test_modules_of_one_shape_adapted_by_different_adapters_stay_apart():
    pool = [random_adapter("a", 2, seed=1, modules=("q",)), random_adapter("b", 2, seed=2, modules=("k",))]
    assert {g.modules: g.members for g in group_modules(gather_banks(pool))} == {("q",): (0,), ("k",): (1,)}


def test_every_module_is_in_one_group_with_its_own_ranks():
    pool = hostile_pool()
    banks = gather_banks(pool)
    seen = {}
    for group in group_modules(banks):
        A, B = group.pooled()
        for i, module in enumerate(group.modules):
            seen[module] = (A[i], B[i], group.per_rank(torch.tensor([1.0, 2.0, 3.0])))
    assert set(seen) == set(banks)
    for module, bank in banks.items():
        A, B, weights = seen[module]
        assert torch.equal(A, bank.A)
        assert torch.equal(B, bank.B)
        assert torch.equal(weights, bank.owner + 1.0)


def test_a_split_group_has_the_same_modules_in_the_same_order():
    (group,) = (g for g in group_modules(gather_banks([random_adapter("a", 2, seed=1)])) if len(g.modules) == 3)
    parts = list(group.split(2))
    assert [part.modules for part in parts] == [("k", "o"), ("q",)]
    assert torch.equal(torch.cat([part.A[0] for part in parts]), group.A[0])


def test_mixed_precision_is_computed_wide_and_handed_back_wide():
    half = random_adapter("half", 2, seed=1, modules=("q",)).to(dtype=torch.bfloat16)
    single = random_adapter("single", 2, seed=2, modules=("q",)).to(dtype=torch.float32)
    (group,) = group_modules(gather_banks([half, single]))
    assert group.dtype == torch.float32
    (only_half,) = group_modules(gather_banks([half]))
    assert (only_half.working_dtype, only_half.dtype) == (torch.float32, torch.bfloat16)
