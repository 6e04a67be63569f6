"""Which module a delta goes on, and whether it fits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from transformers.pytorch_utils import Conv1D

from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext
from loracompose.runtime.machine import Machines

COMPUTING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def computing_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the hidden states: that of the first parameter which is no storage of quantised weights."""
    return next((weight.dtype for weight in model.parameters() if weight.dtype in COMPUTING), torch.float32)


def on_module(delta: LowRankDelta, module: nn.Module, states: torch.dtype, machines: Machines) -> LowRankDelta:
    """The delta on the device of the module and in the dtype that it is multiplied in: mostly that of the module.

    Embeddings that scale their output (Gemma, BART) scale the adapter's part as well, as PEFT does.

    Args:
        delta: to put on.
        module: where.
        states: dtype of the model's hidden states, for a module whose weight only stores (8 or 4 bits a number).
        machines: which know where 16-bit numbers are multiplied as float32.
    """
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"the weight of a {type(module).__name__} is a {type(weight).__name__}, expected a tensor")
    dtype = weight.dtype if weight.dtype in COMPUTING else states
    scale = getattr(module, "embed_scale", None)
    if delta.kind == "embedding" and scale is not None:
        delta = replace(delta, B=delta.B * torch.as_tensor(scale).to(delta.B))
    return delta.to(weight.device, machines.multiplied(weight.device, dtype))


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """States, ids or outputs of a model as a wider delta of that dtype multiplies them; autocast chooses by itself."""
    if x.dtype == dtype or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtype) if x.dtype.itemsize < dtype.itemsize else x


def widened_context(context: GateContext, x: Tensor, states: Tensor) -> GateContext:
    """What a gate may know beside a module's input that was widened: the layer's input widened, too.

    Where both were one tensor they are one again, by which gates tell an encoder's tokens. `base_states` stay as they
    are: a gate keeps what it makes of them by the very tensor.

    Args:
        context: what is known.
        x: the input of the module.
        states: the same, widened.
    """
    layer_input = context.layer_input
    if layer_input is None or states is x:
        return context
    return replace(context, layer_input=states if layer_input is x else widened(layer_input, states.dtype))


def gives_own_output(module: nn.Module) -> bool:
    """Whether nobody but the caller holds what the module returns, which may then be written to.

    So it is of the two layers whose `forward` is known to return a new tensor, as long as no hook sees it first.
    """
    plain = type(module) is nn.Linear or type(module) is Conv1D
    return plain and "forward" not in vars(module) and not module._forward_hooks and not _global_forward_hooks
