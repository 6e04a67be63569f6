"""What a composer is, and the two ways to write one: weigh ranks as they are, or rewrite them row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from loracompose.composition.bank import RankBank, select_banks
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.router import Router, RouterAdapter

Scope = Literal["static", "prompt", "token"]
Factors = tuple[Tensor, Tensor]  # A (r, d_in), B (d_out, r)
Rewrite = Callable[[Mapping[str, RankBank], Tensor], Mapping[str, Factors]]


@runtime_checkable
class Composer(Protocol):
    """Turns the ranks of the retrieved adapters into what runs.

    A composer is a frozen dataclass: its fields are the hyper-parameters and its repr is the experiment record.

    Attributes:
        name: key in COMPOSERS.
        source: the paper, or "ours".
        scope: "static" if the multipliers depend on neither token nor hidden states: then the composition of
            one row is again a plain LoRA. "prompt": decided once per prompt. "token": per token.
        gauge_invariant: whether the result depends on B @ A only, not on the factorisation.
        exact: whether it is the weighted sum of the updates, up to its stated budget.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    scope: ClassVar[Scope]
    gauge_invariant: ClassVar[bool]
    exact: ClassVar[bool]

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> Mapping[str, LowRankDelta]:
        """Compose all modules at once.

        Args:
            banks: module path -> ranks of the K adapters; all banks list the same adapters in the same order.
            weights: (batch, K), any finite numbers; 0 means that the adapter is not a member of the row.

        Returns:
            Module path -> delta whose weights have `batch` rows. A row of zero weights gains nothing.
        """
        ...


@runtime_checkable
class RowComposer(Composer, Protocol):
    """A static composer that rewrites the ranks of one row at a time: what it makes of a set of adapters can be kept.

    As a key of what is kept it must be hashable, and equal to another only if both compose alike; so is a frozen
    dataclass.

    Attributes:
        row_wise: whether `compose` is `rewrite_rows` of `compose_row` at these settings.
    """

    @property
    def row_wise(self) -> bool:
        """Whether rows are rewritten one by one."""
        ...

    def compose_row(self, banks: Mapping[str, RankBank], weights: Tensor) -> Mapping[str, Factors]:
        """The new factors of every module for one row.

        Args:
            banks: module path -> ranks of the row's K' members.
            weights: (K',), none 0.
        """
        ...


@runtime_checkable
class CanonicalComposer(Composer, Protocol):
    """A composer of singular directions: every adapter is first rewritten by itself, which can be kept for any set.

    Attributes:
        canonical: whether `compose` is `compose_canonical` of `canonical_banks` at these settings.
    """

    @property
    def canonical(self) -> bool:
        """Whether it composes singular directions."""
        ...

    def compose_canonical(self, banks: Mapping[str, RankBank], weights: Tensor) -> Mapping[str, LowRankDelta]:
        """As `compose`, of banks whose ranks are singular directions already."""
        ...


