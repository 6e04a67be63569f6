"""Attachment: what has run of the deltas on a model, and what their gates may know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loracompose.composition.gates import GateContext
from loracompose.composition.layers import layer_of
from loracompose.runtime.first_pass import FirstPass
from loracompose.runtime.sharing import OpenProduct

# (the module's output, its input, what gates may know) -> the output with what the delta adds
Add = Callable[[Tensor, Tensor, Callable[[], GateContext]], Tensor]


@dataclass(frozen=True, eq=False)
class Side:
    """What is known of the tokens that a part of the model reads: its encoder's, its decoder's, or all."""

    mask: Tensor | None = None
    prompt_mask: Tensor | None = None


def one_mask(given: Mapping[str, Tensor] | Tensor | None) -> Tensor | None:
    """The mask of a pass; where there is one for each kind of layer, that of full attention if a layer has it.

    For a static cache `generate` makes a mapping where the model's config names the kinds of its layers (Qwen2,
    Gemma 2). Each of its masks tells real tokens from padding; that of a sliding window may have lost the oldest.
    """
    return given.get("full_attention", next(iter(given.values()))) if isinstance(given, Mapping) else given


class Attachment:
    """Deltas on a model: what has run, and what gates may know; lives as long as one `attach`.

    Attributes:
        product: what the modules that read one tensor share while the model runs.
        first: the pass of the base before each pass, where a gate asks for its states.
    """

    def __init__(
        self, deltas: Iterable[str], prompt_mask: Tensor | None = None, first: FirstPass | None = None
    ) -> None:
        self._never_ran = dict.fromkeys(deltas)
        self._prompt_mask = prompt_mask
        self.product = OpenProduct()
        self.first = first
        self._side, self._encoder_side = Side(), Side()
        self._encoder_states: Tensor | None = None
        self._layer_input: dict[str, Tensor] = {}
        self._memory: dict[str, Tensor] = {}
        self._scratch: dict[str, Tensor] = {}

    @property
    def never_ran(self) -> tuple[str, ...]:
        """Modules with a delta that the model has not called: their updates had no effect."""
        return tuple(self._never_ran)

    @property
    def scratch(self) -> Mapping[str, Tensor]:
        """What the gates left of the last forward pass, see `GateContext.scratch`."""
        return self._scratch

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """What the gates decided for this request, see `GateContext.memory`."""
        return self._memory

    def starts(self, model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
        """The parts of a model at which a pass begins, each with its pre-hook."""
        yield model, self.start_pass
        if isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder:
            yield model.get_encoder(), self.start_pass  # `generate` calls it by itself
            yield model.get_decoder(), self.start_decoder

    def start_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the attention mask of this forward pass and forget what gates noted in the last one."""
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1:  # given by its place
            mask = signature(module.forward).bind_partial(*args).arguments.get("attention_mask")
        self._side = Side(one_mask(mask), self._prompt_mask)
        self._encoder_states = None
        self._scratch.clear()

    def start_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The decoder's tokens follow; the encoder's are still read by the keys and values of cross-attention."""
        self._encoder_states = kwargs.get("encoder_hidden_states")
        self._encoder_side = Side(one_mask(kwargs.get("encoder_attention_mask")), self._prompt_mask)
        starts = None
        if self._prompt_mask is not None:
            read = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
            starts = torch.zeros(read.shape[:2], dtype=torch.bool, device=read.device)
            starts[:, 0] = True
        self._side = Side(one_mask(kwargs.get("attention_mask")), starts)

    def end_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Let go of what no module asked for: nothing of a pass outlives it."""
        self.product.close()

    def layer_hook(self, layer: str) -> Any:
        """A pre-hook that remembers the hidden states entering a layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._layer_input[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def module_hook(self, path: str, add: Add) -> Any:
        """A forward hook that adds the delta to the module's output."""
        layer = layer_of(path)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if self.first is not None and self.first.running:
                return output
            x = args[0]
            self._never_ran.pop(path, None)
            if output.ndim != 3:
                raise ValueError(
                    f"{path}: its output has shape {tuple(output.shape)}, expected (batch, seq, width); a module that "
                    "flattens rows and tokens cannot run one composition per row"
                )
            return add(output, x, lambda: self._context(path, layer, x))

        return hook

    def presence_hook(self, path: str) -> Any:
        """A forward hook that only remembers that the module ran, its delta being in its weight."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._never_ran.pop(path, None)

        return hook

    def _context(self, path: str, layer: str, x: Tensor) -> GateContext:
        side, layer_input = self._side, self._layer_input.get(layer)
        base = None if self.first is None else self.first.states
        if x is self._encoder_states:  # which no layer of the decoder has as its input
            side, layer_input = self._encoder_side, None if layer_input is None else x
            base = None if self.first is None else self.first.encoder_states
        return GateContext(path, layer_input, side.mask, side.prompt_mask, self._memory, self._scratch, base)
