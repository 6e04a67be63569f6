"""attach: put deltas on a model for the length of a `with`, by hooks that we own and remove."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext
from loracompose.composition.layers import layer_of
from loracompose.runtime.operator import RowOperator


@contextmanager
def attach(
    model: nn.Module, deltas: Mapping[str, LowRankDelta], prompt_mask: Tensor | None = None
) -> Iterator[Attachment]:
    """Add each delta to the output of its module while the block runs.

    Weights are not touched and no module is replaced: outside the block the model is bit-identical to the
    model before it, after success and after an exception. Blocks may be nested; each removes its own hooks.

    Args:
        model: the base model.
        deltas: module path -> delta; the rows of a batch given to the model are the rows of the deltas, or
            each row several times in a row as `generate` lays out beams and return sequences.
        prompt_mask: (batch, seq) bool, the tokens that belong to the prompts, for a model that is given prompts and
            answers at once; None where its first call gets the prompts alone, as in `generate`. An encoder-decoder's
            are the tokens of its encoder; of what its decoder reads, the token it starts from counts as prompt.

    Yields:
        The attachment, which knows afterwards which deltas never ran.

    Raises:
        LookupError: the model has no module of that path.
        ValueError: a delta does not fit its module's shape, or the module takes no (batch, seq, width) input.
    """
    modules = {path: resolve(model, path) for path in deltas}
    for path, module in modules.items():
        check_fit(path, module, deltas[path])
    request = Attachment(deltas, prompt_mask)
    with ExitStack() as hooks:
        operators = {path: RowOperator(on_module(delta, modules[path])) for path, delta in deltas.items()}
        if any(deltas[path].gate is not None for path in deltas):
            for part, start in request.starts(model):
                hooks.callback(part.register_forward_pre_hook(start, with_kwargs=True).remove)
        for layer in sorted({layer_of(p) for p, op in operators.items() if op.gate_needs_layer_input}):
            hook = resolve(model, layer).register_forward_pre_hook(request.layer_hook(layer), with_kwargs=True)
            hooks.callback(hook.remove)
        for path, operator in operators.items():
            hooks.callback(modules[path].register_forward_hook(request.module_hook(path, operator)).remove)
        yield request


# Hooks are put on the model, so whoever generates must have it alone, whichever engine asks. Not state of the
# library but of the models: an entry lives as long as its model.
_LOCKS: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


def model_lock(model: nn.Module) -> threading.Lock:
    """The one lock of a model, shared by everybody who attaches to it."""
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(model, threading.Lock())


@dataclass(frozen=True, eq=False)
class Side:
    """What is known of the tokens that a part of the model reads: its encoder's, its decoder's, or all."""

    mask: Tensor | None = None
    prompt_mask: Tensor | None = None


class Attachment:
    """Deltas on a model: what has run, and what gates may know; lives as long as one `attach`."""

    def __init__(self, deltas: Iterable[str], prompt_mask: Tensor | None = None) -> None:
        self._never_ran = dict.fromkeys(deltas)
        self._prompt_mask = prompt_mask
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
        self._side = Side(kwargs.get("attention_mask"), self._prompt_mask)
        self._encoder_states = None
        self._scratch.clear()

    def start_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The decoder's tokens follow; the encoder's are still read by the keys and values of cross-attention."""
        self._encoder_states = kwargs.get("encoder_hidden_states")
        self._encoder_side = Side(kwargs.get("encoder_attention_mask"), self._prompt_mask)
        starts = None
        if self._prompt_mask is not None:
            read = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
            starts = torch.zeros(read.shape[:2], dtype=torch.bool, device=read.device)
            starts[:, 0] = True
        self._side = Side(kwargs.get("attention_mask"), starts)

    def layer_hook(self, layer: str) -> Any:
        """A pre-hook that remembers the hidden states entering a layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._layer_input[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def module_hook(self, path: str, operator: RowOperator) -> Any:
        """A forward hook that adds the delta to the module's output."""
        layer = layer_of(path)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0]
            self._never_ran.pop(path, None)
            if output.ndim != 3:
                raise ValueError(
                    f"{path}: its output has shape {tuple(output.shape)}, expected (batch, seq, width); a module that "
                    "flattens rows and tokens cannot run one composition per row"
                )
            return output + operator(x, self._context(path, layer, x))

        return hook

    def _context(self, path: str, layer: str, x: Tensor) -> GateContext:
        side, layer_input = self._side, self._layer_input.get(layer)
        if x is self._encoder_states:  # which no layer of the decoder has as its input
            side, layer_input = self._encoder_side, None if layer_input is None else x
        return GateContext(path, layer_input, side.mask, side.prompt_mask, self._memory, self._scratch)


def resolve(model: nn.Module, path: str) -> nn.Module:
    """The module of that path."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        last = path.rpartition(".")[2]
        near = [name for name, _ in model.named_modules() if name.endswith("." + last)][:3]
        hint = f"modules of that kind: {', '.join(near)}" if near else f"no module is called {last!r}"
        raise LookupError(
            f"{type(model).__name__} has no module {path!r} ({hint}); the adapter was made for another base model"
        ) from None


def module_shape(module: nn.Module) -> tuple[str, int, int] | None:
    """(kind, d_in, d_out) of a module that an adapter can be put on; None for any other."""
    if isinstance(module, nn.Embedding):
        return "embedding", module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Linear):
        return "linear", module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2:
        return "linear", weight.shape[0], weight.shape[1]  # GPT-2 keeps (d_in, d_out)
    return None


def check_fit(path: str, module: nn.Module, delta: LowRankDelta) -> None:
    """Raise unless the delta fits the module."""
    wanted = (delta.kind, delta.A.shape[-1], delta.B.shape[-2])
    shape = module_shape(module)
    if shape is None:
        raise ValueError(f"{path!r} is a {type(module).__name__}; adapters go on Linear, Conv1D and Embedding")
    if shape != wanted:
        raise ValueError(
            f"{path!r} is {shape[0]} {shape[1]} -> {shape[2]}, the adapter is {wanted[0]} {wanted[1]} -> {wanted[2]}; "
            "it was made for another base model"
        )


def on_module(delta: LowRankDelta, module: nn.Module) -> LowRankDelta:
    """The delta on the device and in the dtype that the module computes with.

    Embeddings that scale their output (Gemma, BART) scale the adapter's part as well, as PEFT does.
    """
    weight = module.get_parameter("weight")
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    scale = getattr(module, "embed_scale", None)
    if delta.kind == "embedding" and scale is not None:
        delta = replace(delta, B=delta.B * torch.as_tensor(scale).to(delta.B))
    return delta.to(weight.device, dtype)
