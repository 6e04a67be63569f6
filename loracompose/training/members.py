"""Which adapters are members of each row while a router is trained, and with what weight."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracompose.prompts import user_text
from loracompose.retrieval.index import AdapterIndex
from loracompose.retrieval.retriever import Retriever
from loracompose.training.data import Example
from loracompose.training.router_recipe import RouterRecipe


@dataclass(frozen=True, eq=False)
class MemberTable:
    """The weights of all rows before anything is drawn.

    Attributes:
        recipe: what is drawn.
        own: the column of each row's own adapter, (N,) int64; -1 where the pool has none.
        weights: (N, K), rows of sum 1 or 0.
        hidden: (N, K), the weights of a row that must do without its own adapter.
    """

    recipe: RouterRecipe
    own: Tensor
    weights: Tensor
    hidden: Tensor

    @property
    def digest(self) -> str:
        """sha256 over the columns and weights: names and cards decide them, and no fingerprint of an adapter tells."""
        digest = hashlib.sha256()
        for tensor in (self.own, self.weights, self.hidden):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def draw(self, rows: Sequence[int], generator: torch.Generator, *, dropout: bool = True) -> Tensor:
        """The weights of a batch, (batch, K).

        The same numbers are taken from the generator whatever they decide, so that runs with one seed differ only in
        what their recipes say.

        Args:
            rows: places of the rows.
            generator: where chance comes from.
            dropout: whether adapters are dropped; not where a dev loss is measured.
        """
        places, recipe = torch.tensor(rows), self.recipe
        hide = torch.rand(len(rows), generator=generator) < recipe.hide_own  # (batch,)
        chance = torch.rand(len(rows), self.weights.shape[1], generator=generator)  # (batch, K)
        lots = torch.rand(chance.shape, generator=generator)  # (batch, K)
        weights = torch.where(hide[:, None], self.hidden[places], self.weights[places])
        if recipe.members == "random":
            weights = self._random(places, hide, lots)
        return drop_members(weights, chance, recipe.adapter_dropout, recipe.keep_one) if dropout else weights

    def _random(self, places: Tensor, hide: Tensor, lots: Tensor) -> Tensor:
        columns = torch.arange(lots.shape[1])
        own = self.own[places][:, None] == columns  # (batch, K)
        order = torch.where(own, torch.where(hide[:, None], -1.0, 2.0), lots)  # its own adapter first, or last
        top = order.topk(min(self.recipe.k, lots.shape[1]), dim=-1)
        member = torch.zeros_like(lots).scatter(-1, top.indices, (top.values >= 0).to(lots))
        return _normalised(member)


def drop_members(weights: Tensor, chance: Tensor, dropout: float, keep_one: bool) -> Tensor:
    """Drop the members whose chance is below `dropout`; those left share the row's sum in the old proportions.

    Args:
        weights: (batch, K), not negative.
        chance: (batch, K) in [0, 1).
        dropout: probability of being dropped.
        keep_one: where all members of a row would go, the one of the best chance stays.
    """
    member = weights > 0
    kept = member & (chance >= dropout)
    if keep_one:
        best = chance.masked_fill(~member, -1.0).argmax(dim=-1, keepdim=True)  # (batch, 1)
        last = torch.zeros_like(member).scatter(-1, best, True) & member
        kept = torch.where(kept.any(dim=-1, keepdim=True), kept, last)
    return _normalised(weights * kept) * weights.sum(dim=-1, keepdim=True)


def member_table(
    recipe: RouterRecipe,
    examples: Sequence[Example],
    names: Sequence[str],
    index: AdapterIndex | None,
    used: Sequence[int] | None = None,
) -> MemberTable:
    """The weights of every row.

    Args:
        recipe: says who is a member.
        examples: the N rows.
        names: of the K adapters, in the order of the columns.
        index: where the retrieved adapters are found.
        used: the rows that will be asked for; the others are not looked up in the index. None: all.

    Raises:
        ValueError: there is no index to retrieve from.
        LookupError: a row has no adapter of its own where it needs one, or the index finds one that is not in the pool.
    """
    place = {name: column for column, name in enumerate(names)}
    own = torch.tensor([place.get(example.task, -1) for example in examples])
    is_own = own[:, None] == torch.arange(len(names))  # (N, K)
    if recipe.members == "retrieved":
        rows = sorted(set(range(len(examples)) if used is None else used))
        shown, hidden = torch.zeros(is_own.shape), torch.zeros(is_own.shape)
        asked = [examples[row] for row in rows]
        if recipe.hide_own < 1:
            shown[rows] = _retrieved(recipe, asked, place, index, hide=False)
        if recipe.hide_own > 0:
            hidden[rows] = _retrieved(recipe, asked, place, index, hide=True)
    elif recipe.members == "own":
        _check_own(examples, place)
        shown, hidden = is_own.float(), torch.zeros(is_own.shape)
    else:
        shown, hidden = _normalised(torch.ones(is_own.shape)), _normalised((~is_own).float())
    return MemberTable(recipe, own, shown, hidden)


def _retrieved(
    recipe: RouterRecipe, examples: Sequence[Example], place: dict[str, int], index: AdapterIndex | None, hide: bool
) -> Tensor:
    if index is None:
        raise ValueError('members="retrieved" needs an index: give one as the adapters')
    exclude = [[e.task] if hide and e.task in place else [] for e in examples]
    found = Retriever(index, k=recipe.k).retrieve([user_text(e.prompt) for e in examples], exclude=exclude)
    if strangers := [name for name in found.names if name not in place]:
        raise LookupError(f"the index finds {', '.join(strangers)}, which the pool that is trained with does not have")
    weights = torch.zeros(len(examples), len(place))
    weights[:, [place[name] for name in found.names]] = found.weights
    return weights


def _check_own(examples: Sequence[Example], place: dict[str, int]) -> None:
    if missing := sorted({example.task for example in examples} - set(place)):
        raise LookupError(
            f'members="own" needs an adapter named as each task; the pool has none for {", ".join(missing)}, '
            f"it has {', '.join(place)}"
        )


def _normalised(weights: Tensor) -> Tensor:
    """Rows scaled to a sum of 1; rows of zeros stay."""
    total = weights.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(torch.finfo(weights.dtype).tiny), 0.0)
