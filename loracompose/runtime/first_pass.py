"""The pass of the bare base that some gates decide on: what it thinks of the tokens, before every pass of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from loracompose.composition.prompt_gates import fit_rows

ASKED = ("output_hidden_states", "output_attentions", "return_dict")  # of the second pass alone


CACHES = ("cache", "past_key_values")  # what transformers calls it from 5.24 on, and before
CACHE = next(name for name in CACHES if name in BaseModelOutputWithPast.__dataclass_fields__)
"""What this transformers calls a cache, in what a model is given and in what it gives."""


class FirstPass:
    """Runs every part of a model once without the deltas before it runs with them, and keeps its last hidden states.

    The base needs keys and values of its own. They lie behind the adapted ones in one and the same cache, as layers
    that the model itself never asks for: so whatever `generate` does to the rows of a cache, it does to both.

    Attributes:
        running: whether a first pass is on; then no delta adds anything.
        states: last hidden states of the part that runs, (rows, seq, hidden).
        encoder_states: those of the encoder, for the decoder's modules that read its tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare a model; it must be one of transformers, whose body and cache have known names."""
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"a gate that needs the base's states runs on a transformers model, not on {type(model)}")
        both = model.config.is_encoder_decoder
        self._parts = (model.get_encoder(), model.get_decoder()) if both else (model.base_model,)
        self._encoder = self._parts[0] if both else None
        self._own: WeakKeyDictionary[Cache, int] = WeakKeyDictionary()  # layers that are the model's own
        self._base_cache: Cache | None = None
        self.running = False
        self.states: Tensor | None = None
        self.encoder_states: Tensor | None = None
        self._adapted: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block first passes are run; afterwards caches are as the model alone would have left them."""
        hooks = [part.register_forward_pre_hook(self._before, with_kwargs=True) for part in self._parts]
        hooks += [part.register_forward_hook(self._after, with_kwargs=True) for part in self._parts]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for cache, own in self._own.items():
                for layers in layers_of(cache):
                    del layers[own:]

    def _before(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {name: value for name, value in kwargs.items() if name not in ASKED}
        for name in CACHES:
            if kwargs.get(name) is not None:
                given[name] = self._of_base(kwargs[name])
        if (adapted := kwargs.get("encoder_hidden_states")) is not None:
            self.encoder_states = given["encoder_hidden_states"] = self._of_encoder(adapted)
        self.running = True
        try:
            with torch.no_grad():
                output = part.forward(*args, **given)
        finally:
            self.running = False
        self.states, self._base_cache = output.last_hidden_state, cache_in(vars(output))
        if part is self._encoder:
            self.encoder_states = self.states

    def _of_encoder(self, adapted: Tensor) -> Tensor:
        """The base's states of the very text that the decoder is given, a prompt once for each of its beams."""
        rows, made = adapted.shape[0], self._adapted
        if made is None or self.encoder_states is None or not torch.equal(fit_rows(made, rows), adapted):
            raise ValueError(
                "the decoder is given other encoder states than those that the encoder made last in this block: the "
                "base's own are not known; run the encoder right before, in the same block"
            )
        return fit_rows(self.encoder_states, rows)

    def _of_base(self, cache: Cache) -> Cache:
        """The base's own keys and values."""
        if cache in self._own:
            parts = [Cache(layers=layers[self._own[cache] :]) for layers in layers_of(cache)]
            return EncoderDecoderCache(*parts) if isinstance(cache, EncoderDecoderCache) else parts[0]
        if cache.get_seq_length() == 0:
            return copy.deepcopy(cache)
        raise ValueError(
            f"a cache of {int(cache.get_seq_length())} tokens that were read without this composition: the base's own "
            "states of them are not in it; give the whole text, or a cache of this very block"
        )

    def _after(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if part is self._encoder:
            self._adapted = output[0]
        cache = cache_in(kwargs)
        cache = cache_in(vars(output)) if cache is None else cache  # an empty one is false
        base, self._base_cache = self._base_cache, None
        if cache is None or base is None or cache in self._own:
            return
        for own, behind in zip(layers_of(cache), layers_of(base), strict=True):
            self._own[cache] = len(own)
            own.extend(behind)


def cache_in(values: Mapping[str, Any]) -> Cache | None:
    """The cache among what a part is given or gives, under either name."""
    found = (values.get(name) for name in CACHES)
    return next((cache for cache in found if cache is not None), None)


def layers_of(cache: Cache) -> list[list[Any]]:
    """The lists of layers that a cache is made of: one, or those of self- and of cross-attention."""
    if isinstance(cache, EncoderDecoderCache):
        return [cache.self_attention_cache.layers, cache.cross_attention_cache.layers]
    return [cache.layers]
