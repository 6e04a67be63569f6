"""Adapters of two layers, of unequal ranks and modules, and random inputs of every module, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter
from loracompose.composers.base import Composer, LearnedComposer, Pool
from loracompose.composition.bank import content_order, gather_banks
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext
from loracompose.composition.layers import layer_of
from loracompose.composition.router import Router
from tests.composers.one_module import factors

HIDDEN = 6
# in the order in which a model would run them
SHAPES = {
    f"model.layers.{layer}.{module}": shape
    for layer in (0, 1)
    for module, shape in {
        "self_attn.q_proj": (HIDDEN, 9),
        "self_attn.k_proj": (HIDDEN, 4),
        "self_attn.o_proj": (9, HIDDEN),
        "mlp.up_proj": (HIDDEN, 8),
        "mlp.down_proj": (8, HIDDEN),
    }.items()
}
MODULES = tuple(SHAPES)
Q0, K0, O0, UP0 = MODULES[:4]
BATCH, SEQ = 4, 5
# padding on the left, and answers behind the prompts
REAL = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
PROMPT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
# all, two, one and no members
WEIGHTS = ((0.5, -0.2, 1.0, 0.3), (0.0, 0.4, 0.0, 2.0), (0.0, 0.0, 0.7, 0.0), (0.0, 0.0, 0.0, 0.0))


def adapters() -> list[Adapter]:
    """Four adapters sorted by content; the third leaves attention alone, the fourth the second layer."""
    made = []
    for i, rank in enumerate((3, 1, 2, 4)):
        left_out = {2: "self_attn", 3: "layers.1"}.get(i, "nothing")
        paths = [path for path in MODULES if left_out not in path]
        made.append(Adapter(f"a{i}", {p: factors(rank, 10 * i + n, *SHAPES[p]) for n, p in enumerate(paths)}))
    return [made[i] for i in content_order(made)]


def pool(members: Sequence[Adapter] | None = None) -> Pool:
    chosen = list(adapters() if members is None else members)
    return Pool("toy", HIDDEN, tuple(a.name for a in chosen), gather_banks(chosen))


def noisy(router: Router, spread: float = 0.7) -> Router:
    """The router with noise on every tensor, in float64 and with gradients."""
    generator = torch.Generator().manual_seed(2)
    return replace(
        router,
        tensors={
            name: (t + spread * torch.randn(t.shape, generator=generator)).double().requires_grad_()
            for name, t in router.tensors.items()
        },
    )


def learned(kind: type[LearnedComposer], **settings: object) -> Router:
    return noisy(kind.initial(pool(), 0, settings))


def inputs(width: int | None = None) -> dict[str, Tensor]:
    """x (batch, seq, d_in) of every module; of the given width and by layer, the hidden states that enter it."""
    generator = torch.Generator().manual_seed(8)
    if width is None:
        shapes = {path: d_in for path, (d_in, _) in SHAPES.items()}
    else:
        shapes = {layer: width for layer in sorted({layer_of(path) for path in MODULES})}
    return {path: torch.randn(BATCH, SEQ, d, generator=generator, dtype=torch.float64) for path, d in shapes.items()}


def run(
    deltas: Mapping[str, LowRankDelta],
    x: Mapping[str, Tensor],
    *,
    memory: dict[str, Tensor] | None = None,
    scratch: dict[str, Tensor] | None = None,
    prompt: Tensor | None = PROMPT,
    base: Tensor | None = None,
) -> dict[str, Tensor]:
    """What every module gains when the modules run one after another, (batch, seq, d_out) each."""
    memory, scratch = {} if memory is None else memory, {} if scratch is None else scratch
    hidden, found = inputs(HIDDEN), {}
    for path in MODULES:
        if path in deltas:
            context = GateContext(path, hidden[layer_of(path)], REAL, prompt, memory, scratch, base)
            found[path] = deltas[path](x[path], context)
    return found


def composed(
    composer: Composer, weights: Sequence[Sequence[float]] = WEIGHTS, chosen: Sequence[Adapter] | None = None
) -> Mapping[str, LowRankDelta]:
    banks = gather_banks(list(adapters() if chosen is None else chosen))
    return composer.compose(banks, torch.tensor(weights, dtype=torch.float64))


def score(outputs: Mapping[str, Tensor]) -> Tensor:
    """A scalar that every output has a different part in."""
    total = torch.zeros((), dtype=torch.float64)
    for path in sorted(outputs):
        steps = torch.arange(outputs[path].numel(), dtype=torch.float64).reshape(outputs[path].shape)
        total = total + (outputs[path] * steps.sin()).sum()
    return total


def gradients(loss: Tensor, router: Router) -> dict[str, Tensor]:
    names = sorted(router.tensors)
    found = torch.autograd.grad(loss, [router.tensors[n] for n in names], allow_unused=True)
    return {n: torch.zeros_like(router.tensors[n]) if g is None else g for n, g in zip(names, found, strict=True)}
