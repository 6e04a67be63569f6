from __future__ import annotations

import pytest
import torch

from loracompose.adapters.lora import Adapter, LoraFactors
from loracompose.composition.bank import RankBank, content_order, gather_banks, rank_weights, select_banks
from tests.composers.one_module import factors, pool


def with_hole() -> list[Adapter]:
    first, last = pool(4, 2)
    return [first, Adapter("elsewhere", {"n": factors(3, 9)}), last]


def test_ranks_lie_side_by_side_and_know_their_adapter():
    bank = gather_banks(with_hole())["m"]
    assert bank.owner.tolist() == [0, 0, 0, 0, 2, 2]
    assert bank.A.shape == (6, 12)
    assert bank.B.shape == (9, 6)
    assert torch.equal(bank.A[4:], with_hole()[2].factors["m"].A)
    assert torch.equal(bank.B[:, 4:], with_hole()[2].factors["m"].B)
    assert bank.n_adapters == 3


def test_weights_are_spread_over_the_ranks_of_their_adapter():
    bank = gather_banks(with_hole())["m"]
    spread = bank.per_rank(torch.tensor([[0.5, 7.0, -1.0], [0.0, 7.0, 2.0]]))
    assert spread.dtype == torch.float64
    assert spread.tolist() == [[0.5] * 4 + [-1.0] * 2, [0.0] * 4 + [2.0] * 2]
    for wrong in (torch.ones(1, 2), torch.ones(3)):
        with pytest.raises(ValueError, match=r"weights must be \(batch, 3\)"):
            bank.per_rank(wrong)


def test_modules_in_which_adapters_have_equal_ranks_share_their_weights_and_others_do_not():
    both = [Adapter(a.name, {"m": f, "n": f, "o": f}) for a in pool(4, 2) for f in a.factors.values()]
    banks = gather_banks([*both, Adapter("more", {"o": factors(1, 9)})])
    weights = torch.tensor([[0.5, -1.0, 2.0]])
    found = rank_weights(banks, weights)
    assert found["m"] is found["n"]
    assert all(torch.equal(found[module], bank.per_rank(weights)) for module, bank in banks.items())
    assert found["m"].shape != found["o"].shape


def test_B_lies_rank_after_rank_in_memory_as_the_operator_reads_it():
    assert gather_banks(with_hole())["m"].B.mT.is_contiguous()


def test_selecting_members_renumbers_them_and_drops_modules_that_none_has():
    banks = gather_banks(with_hole())
    some = select_banks(banks, [2, 0])
    assert set(some) == {"m"}
    assert some["m"].owner.tolist() == [0, 0, 1, 1, 1, 1]
    assert some["m"].fingerprints == (banks["m"].fingerprints[2], banks["m"].fingerprints[0])
    assert set(select_banks(banks, [1])) == {"n"}


def test_modules_are_sorted_and_hold_every_adapter():
    banks = gather_banks(with_hole())
    assert list(banks) == ["m", "n"]
    assert banks["m"].fingerprints == banks["n"].fingerprints == tuple(a.fingerprint for a in with_hole())


def test_a_module_that_no_adapter_has_and_adapters_of_two_bases_are_refused():
    with pytest.raises(LookupError, match=r"none of .*'a0'.* adapts 'q'"):
        RankBank.gather(pool(2), "q")
    other = Adapter("other", {"m": factors(2, 1, d_out=8)})
    with pytest.raises(ValueError, match="'other' has linear 12 -> 8"):
        gather_banks([*pool(2), other])
    table = Adapter("table", {"m": LoraFactors(*(getattr(factors(2, 1), side) for side in "AB"), "embedding")})
    with pytest.raises(ValueError, match="'table' has embedding 12 -> 9"):
        gather_banks([*pool(2), table])


def test_the_order_by_content_does_not_depend_on_names_or_positions():
    adapters = pool(4, 2, 3, 1)
    renamed = [Adapter(f"z{i}", a.factors) for i, a in enumerate(reversed(adapters))]
    assert [adapters[i].fingerprint for i in content_order(adapters)] == [
        renamed[i].fingerprint for i in content_order(renamed)
    ]
