"""attach: put deltas on a model for the length of a `with`, by hooks that we own and remove."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import asks_base
from loracompose.composition.layers import layer_of
from loracompose.runtime.assembly import Assembly
from loracompose.runtime.attachment import Attachment
from loracompose.runtime.first_pass import FirstPass
from loracompose.runtime.fitting import check_fit, computing_dtype, on_module, resolve
from loracompose.runtime.folding import folded
from loracompose.runtime.machine import Machine, Machines
from loracompose.runtime.plan import Wanted, check_form


@contextmanager
def attach(
    model: nn.Module,
    deltas: Mapping[str, LowRankDelta],
    prompt_mask: Tensor | None = None,
    *,
    form: Wanted = "auto",
    tokens: int | None = None,
    machine: Machine | None = None,
) -> Iterator[Attachment]:
    """Add each delta to the output of its module while the block runs.

    Outside the block the model is bit-identical to the model before it, after success and after an exception. No
    module is replaced and no weight is written to; only in the form "folded" modules run with a weight of ours, and
    get their own back. Blocks may be nested, but for gates that ask for the bare base's states; each removes its own
    hooks. Hooks that others put on modules inside of the block may see outputs to which the delta is added afterwards.

    Args:
        model: the base model.
        deltas: module path -> delta; the rows of a batch given to the model are the rows of the deltas, or
            each row several times in a row as `generate` lays out beams and return sequences.
        prompt_mask: (batch, seq) bool, the tokens that belong to the prompts, for a model that is given prompts and
            answers at once; None where its first call gets the prompts alone, as in `generate`. An encoder-decoder's
            are the tokens of its encoder; of what its decoder reads, the token it starts from counts as prompt.
        form: "auto" lets the plan choose among equal forms, module by module and pass by pass. "shared", "gathered"
            and "folded" force one, for static deltas of linear modules; gated deltas and embeddings always share
            their bank, but "folded" refuses what is gated.
        tokens: how many decoding steps to expect. With them the plan may fold a composition that all rows share
            into the weights; None never folds. It never folds into 16-bit weights, which would round the delta off.
        machine: what the plan counts with, and whether deltas beside 16-bit weights are multiplied in float32; None is
            what `calibrate` measured here, or else fixed constants.

    Yields:
        The attachment, which knows afterwards which deltas never ran.

    Raises:
        LookupError: the model has no module of that path.
        ValueError: a delta does not fit its module's shape, the module takes no (batch, seq, width) input,
            a delta cannot have the form that is forced, or a gate asks for the bare base's states and another block
            is on the model.
    """
    check_form(form)
    modules = {path: resolve(model, path) for path in deltas}
    for path, module in modules.items():
        check_fit(path, module, deltas[path])
    states, machines = computing_dtype(model), Machines(machine)
    ready = {path: on_module(delta, modules[path], states, machines) for path, delta in deltas.items()}
    first = FirstPass(model) if any(asks_base(delta.gate) for delta in deltas.values()) else None
    check_nesting(model, first)
    # what is folded into the weights would act in a pass of the bare base too
    assembly = Assembly(modules, ready, form, tokens if first is None else None, machines)
    inside, beside, weights = assembly.split()
    if first is not None and inside:
        raise ValueError(
            f"{next(iter(inside))} cannot run folded into its weight beside a gate that asks for the states of the "
            "bare base; leave form to 'auto'"
        )
    request = Attachment(deltas, prompt_mask, first)
    with ExitStack() as hooks:
        operators = assembly.operators(beside, weights, request.product)
        gates = {path: delta.gate for path, delta in beside.items() if delta.gate is not None}
        for part, start in request.starts(model) if gates else ():
            hooks.callback(part.register_forward_pre_hook(start, with_kwargs=True).remove)
        if first is not None:
            hooks.enter_context(first.attached())
        for layer in sorted({layer_of(path) for path, gate in gates.items() if gate.needs_layer_input}):
            hook = resolve(model, layer).register_forward_pre_hook(request.layer_hook(layer), with_kwargs=True)
            hooks.callback(hook.remove)
        for path, add in operators.items():
            hooks.callback(modules[path].register_forward_hook(request.module_hook(path, add)).remove)
        for path in inside:
            hooks.callback(modules[path].register_forward_hook(request.presence_hook(path)).remove)
        hooks.callback(model.register_forward_hook(request.end_pass, always_call=True).remove)
        hooks.callback(request.product.close)
        hooks.enter_context(folded(modules, inside))
        yield request


def check_nesting(model: nn.Module, first: FirstPass | None) -> None:
    """Raise if the base would not be bare in a first pass: this block's, or that of a block around it."""
    around = [getattr(hook, "__self__", None) for hook in model._forward_hooks.values()]
    others = [request for request in around if isinstance(request, Attachment)]
    if others and (first is not None or any(other.first is not None for other in others)):
        raise ValueError(
            "a gate that asks for the bare base's states cannot share its model with another attach: what either adds "
            "would not be told from the base; put all deltas into one attach"
        )


# Hooks are put on the model, so whoever generates must have it alone, whichever engine asks. Not state of the
# library but of the models: an entry lives as long as its model.
_LOCKS: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


def model_lock(model: nn.Module) -> threading.Lock:
    """The one lock of a model, shared by everybody who attaches to it."""
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(model, threading.Lock())
