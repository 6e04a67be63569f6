"""The gate of MoLE: shares of the adapters, decided at one module and found again by the others of its group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from loracompose.composition.gates import GateContext, masked_softmax, once
from loracompose.composition.pooling import pool_mean
from loracompose.composition.prompt_gates import fit_rows

SHARES, MEMBERS = "mole.shares.", "mole.members"  # keys of what is noted for the loss


def noted(scratch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """What the gates of one pass noted: live shares (gates, batch, K) and members (batch, K); None if none ran."""
    shares = [scratch[key] for key in sorted(scratch) if key.startswith(SHARES)]
    return (torch.stack(shares), scratch[MEMBERS]) if shares else None


def balance_loss(shares: Tensor, members: Tensor) -> Tensor:
    """Mean over rows of -Σ_i log q_i - n log n, q the mean over gates; 0 where the gates together use all alike.

    Args:
        shares: live shares of every gate, (gates, batch, K), 0 for adapters that are no members.
        members: (batch, K) bool; a row has n of them, and a row without any counts 0.
    """
    q = shares.mean(dim=0)  # (batch, K)
    # 1 where nobody is: the gradient of log 0 is inf, and inf · 0 is nan
    q = q.clamp_min(torch.finfo(q.dtype).tiny).masked_fill(~members, 1.0)
    n = members.sum(dim=1).to(q)
    loss: Tensor = -q.log().sum(dim=1) - torch.special.xlogy(n, n)  # (batch,)
    return loss.mean()


@dataclass(frozen=True, eq=False)
class Judge:
    """How a gate decides, at its site.

    Attributes:
        weight: e of eq. 10 for the adapters of the bank, (K, K, d_out): share of, slice of, feature.
        log_temperature: log τ, ().
        B: of the site, (d_out, R).
        owner: adapter of each rank, (R,).
        members: (batch, K) bool.
    """

    weight: Tensor
    log_temperature: Tensor
    B: Tensor
    owner: Tensor
    members: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Judge:
        """The same on a device, in float32 or better."""
        dtype = torch.promote_types(dtype, torch.float32)
        weight, temperature, B = (t.to(device=device, dtype=dtype) for t in (self.weight, self.log_temperature, self.B))
        return Judge(weight, temperature, B, self.owner.to(device), self.members.to(device))

    def shares(self, h: Tensor, context: GateContext) -> Tensor:
        """Shares of the adapters, (batch, K), from h = A x of the site, (batch, seq, R)."""
        members = fit_rows(self.members, h.shape[0])
        # the mean of the outputs is the output of the mean: no (batch, seq, d_out) for every adapter
        pooled = pool_mean(h.to(self.B.dtype), context.prompt(h.shape[1]))  # (batch, R)
        own = self.owner == torch.arange(self.members.shape[1], device=h.device)[:, None]  # (K, R)
        own = own & members[:, :, None]  # (batch, K, R)
        # not pooled * own: an adapter that overflows must not reach rows that do not use it
        outputs = torch.where(own, pooled[:, None, :], 0.0) @ self.B.mT  # (batch, K, d_out)
        logits = torch.einsum("nid,jid->nj", F.normalize(outputs, dim=-1), self.weight)  # (batch, K)
        context.scratch[MEMBERS] = members
        return masked_softmax(logits / self.log_temperature.exp(), members)


@dataclass(frozen=True, eq=False)
class MoleGate:
    """The share of each rank's adapter, decided by the first module of the group.

    Attributes:
        group: name of the gate.
        site: the module that decides.
        owner: adapter of each rank, (R,).
        judge: how to decide; None in modules other than the site.
    """

    group: str
    site: str
    owner: Tensor
    judge: Judge | None

    needs_layer_input: ClassVar[bool] = False

    def to(self, device: torch.device, dtype: torch.dtype) -> MoleGate:
        """The same gate on a device and in a dtype."""
        judge = None if self.judge is None else self.judge.to(device, dtype)
        return replace(self, owner=self.owner.to(device), judge=judge)

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        """Multipliers (batch, 1, R)."""
        judge = self.judge
        if judge is not None:
            shares = once(context.memory, self._key, lambda: judge.shares(h, context))
            context.scratch[SHARES + self.group] = shares
        return self.multipliers(w, context.memory)[:, None, :].to(h)

    def multipliers(self, w: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
        """The share of each rank's adapter, (batch, R), in the precision it was decided in."""
        if self._key not in memory:
            raise ValueError(
                f"mole: the gate of {self.group} is not decided, because {self.site}, which decides it, has not run "
                "yet; if the model runs its modules in another order than their names say, train with "
                "granularity='matrix'"
            )
        return fit_rows(memory[self._key], w.shape[0]).to(w.device)[:, self.owner.to(w.device)]

    @property
    def _key(self) -> str:
        return f"mole.{self.group}"