@runtime_checkable
class LearnedComposer(Composer, Protocol):
    """A composer whose gates are learned: what it learned is its router, which training replaces step by step.

    Training runs `compose` on the bank of a pool with the parameters as the router's tensors, so the gates that are
    trained are those that run later. A method whose paper trains other gates than it runs has a class method
    `training(router)` beside these: the composer that training runs instead.

    Attributes:
        router: what it learned; of the composer's own method.
    """

    router: Router

    @classmethod
    def initial(cls, pool: Pool, seed: int, settings: Mapping[str, Any]) -> Router:
        """The router before the first step.

        Args:
            pool: the adapters and the base that it is trained with.
            seed: of what is drawn.
            settings: hyper-parameters by name; those left out have their default.

        Raises:
            ValueError: a setting is unknown or out of its range, or the pool does not fit the method.
        """
        ...

    @property
    def untrained(self) -> frozenset[str]:
        """Names of router tensors that gradients do not touch."""
        ...

    def auxiliary_loss(self, scratch: Mapping[str, Tensor]) -> Tensor | None:
        """What is added to the language model's loss, a scalar, from the live gates of this pass; None for nothing.

        Args:
            scratch: what the gates noted in `GateContext.scratch` during the pass.
        """
        ...

    def after_step(self, scratch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """New values of `untrained` tensors, from what the gates noted in the pass of the step just made."""
        ...


def keeps_factors(composer: Composer) -> bool:
    """Whether A and B of its deltas are the adapters' own, side by side, and no gate looks at them.

    Rounding them first then gives the same deltas, so that they need not be composed in a wider dtype than they run in.
    A composer says so by a class variable of this name; one that inherits from it has to say so anew.
    """
    return bool(vars(type(composer)).get("keeps_factors", False))


def router_of(composer: Composer) -> Router | None:
    """What a composer has learned; None if it learns nothing."""
    router = getattr(composer, "router", None)
    return router if isinstance(router, Router) else None


class GradientTrained:
    """A learned composer's defaults: gradients of the language model's loss are all that changes it."""

    @property
    def untrained(self) -> frozenset[str]:
        """Gradients reach every tensor."""
        return frozenset()

    def auxiliary_loss(self, scratch: Mapping[str, Tensor]) -> Tensor | None:
        """The language model's loss is all there is."""
        return None

    def after_step(self, scratch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Nothing changes but by gradients."""
        return {}


@dataclass(frozen=True, eq=False)
class Pool:
    """What a router is trained with.

    Attributes:
        base_model: name of the base model.
        hidden: width of the input of its layers.
        names: of the K adapters, in the order of the banks.
        banks: module path -> ranks of the K adapters, sorted by content.
    """

    base_model: str
    hidden: int
    names: tuple[str, ...]
    banks: Mapping[str, RankBank]

    @property
    def adapters(self) -> tuple[RouterAdapter, ...]:
        """The adapters as a router counts them."""
        prints = next(iter(self.banks.values())).fingerprints
        return tuple(RouterAdapter(print_, name) for print_, name in zip(prints, self.names, strict=True))


class RowWise:
    """What a composer that rewrites row by row has beside its `compose_row`."""

    row_wise: ClassVar[bool] = True


def rewrite_rows(banks: Mapping[str, RankBank], weights: Tensor, rewrite: Rewrite) -> dict[str, LowRankDelta]:
    """Deltas of a static composer that rewrites the ranks of one set of adapters.

    `rewrite(banks, w)` sees the members of one row only, K' adapters of weight w (K',) other than 0, and
    returns the new factors per module. Equal rows are composed once; nothing is kept between calls, see `recall`.
    """
    distinct, row_of = unique_rows(weights)
    composed: list[Mapping[str, Factors]] = []
    for row in distinct:
        members = row.nonzero().flatten().tolist()
        composed.append(rewrite(select_banks(banks, members), row[members]) if members else {})
    return side_by_side(banks, composed, row_of)


def unique_rows(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of weights (rows, K), and for each row of the batch its place among them, (batch,)."""
    distinct, row_of = torch.unique(weights, dim=0, return_inverse=True)
    return distinct, row_of


def side_by_side(
    banks: Mapping[str, RankBank], composed: Sequence[Mapping[str, Factors]], row_of: Tensor
) -> dict[str, LowRankDelta]:
    """One bank per module that holds the new ranks of all distinct rows; each row's weights switch on its own.

    The operator runs on the ranks of all distinct rows together.

    Args:
        banks: module path -> ranks that were rewritten.
        composed: the new factors per module, for each distinct row.
        row_of: place in `composed` of each row of the batch, (batch,).
    """
    deltas = {}
    switches: dict[tuple[object, ...], Tensor] = {}  # modules of equal ranks share one, as in `rank_weights`
    for module, bank in banks.items():
        pieces = [factors.get(module) for factors in composed]
        own = [piece for piece in pieces if piece is not None]
        if not own:
            continue
        A = torch.cat([A for A, _ in own])  # (R, d_in)
        B = torch.cat([B.mT for _, B in own]).mT  # (d_out, R), in memory rank after rank
        ranks = tuple(0 if piece is None else len(piece[0]) for piece in pieces)
        key = ranks, A.dtype, A.device
        if key not in switches:
            owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)).to(row_of.device)
            switches[key] = (row_of[:, None] == owner[None, :]).to(A)  # (batch, R)
        deltas[module] = LowRankDelta(A, B, switches[key], kind=bank.kind)
    return deltas
