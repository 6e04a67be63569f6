"""Who is a member of a row in training: policies, weights, hidden owners and dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loracompose import AdapterIndex
from loracompose.retrieval.embedding import CallableEmbedder
from loracompose.training.data import Example
from loracompose.training.members import MemberTable, drop_members, member_table
from loracompose.training.router_recipe import RouterRecipe
from tests.engines import build_pool
from tests.retrieval.material import TASKS, bag_of_words

NAMES = ("b", "a", "c", "d")
ROWS = (Example("p", "r", "a"), Example("q", "r", "d"), Example("s", "r", "other"))


def table(**recipe: object) -> MemberTable:
    return member_table(RouterRecipe(**recipe), ROWS, NAMES, None)  # type: ignore[arg-type]


def draw(drawn: MemberTable, *rows: int, seed: int = 0, dropout: bool = True) -> Tensor:
    return drawn.draw(rows, torch.Generator().manual_seed(seed), dropout=dropout)


def draws(drawn: MemberTable, row: int, times: int = 400) -> Tensor:
    return torch.cat([draw(drawn, row, seed=seed) for seed in range(times)])


def test_all_share_the_weight_equally():
    assert torch.equal(draw(table(members="all"), 0, 2), torch.full((2, 4), 0.25))


def test_without_its_own_the_others_share_it_and_a_row_that_has_none_loses_nobody():
    hidden = draw(table(members="all", hide_own=1.0), 0, 1, 2)
    third = 1 / 3
    assert torch.allclose(hidden, torch.tensor([[third, 0, third, third], [third, third, third, 0], [0.25] * 4]))


def test_own_is_the_adapter_named_as_the_task():
    own = member_table(RouterRecipe(members="own"), ROWS[:2], NAMES, None)
    assert draw(own, 0, 1).tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    with pytest.raises(LookupError, match="the pool has none for other, it has b, a, c, d"):
        table(members="own")


def test_random_is_its_own_and_others_drawn_anew():
    found = draws(table(members="random", k=2), 0)
    assert torch.equal(found[:, 1], torch.full((400,), 0.5))
    assert ((found > 0).sum(dim=1) == 2).all()
    assert ((found > 0).float().mean(dim=0)[[0, 2, 3]] - 1 / 3).abs().max() < 0.08
    strangers = draws(table(members="random", k=2, hide_own=1.0), 0)
    assert not strangers[:, 1].any()
    assert ((strangers > 0).sum(dim=1) == 2).all()
    assert ((draws(table(members="random", k=9, hide_own=1.0), 0) > 0).sum(dim=1) == 3).all()


def test_hiding_happens_as_often_as_asked():
    found = draws(table(members="random", k=2, hide_own=0.3), 0)
    assert (found[:, 1] == 0).float().mean().item() == pytest.approx(0.3, abs=0.07)


def test_dropout_drops_as_often_as_asked_and_keeps_proportions_and_sum():
    weights = torch.tensor([[0.6, 0.3, 0.1, 0.0]]).expand(2000, 4)
    chance = torch.rand(2000, 4, generator=torch.Generator().manual_seed(1))
    found = drop_members(weights, chance, 0.4, keep_one=False)
    kept = chance >= 0.4
    assert ((found > 0) == (kept & (weights > 0))).all()
    sums = found.sum(dim=1)
    assert torch.allclose(sums[sums > 0], torch.ones(1))
    both = kept[:, 0] & kept[:, 1]
    assert torch.allclose(found[both, 0], 2 * found[both, 1])
    nobody = (~kept[:, :3]).all(dim=1)
    assert nobody.any()
    assert torch.equal(found[nobody], torch.zeros(int(nobody.sum()), 4))


def test_where_all_would_go_one_member_stays_if_asked():
    weights = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 0.0]])
    chance = torch.tensor([[0.9, 0.1, 0.2], [0.9, 0.1, 0.2]])
    assert drop_members(weights, chance, 1.0, keep_one=True).tolist() == [[0, 0, 1], [0, 0, 0]]
    assert not drop_members(weights, chance, 1.0, keep_one=False).any()


def test_a_dev_loss_drops_nobody():
    assert torch.equal(draw(table(adapter_dropout=1.0), 0, dropout=False), torch.full((1, 4), 0.25))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    embedder = CallableEmbedder(bag_of_words, "bag-of-words", "1")
    with AdapterIndex.build(build_pool(folder / "pool"), folder / "index", embedder=embedder) as built:
        yield built


def test_retrieved_members_are_what_the_engine_would_find_with_its_weights(index):
    names, examples = tuple(card.name for card in index.cards), [Example(p[0], "r", t) for t, p in TASKS.items()]
    found = member_table(RouterRecipe(members="retrieved", k=2), examples, names, index).weights
    want = index.search([e.prompt for e in examples], 2)
    for row in range(len(examples)):
        weights = {match.card.name: match.weight for match in want.for_prompt(row)}
        assert {names[i]: found[row, i].item() for i in found[row].nonzero().flatten()} == pytest.approx(
            {name: weight for name, weight in weights.items() if weight}
        )


def test_a_hidden_adapter_makes_room_for_the_next_best(index):
    names, examples = tuple(card.name for card in index.cards), [Example(p[0], "r", t) for t, p in TASKS.items()]
    found = member_table(RouterRecipe(members="retrieved", k=4, hide_own=0.5), examples, names, index)
    own = torch.tensor([names.index(example.task) for example in examples])
    rows = torch.arange(len(examples))
    assert (found.weights[rows, own] > 0).all()
    assert not found.hidden[rows, own].any()
    assert torch.allclose(found.hidden.sum(dim=1), torch.ones(len(examples)))


def test_an_adapter_of_the_index_that_the_pool_lacks_is_named(index):
    names = tuple(card.name for card in index.cards)[1:]
    with pytest.raises(LookupError, match="which the pool that is trained with does not have"):
        member_table(RouterRecipe(members="retrieved", k=4), [Example("x", "r", "")], names, index)


def test_only_the_rows_that_are_used_are_looked_up(index, monkeypatch):
    names, examples = tuple(card.name for card in index.cards), [Example(p[0], "r", t) for t, p in TASKS.items()]
    whole = member_table(RouterRecipe(members="retrieved", k=2, hide_own=0.5), examples, names, index)
    asked: list[str] = []
    search = index.search
    monkeypatch.setattr(index, "search", lambda prompts, *a, **k: asked.extend(prompts) or search(prompts, *a, **k))
    some = member_table(RouterRecipe(members="retrieved", k=2, hide_own=0.5), examples, names, index, used=[2, 0, 2])
    assert asked == [examples[0].prompt, examples[2].prompt] * 2
    assert torch.equal(some.weights[[0, 2]], whole.weights[[0, 2]])
    assert torch.equal(some.hidden[[0, 2]], whole.hidden[[0, 2]])
    assert not some.weights[[1, 3]].any()
