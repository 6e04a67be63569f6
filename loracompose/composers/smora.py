"""SMoRA: every rank is an expert, and a learned router says which of them act on a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from loracompose.composers.base import GradientTrained, Pool, Scope
from loracompose.composers.router_lora import (
    Elsewhere,
    check_elsewhere,
    draw_pairs,
    find_pair,
)
from loracompose.composers.smora_gates import LOAD, BlockGate, PoolGate
from loracompose.composition.bank import RankBank
from loracompose.composition.canonical import canonical_banks
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.router import Router
from loracompose.composition.settings import check_count, check_router, filled, is_finite

Form = Literal["pool", "adapter"]
FORMS: Mapping[str, Mapping[str, Any]] = {
    "pool": {"form": "pool", "active": 8, "rank": 8},
    "adapter": {
        "form": "adapter",
        "active": 8,
        "block": 1,
        "normalised": True,
        "bias_in_gate": False,
        "balance": 1e-3,
    },
}


@dataclass(frozen=True)
class Smora(GradientTrained):
    """y = W x + Σ_{i in top k} g_i(x) (a_i·x) b_i: of all ranks, the k that a learned router scores highest.

    Form "adapter" is the paper's: the router belongs to the one adapter it was trained with, by fingerprint, and any
    other member is refused. Ranks come in blocks of b that share a gate (b = 1: each is an expert; b = r / 8: eight
    experts; b = r: a plain LoRA), per token and module:

        z = σ(W_g x);  I = the k/b blocks of the largest z + c;  g_i = r z_i / (b Σ_{j in I} z_j) for i in I, else 0

    c is not trained by gradients: after every step c += u sign(mean load - load) (loss-free balancing). The paper's
    output is (alpha/k) B (g' ∘ A x) with Σ g' = k over the ranks. A stored LoRA has alpha/r folded in, so our gates are
    g = (r/k) g' and sum to r: the output is the same, and under balanced load each rank's gate averages 1 over the
    tokens, so the adapter without its router is the mean of itself with it, at PEFT's scaling. Its weight in the row
    multiplies the gates.

    Form "pool" is ours, for adapters that were trained apart: RAMoLE's router asked about ranks. Each adapter's ranks
    are its singular directions, so the factorisation does not matter. For a token, rank i of weight w_i adds a vector
    of length c_i = |w_i| |a_i·x| ‖b_i‖:

        t_i = σ(⟨A_q x, B_qᵀ b_i⟩ (a_i·x) / (‖a_i‖ ‖b_i‖ √q));  I = the k ranks of the largest c_i t_i;
        g_i = w_i t_i / t̄ for i in I, t̄ = Σ_I c_j t_j / Σ_I c_j

    The learned factors move length between the ranks kept and leave its sum as it is; before the first step all
    are 1, which is `rank_gating`, and with k at least the ranks of the row the weighted sum. The router serves any
    adapter (`router.adapters` is None).

    Where the adapter form departs from the authors' code: c decides the choice alone (DeepSeek's rule), because short
    runs need a u large enough to distort gates otherwise; "bias_in_gate": True is the code's g_i ∝ z_i + c_i. c and
    the count of k are per block, padding is not counted, and a normalised gate of a single block (k = b < r) is
    refused: it is constant, so its router would never learn; "normalised": False gives g_i = (r/k) z_i.

    Both forms leave the ranks of embeddings at their weight.

    Source: Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA, arXiv:2501.15103.

    Args:
        router: what it learned; settings "form", "active" (k) and, of the adapter form, "block" (b), "normalised",
            "bias_in_gate", "balance" (u), of the pool form "rank" (q).
        active: k at inference; None is that of the training.
        elsewhere: "refuse" or "untrained": what becomes of a module that a pool router was not trained on.

    Raises:
        ValueError: a field is out of its range, or the router is another method's.
    """

    router: Router
    active: int | None = None
    elsewhere: Elsewhere = "refuse"

    name: ClassVar[str] = "smora"
    source: ClassVar[str] = "SMoRA, arXiv:2501.15103"
    scope: ClassVar[Scope] = "token"
    gauge_invariant: ClassVar[bool] = True  # the adapter form refuses every factorisation but the one it was trained on
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_router("Smora", self.name, self.router)
        check_count("Smora", "active", self.active, optional=True)
        check_elsewhere("Smora", self.elsewhere)
        _check_settings(dict(self.router.settings), self._active)

    @property
    def _active(self) -> int:
        return int(self.router.settings["active"]) if self.active is None else self.active

    @classmethod
    def initial(cls, pool: Pool, seed: int, settings: Mapping[str, Any]) -> Router:
        """The router before the first step: form "pool" by default, form "adapter" for a pool of one adapter."""
        chosen = filled("Smora", settings, FORMS[_form(settings)])
        _check_settings(chosen, chosen["active"])
        if chosen["form"] == "pool":
            return Router(cls.name, chosen, draw_pairs(pool.banks, chosen["rank"], seed), pool.base_model)
        if len(pool.names) != 1:
            raise ValueError(f"smora: the adapter form is trained with one adapter, got {', '.join(pool.names)}")
        tensors = _draw_gates(pool.banks, chosen, seed)
        return Router(cls.name, chosen, tensors, pool.base_model, pool.adapters)

    @property
    def untrained(self) -> frozenset[str]:
        """The biases that balance the load."""
        return frozenset(name for name in self.router.tensors if name.endswith(".bias"))

    def after_step(self, scratch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Biases a step of u towards an equal load: up where a block had less than the mean, down where more."""
        new: dict[str, Tensor] = {}
        for name in sorted(self.untrained):
            load = scratch.get(LOAD + name.removesuffix(".bias"))
            if load is not None:
                load, bias = load.double(), self.router.tensors[name].detach()
                new[name] = bias + self.router.settings["balance"] * (load.mean() - load).sign().to(bias)
        return new

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """Ranks gated by token: the adapter's own as they are, or those of a pool as singular directions."""
        if self.router.settings["form"] == "adapter":
            self._check_members(banks, weights)
            return {module: self._own(bank, weights) for module, bank in banks.items()}
        return self.compose_canonical(canonical_banks(banks), weights)

    @property
    def canonical(self) -> bool:
        """The form that is trained for a pool composes singular directions."""
        return bool(self.router.settings["form"] == "pool")

    def compose_canonical(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """As `compose` in the form of a pool, of ranks that are singular directions already."""
        return {module: self._pool(bank, weights) for module, bank in banks.items()}

    def _check_members(self, banks: Mapping[str, RankBank], weights: Tensor) -> None:
        prints = next(iter(banks.values())).fingerprints if banks else ()
        used = (weights != 0).any(dim=0).tolist()
        self.router.columns([print_ for print_, member in zip(prints, used, strict=True) if member])

    def _own(self, bank: RankBank, weights: Tensor) -> LowRankDelta:
        w = bank.per_rank(weights)  # (batch, R)
        if bank.kind != "linear" or not w.any():
            return LowRankDelta(bank.A, bank.B, w, kind=bank.kind)
        own = {adapter.fingerprint for adapter in self.router.adapters or ()}
        rank = next(part.rank for i, part in bank.present if bank.fingerprints[i] in own)
        # a rank of an adapter that is no member may count anywhere: its weight is 0
        place = torch.cat([torch.arange(part.rank) % rank for _, part in bank.present])
        gate = block_gate(self.router, bank.module, place.to(bank.A.device), rank, self._active)
        return LowRankDelta(bank.A, bank.B, w, gate, bank.kind)

    def _pool(self, bank: RankBank, weights: Tensor) -> LowRankDelta:
        w = bank.per_rank(weights)  # (batch, R)
        if bank.kind != "linear":
            return LowRankDelta(bank.A, bank.B, w, kind=bank.kind)
        lengths = bank.A.norm(dim=1), bank.B.norm(dim=0)  # (R,), (R,)
        pair = find_pair(self.router, bank, bool(w.any()), self.elsewhere)
        unit = bank.B / lengths[1].clamp_min(torch.finfo(bank.B.dtype).tiny)
        query, key = (None, None) if pair is None else (pair.A, pair.key(unit))
        return LowRankDelta(bank.A, bank.B, w, PoolGate(query, key, *lengths, self._active), bank.kind)


def block_gate(router: Router, module: str, place: Tensor, rank: int, active: int) -> BlockGate:
    """The gate of the adapter form for one module.

    Args:
        router: of the adapter form.
        module: path of the module.
        place: which of the adapter's ranks each rank is, (R,).
        rank: ranks that the adapter has in the module.
        active: k.

    Raises:
        LookupError: the router was not trained on the module.
        ValueError: rank, block and k do not fit one another or the router.
    """
    settings, blocks = router.settings, _blocks(module, rank, router.settings, active)
    bias = router.tensor(f"{module}.bias", (blocks,))
    weight = router.tensor(f"{module}.router", (blocks, router.tensors[f"{module}.router"].shape[-1]))
    block = settings["block"]
    return BlockGate(
        weight,
        bias,
        place // block,
        active // block,
        settings["normalised"],
        settings["bias_in_gate"],
        rank / active,
        place.view(blocks, block) if len(place) == rank else None,
    )


def _draw_gates(banks: Mapping[str, RankBank], settings: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """W_g as PyTorch draws a Linear, c zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for module in sorted(banks):
        bank = banks[module]
        if bank.kind != "linear":
            continue
        rank, d_in = bank.A.shape
        blocks, bound = _blocks(module, rank, settings, settings["active"]), d_in**-0.5
        _check_gradient(settings, rank)
        tensors[f"{module}.router"] = torch.empty(blocks, d_in).uniform_(-bound, bound, generator=generator)
        tensors[f"{module}.bias"] = torch.zeros(blocks)
    return tensors


def _form(settings: Mapping[str, Any]) -> str:
    form = settings.get("form", "pool")
    if form not in FORMS:
        raise ValueError(f"smora: form must be one of {', '.join(FORMS)}, got {form!r}")
    return str(form)


def _check_settings(settings: Mapping[str, Any], active: int) -> None:
    """Raise a ValueError unless these are settings of a form, k included."""
    known = FORMS[_form(settings)]
    if missing := sorted(set(known) - set(settings)):
        raise ValueError(f"smora: the settings of a router lack {', '.join(missing)}")
    for name in ("active", "rank", "block"):
        if name in known:
            check_count("smora", name, settings[name])
    if settings["form"] == "pool":
        return
    for name in ("normalised", "bias_in_gate"):
        if not isinstance(settings[name], bool):
            raise ValueError(f"smora: {name} must be True or False, got {settings[name]!r}")
    if not (is_finite(settings["balance"]) and settings["balance"] >= 0):
        raise ValueError(f"smora: balance must be a finite number of at least 0, got {settings['balance']!r}")
    if active % settings["block"]:
        raise ValueError(f"smora: active must be a multiple of block = {settings['block']}, got {active}")


def _blocks(module: str, rank: int, settings: Mapping[str, Any], active: int) -> int:
    """How many blocks the ranks of a module make."""
    block = settings["block"]
    if rank % block or active > rank:
        raise ValueError(
            f"smora: {module!r} has {rank} ranks, which must be a multiple of block = {block} and at least active = "
            f"{active}"
        )
    return int(rank // block)


def _check_gradient(settings: Mapping[str, Any], rank: int) -> None:
    """Raise a ValueError where every gate would be a constant, so that the router could not learn."""
    block = settings["block"]
    if settings["normalised"] and settings["active"] == block < rank:
        raise ValueError(
            f"smora: the one block of {block} ranks that acts would always have the gate {rank / block:g}, whatever "
            "the router says: raise active, lower block, or set normalised to False"
        )
