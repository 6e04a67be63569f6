"""Does what a composer has learned fit the base and the index it is to run with: said before any prompt is read."""

from __future__ import annotations

from loracompose.composers import Composer, get_composer
from loracompose.composers.base import router_of
from loracompose.composition.router import Router
from loracompose.models import BaseModel
from loracompose.retrieval.index import AdapterIndex


def check_router(router: Router, base: BaseModel, index: AdapterIndex | None) -> None:
    """Refuse a router that was trained for another base or for adapters that are gone.

    As with adapters, layers and widths decide whether a base fits; another name alone is noted in the trace. The shapes
    of the tensors themselves are held against the adapters of each request.

    Raises:
        ValueError: it was trained on a base of other layers or width.
        LookupError: the index has no adapter of the content that it was trained for.
    """
    trained, here = router.training.get("base"), base_size(base)
    if isinstance(trained, dict) and trained != here:  # a record without sizes says nothing
        raise ValueError(
            f"{router!r} was trained on {router.base_model!r} ({_size(trained)}); this base is {base.name!r} "
            f"({_size(here)}): train a router for it"
        )
    if index is None or router.adapters is None:
        return
    there = {card.fingerprint: card.name for card in index.cards}
    gone = [adapter for adapter in router.adapters if adapter.fingerprint not in there]
    if gone:
        names = set(there.values())
        changed = "another adapter of that name is there" if gone[0].name in names else "it is not there"
        more = f" (and {len(gone) - 1} more)" if len(gone) > 1 else ""
        raise LookupError(
            f"{router!r} was trained for the adapter {gone[0].name!r} (fingerprint {gone[0].fingerprint[:12]}), which "
            f"the index does not have: {changed}{more}. Add it to the index, or train the router again"
        )


def composer_for_call(composer: str | Composer | None, own: Composer, base: BaseModel) -> Composer:
    """The composer of one call: the engine's own if the call names none.

    The name of one that learns takes the router of the engine's own, which must be of that method.

    Raises:
        LookupError: no composer of that name.
        TypeError: neither a name nor a composer.
        ValueError: it needs a router that is not here, or its router is of another base.
    """
    if composer is None:
        return own
    router = router_of(own)
    if isinstance(composer, str) and router is not None and router.method == composer:
        return get_composer(composer, router)
    try:
        chosen = get_composer(composer)
    except ValueError as error:  # it has learned nothing here
        held = "has no router" if router is None else f"has a router of {router.method!r}"
        raise ValueError(
            f"{error}. This engine {held}: make one with Engine.from_pretrained(..., composer={composer!r}, "
            "router=FOLDER), or pass the composer itself with its router"
        ) from None
    if (learned := router_of(chosen)) is not None and learned is not router:
        check_router(learned, base, None)  # its adapters may be given by hand: each request checks them
    return chosen


def base_size(base: BaseModel) -> dict[str, int]:
    """What the record of a router keeps of the base it was trained on, for `check_router`."""
    config = base.model.config.get_text_config()
    return {"hidden": int(config.hidden_size), "layers": int(config.num_hidden_layers)}


def _size(base: dict[str, int]) -> str:
    return f"{base['layers']} layers of width {base['hidden']}"
