"""What SMoRA adds to a recipe, as a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

TRAVEL = 0.5  # how far a bias can go in a run: as far as the sigmoids that it corrects are from their middle


@dataclass(frozen=True)
class SmoraSettings:
    """Hyper-parameters of `train_smora` beside those of the recipe; `composers.smora` says what they mean.

    Attributes:
        active: k, ranks that act per token.
        block: b, ranks that share a gate; it divides k and the rank.
        normalised: whether the gates of a token are scaled to a fixed sum.
        bias_in_gate: whether the balancing bias enters the gate's value as well as the choice.
        balance: u, the balancing step; None is 0.5 / steps, which is the authors' 1e-5 for a run of 50,000 steps. 0
            leaves the load to itself.
    """

    active: int = 8
    block: int = 1
    normalised: bool = True
    bias_in_gate: bool = False
    balance: float | None = None

    def for_router(self, steps: int) -> dict[str, Any]:
        """The settings of the router of a run of so many steps."""
        balance = TRAVEL / steps if self.balance is None else self.balance
        return {"form": "adapter", **asdict(self), "balance": balance}
