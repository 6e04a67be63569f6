"""The third form of a delta: in the weight of its module, for as long as a block runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loracompose.composition.delta import LowRankDelta

# float8 is a floating dtype too, but its modules keep scales beside their weights
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PRECISE = (torch.float64, torch.float32)


def keeps_precision(module: nn.Module) -> bool:
    """Whether the weight of a module is precise enough that an update folded into it is not rounded off."""
    weight = module.weight
    return isinstance(weight, Tensor) and weight.dtype in PRECISE


def why_not_foldable(module: nn.Module, delta: LowRankDelta, weights: Tensor) -> str:
    """What keeps a delta from being folded into the weight of its module; "" if nothing does.

    Args:
        module: the module.
        delta: its delta.
        weights: those of the delta, on the CPU.
    """
    if delta.kind != "linear":
        return "an embedding only looks up what its tokens need"
    if delta.gate is not None:
        return "its gate decides token by token"
    if delta.per_row or not bool((weights == weights[:1]).all()):
        return "the rows of the batch have different compositions"
    if any(t.requires_grad for t in (delta.A, delta.B, delta.weights)):
        return "gradients flow into the delta"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other tensors"
    if type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
        return f"a {type(module).__name__} may keep its weight in a format of its own"
    if type(weight.data) is not Tensor or weight.dtype not in PLAIN or weight.device.type == "meta":
        return f"its weight is a {type(weight.data).__name__} of {weight.dtype} on {weight.device}"
    return ""


def folded_weight(module: nn.Module, delta: LowRankDelta) -> nn.Parameter:
    """W + B diag(w) A with the weights of the first row, computed in float32 or better and rounded once."""
    weight = module.get_parameter("weight")
    # A parameter made in inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        precise = torch.promote_types(weight.dtype, torch.float32)
        w = delta.weights[0].to(precise)
        on = w != 0  # an adapter that overflows must not reach rows that do not use it
        A, B = delta.A[on].to(precise), delta.B[:, on].to(precise) * w[on]
        stands = isinstance(module, nn.Linear)  # GPT-2's Conv1D keeps (d_in, d_out)
        sides = (B, A) if stands else (A.mT, B.mT)
        return nn.Parameter(
            torch.addmm(weight.to(precise), *sides).to(weight.dtype), requires_grad=weight.requires_grad
        )


@contextmanager
def folded(modules: Mapping[str, nn.Module], deltas: Mapping[str, LowRankDelta]) -> Iterator[None]:
    """Run modules with other weights while the block runs; afterwards they have their own again.

    The parameter is exchanged and not written to, so what shares its memory or is tied to it (an embedding and the
    output head, another model) is left alone, and the original comes back as the object it was, bit by bit, after
    an exception too. Costs the memory of the weights once more.
    """
    own: dict[str, nn.Parameter] = {}
    try:
        for path, delta in deltas.items():
            changed = folded_weight(modules[path], delta)
            own[path] = modules[path].get_parameter("weight")
            modules[path].weight = changed
        yield
    finally:
        for path, weight in reversed(own.items()):  # two paths may lead to one module
            modules[path].weight = weight
