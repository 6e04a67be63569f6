"""compose: a static composition of adapters as one plain adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter, LoraFactors
from loracompose.composers.base import Composer, router_of
from loracompose.composition.bank import RankBank, content_order, gather_banks
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.linalg import frobenius
from loracompose.composition.router import Router


def merge_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | Tensor,
    composer: Composer,
    name: str | None = None,
) -> Adapter:
    """The composition of K adapters at fixed weights as one adapter, with its recipe.

    Raises:
        ValueError: the composer gates (its multipliers depend on the input, so no plain LoRA equals it), the
            weights are not K finite numbers, or the composition is empty or not finite.
        LookupError: the composer runs a router that was not trained for one of the adapters.
    """
    if composer.scope != "static":
        raise ValueError(
            f"{composer.name!r} gates the ranks by {composer.scope}: its multipliers depend on the input, so it is no "
            "fixed update and cannot be merged or exported; run it with Engine.generate or merge with a static composer"
        )
    w = checked_weights(weights, adapters)
    order = content_order(adapters)
    adapters, w = [adapters[i] for i in order], w[:, order]
    if (router := router_of(composer)) is not None:
        router.check_serves({adapter.fingerprint: adapter.name for adapter in adapters})
    banks = gather_banks(adapters)
    try:
        deltas = composer.compose(banks, w)
    # documented, but left out of its __all__
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise overflow(composer, loudest(banks, w), banks, w) from error
    factors = {module: plain_factors(delta) for module, delta in deltas.items()}
    factors = {module: f for module, f in factors.items() if f.rank}
    for module, f in factors.items():
        if not (torch.isfinite(f.A).all() and torch.isfinite(f.B).all()):
            raise overflow(composer, module, banks, w)
    if not factors:
        raise ValueError(f"the weights {w.flatten().tolist()} leave nothing to merge: every rank is switched off")
    recipe = describe(composer, adapters, w, relative_error(banks, w, factors))
    return Adapter(
        name or composer.name, factors, shared(adapters, "base_model"), shared(adapters, "task_type"), recipe
    )


def checked_weights(weights: Sequence[float] | Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """Weights as a (1, K) float64 tensor."""
    if not adapters:
        raise ValueError("at least one adapter is needed to compose, got none")
    if isinstance(weights, Mapping):
        raise ValueError(
            f"weights are a sequence of {len(adapters)} numbers in the order of the adapters, "
            f"got {weights!r}; the adapters are {', '.join(repr(adapter.name) for adapter in adapters)}"
        )
    w = torch.as_tensor(weights, dtype=torch.float64).reshape(1, -1)
    if w.shape[1] != len(adapters):
        raise ValueError(f"one weight per adapter: got {w.shape[1]} weights for {len(adapters)} adapters")
    if not torch.isfinite(w).all():
        raise ValueError(f"weights must be finite, got {w.flatten().tolist()}")
    return w


def overflow(composer: Composer, module: str, banks: Mapping[str, RankBank], weights: Tensor) -> ValueError:
    """The error of a composition that its dtype cannot hold."""
    return ValueError(
        f"{module}: composed by {composer.name!r} its factors are not finite in {banks[module].A.dtype}; the largest "
        f"weight is {weights.abs().max().item():g}: give smaller weights, or adapters of smaller updates"
    )


def loudest(banks: Mapping[str, RankBank], weights: Tensor) -> str:
    """The module whose weighted ranks are the largest, in float64."""

    def size(module: str) -> float:
        bank = banks[module]
        lengths = bank.A.double().norm(dim=1) * bank.B.double().norm(dim=0)  # (R,)
        return float((lengths * weights[0].abs()[bank.owner]).max())

    return max(banks, key=size)


def plain_factors(delta: LowRankDelta) -> LoraFactors:
    """The factors of a one-row static delta, its weights folded into B and ranks of weight 0 left out."""
    keep = delta.weights[0] != 0
    B = delta.B[:, keep] * delta.weights[0, keep]
    return LoraFactors(delta.A[keep].contiguous(), B.contiguous(), delta.kind)


def shared(adapters: Sequence[Adapter], attribute: str) -> Any:
    """The value that all adapters agree on, ignoring the empty; None or "" if they do not."""
    values = {getattr(adapter, attribute) for adapter in adapters} - {None, ""}
    return values.pop() if len(values) == 1 else ("" if attribute == "base_model" else None)


def relative_error(banks: Mapping[str, RankBank], weights: Tensor, factors: Mapping[str, LoraFactors]) -> float:
    """‖composed - Σ w_i delta_W_i‖ / ‖Σ w_i delta_W_i‖ over all modules together, in the Frobenius norm."""
    off, size = 0.0, 0.0
    for module, bank in banks.items():
        # not per_rank, which rounds to the dtype of the factors: the error of that would not be seen
        w = weights[0].to(bank.A.device, torch.float64)[bank.owner]  # (R,)
        A, B = bank.A.double(), bank.B.double() * w
        size += frobenius(A, B).item() ** 2
        if module in factors:
            A, B = (
                torch.cat([A, factors[module].A.double()]),
                torch.cat([B, -factors[module].B.double()], dim=1),
            )
        off += frobenius(A, B).item() ** 2
    return (off / size) ** 0.5 if size else 0.0 if not off else float("inf")


def describe(composer: Composer, adapters: Sequence[Adapter], weights: Tensor, error: float) -> dict[str, Any]:
    """The recipe of a composition: method, hyper-parameters, sources and how far it is from the weighted sum."""
    fields: tuple[dataclasses.Field[Any], ...] = (
        dataclasses.fields(composer) if dataclasses.is_dataclass(composer) else ()
    )
    return {
        "method": composer.name,
        "source": composer.source,
        "hyper_parameters": {f.name: recorded(getattr(composer, f.name)) for f in fields},
        "composer": repr(composer),
        "sources": [
            {"name": adapter.name, "fingerprint": adapter.fingerprint, "weight": weight}
            for adapter, weight in zip(adapters, weights[0].tolist(), strict=True)
        ],
        "relative_error": error,
    }


def recorded(value: Any) -> Any:
    """A hyper-parameter as JSON; of a router, which one it is."""
    if isinstance(value, Router):
        return {"method": value.method, "fingerprint": value.fingerprint, "settings": dict(value.settings)}
    return value
