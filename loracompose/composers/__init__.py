"""Composition methods, one per file. COMPOSERS is the whole table; a composer outside it works as an instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from loracompose.adapters.lora import Adapter
from loracompose.composers.arrow import Arrow
from loracompose.composers.base import Composer
from loracompose.composers.cat import Cat
from loracompose.composers.dare import Dare, DareTies
from loracompose.composers.fusion import Fusion
from loracompose.composers.knots import Knots
from loracompose.composers.lego import Lego
from loracompose.composers.linear import Linear
from loracompose.composers.lora_flow import LoraFlow
from loracompose.composers.lorahub import LoraHub
from loracompose.composers.magnitude_prune import MagnitudePrune
from loracompose.composers.merge import merge_adapters
from loracompose.composers.milora import Milora
from loracompose.composers.mixture import Mixture
from loracompose.composers.mole import Mole
from loracompose.composers.phatgoose import Phatgoose
from loracompose.composers.ramole import Ramole
from loracompose.composers.rank_gating import RankGating
from loracompose.composers.selection import Selection
from loracompose.composers.smora import Smora
from loracompose.composers.ties import Ties
from loracompose.composers.xlora import Xlora
from loracompose.composition.router import Router

COMPOSERS: Mapping[str, type[Composer]] = MappingProxyType(
    {
        composer.name: composer
        for composer in (
            Selection,
            Mixture,
            Fusion,
            Linear,
            Lego,
            Ties,
            Dare,
            DareTies,
            MagnitudePrune,
            Knots,
            LoraHub,
            Arrow,
            RankGating,
            LoraFlow,
            Cat,
            Mole,
            Milora,
            Phatgoose,
            Ramole,
            Smora,
            Xlora,
        )
    }
)

__all__ = ["COMPOSERS", "Composer", "compose", "get_composer"]


def get_composer(composer: str | Composer, router: Router | None = None) -> Composer:
    """A composer by name with its default hyper-parameters, or the instance itself.

    Args:
        composer: name or instance.
        router: what a composer that learns has learned; needed with its name.

    Raises:
        LookupError: no composer of that name.
        TypeError: neither a name nor a composer.
        ValueError: a router is missing, is another method's, or would have no effect.
    """
    if isinstance(composer, str):
        return _by_name(composer, router)
    if router is not None:
        raise ValueError(f"{composer!r} is no name: give its router to it, not beside it")
    if isinstance(composer, type) or not isinstance(composer, Composer):
        raise TypeError(f"a composer is a name or an instance such as Mixture(), got {composer!r}")
    return composer


def _by_name(name: str, router: Router | None) -> Composer:
    if name not in COMPOSERS:
        raise LookupError(f"no composer named {name!r}; there are {', '.join(sorted(COMPOSERS))}")
    method: Callable[..., Composer] = COMPOSERS[name]
    if not hasattr(method, "initial"):  # it learns nothing
        if router is not None:
            raise ValueError(f"composer {name!r} learns nothing, so it takes no router; got {router!r}")
        return method()
    if router is None:
        raise ValueError(
            f"composer {name!r} runs what it has learned: give it a router, as in router=FOLDER; make one with "
            f"`loracompose train router --method {name}`"
        )
    if router.method != name:
        raise ValueError(f"{router!r} belongs to the composer {router.method!r}, not to {name!r}")
    return method(router)


def compose(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | Tensor | None = None,
    composer: str | Composer = "mixture",
    *,
    name: str | None = None,
) -> Adapter:
    """One plain adapter from K adapters at fixed weights; `save_adapter` writes it as a PEFT folder.

    Args:
        adapters: adapters of one base model, of any ranks and modules.
        weights: K finite numbers; None means 1/K each. 0 leaves an adapter out.
        composer: name or instance of a static composer.
        name: name of the result, the composer's by default.

    Returns:
        Adapter whose recipe names the method, its hyper-parameters, the sources with fingerprints and weights,
        and the relative error against the exact weighted sum of the updates.

    Raises:
        ValueError: a gated composer, wrong weights, or nothing left.
        LookupError: no composer of that name.
    """
    if weights is None:
        weights = [1 / len(adapters) for _ in adapters]
    return merge_adapters(adapters, weights, get_composer(composer), name)
