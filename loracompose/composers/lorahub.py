"""LoraHub: A and B summed separately at weights fitted to a few examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loracompose.composers.base import Factors, Scope, rewrite_rows
from loracompose.composers.fusion import fuse
from loracompose.composers.mixture import Mixture
from loracompose.composition.bank import RankBank, select_banks
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.settings import is_finite

LearnedWeights = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class LoraHub:
    """delta_W = (Σ_i w_i B_i)(Σ_i w_i A_i) at weights that `fit_lorahub` found without gradients.

    Like fusion it has cross terms w_i w_j B_i A_j and w_i² on the diagonal, and depends on how each adapter is
    factorised; `exact_sum` takes Σ_i w_i B_i A_i instead. The paper needs adapters of one rank; here shorter ranks
    are padded with zeros and the LoRA scaling lies in B. Without fitted weights those of the row are used; with
    them a weight other than 0 in the row makes an adapter a member, and the fitted weight replaces it. Members of one
    content, which were fitted as one, share its weight equally.

    Source: LoraHub, arXiv:2307.13269, section 2.

    Args:
        learned: fitted weight by fingerprint of the adapter, a mapping or its items; kept sorted.
        exact_sum: sum the updates instead of the factors.

    Raises:
        ValueError: a fitted weight is no finite number.
    """

    learned: Mapping[str, float] | LearnedWeights | None = None
    exact_sum: bool = False

    name: ClassVar[str] = "lorahub"
    source: ClassVar[str] = "LoraHub, arXiv:2307.13269"
    scope: ClassVar[Scope] = "static"
    gauge_invariant: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.learned is not None:
            items = dict(self.learned).items()
            for key, weight in items:
                if not is_finite(weight):
                    raise ValueError(f"LoraHub: the learned weight of {key!r} must be a finite number, got {weight!r}")
            object.__setattr__(self, "learned", tuple(sorted((key, float(weight)) for key, weight in items)))

    @property
    def row_wise(self) -> bool:
        """Whether factors are summed; the exact sum weighs ranks and rewrites none."""
        return not self.exact_sum

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """One merged adapter per distinct row of weights.

        Raises:
            LookupError: weights were fitted, but not for every member.
        """
        if self.exact_sum:
            return Mixture().compose(banks, self._fitted(banks, weights))
        return rewrite_rows(banks, weights, self.compose_row)

    def compose_row(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, Factors]:
        """The merged adapter of one row; raises as `compose` does."""
        fitted = self._fitted(banks, weights[None])[0]
        members = fitted.nonzero().flatten().tolist()  # a weight may have been fitted to 0
        return fuse(select_banks(banks, members), fitted[members])

    def _fitted(self, banks: Mapping[str, RankBank], weights: Tensor) -> Tensor:
        if self.learned is None or not banks:
            return weights
        return fitted_weights(dict(self.learned), next(iter(banks.values())).fingerprints, weights)


def fitted_weights(learned: Mapping[str, float], fingerprints: tuple[str, ...], weights: Tensor) -> Tensor:
    """The fitted weight of every member of a row, (batch, K); 0 elsewhere. Members of one content share theirs equally.

    Raises:
        LookupError: a member has none.
    """
    member = weights != 0
    for i in member.any(dim=0).nonzero().flatten().tolist():
        if fingerprints[i] not in learned:
            known = ", ".join(key[:12] for key in learned)
            raise LookupError(
                f"no LoraHub weight was fitted for the adapter of fingerprint {fingerprints[i][:12]}; "
                f"there are weights for {known}: fit again with it among the adapters"
            )
    row = weights.new_tensor([learned.get(key, 0.0) for key in fingerprints])  # (K,)
    alike = weights.new_tensor([[one == other for other in fingerprints] for one in fingerprints])  # (K, K)
    times = member.to(weights) @ alike  # (batch, K): how often its content is among the members
    return member * row / times.clamp_min(1)
