"""The laws of composition: hostile material, each law as the error it leaves, and the settings that keep it.

A law is a function that runs a composer inside a model and returns how far it is from what the law says, so that
a test can demand both that a law holds (the error is rounding) and that it can fail (at a tight setting).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from loracompose.adapters.lora import Adapter, LoraFactors
from loracompose.composers.arrow import Arrow
from loracompose.composers.base import Composer, LearnedComposer, Pool
from loracompose.composers.cat import Cat
from loracompose.composers.dare import Dare, DareTies
from loracompose.composers.fusion import Fusion
from loracompose.composers.knots import Knots
from loracompose.composers.lego import Lego
from loracompose.composers.linear import Linear
from loracompose.composers.lora_flow import LoraFlow
from loracompose.composers.lorahub import LoraHub
from loracompose.composers.magnitude_prune import MagnitudePrune
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
from loracompose.composition.bank import content_order, gather_banks
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.router import Router, RouterAdapter
from loracompose.runtime.attach import attach
from loracompose.runtime.first_pass import CACHE
from loracompose.runtime.fitting import module_shape
from loracompose.runtime.plan import Wanted
from tests import tiny

BASES = ("llama", "gpt2", "t5")
# Relative, in float64. Llama's norms and rotations and T5's norms compute in float32 whatever the dtype of the model.
ROUNDING: Mapping[str, float] = {"llama": 1e-6, "gpt2": 1e-10, "t5": 1e-6}
GENERATED = 1e-6  # `generate` hands out logits and scores in float32
ALL = 10**6  # more ranks than there are

# ---------------------------------------------------------------- material


@cache
def base(name: str) -> Any:
    """One float64 base model for all tests, which no test may change."""
    return tiny.base_model(name, dtype=torch.float64)


@cache
def shapes(name: str) -> Mapping[str, tuple[str, int, int]]:
    """Kind and widths of every module that an adapter of the tests may have."""
    wanted = (*tiny.ALL_TARGETS[name], tiny.EMBEDDINGS[name])
    found = {path: module_shape(m) for path, m in base(name).named_modules() if path.rpartition(".")[2] in wanted}
    return {path: shape for path, shape in found.items() if shape is not None}


def random_adapter(
    name: str,
    on: str,
    *,
    seed: int,
    rank: int,
    scale: float = 0.3,
    modules: Sequence[str] = (),
    layer: int | None = None,
    words: bool = False,
) -> Adapter:
    """An adapter of random factors in float64.

    Args:
        name: its name.
        on: "llama", "gpt2" or "t5".
        seed: of its factors.
        rank: of every module.
        scale: standard deviation of A and of B; 0 makes B zero.
        modules: last parts of module names, all linear ones by default.
        layer: one layer only.
        words: adapts the embedding too.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = tuple(modules) or tuple(tiny.ALL_TARGETS[on])
    factors = {}
    for path, (kind, d_in, d_out) in shapes(on).items():
        inside = path.rpartition(".")[2] in chosen and (layer is None or f".{layer}." in path)
        if inside if kind == "linear" else words:
            A = torch.randn(rank, d_in, generator=generator, dtype=torch.float64) * (scale or 0.3)
            B = torch.randn(d_out, rank, generator=generator, dtype=torch.float64) * scale
            factors[path] = LoraFactors(A, B, kind)  # type: ignore[arg-type]
    return Adapter(name, factors)


@cache
def hostile_adapters(on: str = "llama") -> tuple[Adapter, ...]:
    """Unequal ranks and norms, missing modules, a zero adapter, one adapter twice, embeddings in two of them."""
    some = tiny.TARGETS[on]
    plain = random_adapter("plain", on, seed=1, rank=4)
    return (
        plain,
        random_adapter("loud", on, seed=2, rank=2, scale=0.6),
        random_adapter("late", on, seed=3, rank=7, modules=some, layer=1, words=True),
        random_adapter("zero", on, seed=4, rank=3, modules=some, scale=0.0),
        replace(plain, name="plain again"),
        random_adapter("words", on, seed=5, rank=1, modules=some[:1], words=True),
    )


@cache
def stranger(on: str = "llama") -> Adapter:
    """An adapter 100 times larger than the others, for those who must not notice it."""
    return random_adapter("stranger", on, seed=9, rank=5, scale=3.0, words=True)


@cache
def everyone() -> Pool:
    """The adapters of every base as one pool, so that one router serves the laws on all of them."""
    adapters = [adapter for on in BASES for adapter in (*hostile_adapters(on), stranger(on))]
    ordered = [adapters[i] for i in content_order(adapters)]
    return Pool("everything", 32, tuple(adapter.name for adapter in ordered), gather_banks(ordered))


def learned(kind: type[LearnedComposer], spread: float = 0.5, **settings: Any) -> Router:
    """A router of `everyone` as it starts, with noise on every tensor; a spread of 0 is the start itself."""
    start, generator = kind.initial(everyone(), 0, settings), torch.Generator().manual_seed(5)
    noisy = {
        name: tensor + spread * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in start.tensors.items()
    }
    return replace(start, tensors=noisy)


def blank(kind: type[LearnedComposer], **settings: Any) -> Router:
    """A router of `everyone` whose tensors are zero: it prefers nobody."""
    start = kind.initial(everyone(), 0, settings)
    return replace(start, tensors={name: torch.zeros_like(tensor) for name, tensor in start.tensors.items()})


def serving(composer: Composer, instead: Sequence[tuple[Adapter, Adapter]]) -> Composer:
    """The composer for other adapters in the place of those that its router knows; itself if it knows none."""
    router = getattr(composer, "router", None)
    if router is None or router.adapters is None:
        return composer
    left = [(old.fingerprint, new.fingerprint) for old, new in instead]
    renamed = []
    for known in router.adapters:
        pair = next((pair for pair in left if pair[0] == known.fingerprint), None)
        if pair is not None:
            left.remove(pair)
        renamed.append(known if pair is None else RouterAdapter(pair[1], known.name))
    return replace(composer, router=replace(router, adapters=tuple(renamed)))  # type: ignore[type-var]


# ---------------------------------------------------------------- which setting keeps which law


@dataclass(frozen=True)
class Case:
    """A composer at some hyper-parameters, with one weight for each of `hostile_adapters`."""

    composer: Composer
    weights: tuple[float, ...]


ONE = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
HALF = (0.5, 0.0, 0.0, 0.0, 0.0, 0.0)
SECOND = (0.4, 0.6, 0.0, 0.0, 0.0, 0.0)
PAIR = (0.5, 0.5, 0.0, 0.0, 0.0, 0.0)  # adapters of different ranks and norms on the same modules
EVERY = (0.3, 0.25, 0.4, 0.2, -0.15, 0.35)


FLOW = learned(LoraFlow)
EVEN = Cat.initial(everyone(), 0, {"spread": 0.0})


@dataclass(frozen=True)
class Row:
    """What a composer must keep, and at which setting.

    A negative control is a case at which a law must fail, so that a test which cannot fail is noticed. It is one of two
    things: the composer at a tighter budget and the same weights or, where no budget of the composer bears on the
    law, the composer at weights for which the law is not claimed. The second kind shows that the error is measured, not
    that a budget is kept. Laws other than these two have no control here; `tests/README.md` lists mutations that
    broke them.

    Attributes:
        settings: hyper-parameters at which every law that names no setting must hold.
        identity: one adapter of weight 1 is that adapter.
        no_identity: the negative control, at which it is not.
        weighted_sum: the composition is Σ w_i ΔW_i.
        no_weighted_sum: the negative control.
        does_not_apply: law -> why.
    """

    settings: tuple[Composer, ...]
    identity: Case
    no_identity: Case
    weighted_sum: Case | None = None
    no_weighted_sum: Case | None = None
    does_not_apply: Mapping[str, str] = field(default_factory=dict)


ROWS: Mapping[str, Row] = {
    "selection": Row(
        settings=(Selection(),),
        identity=Case(Selection(), ONE),
        no_identity=Case(Selection(), SECOND),
        weighted_sum=Case(Selection(), ONE),
        no_weighted_sum=Case(Selection(), SECOND),
    ),
    "mixture": Row(
        settings=(Mixture(),),
        identity=Case(Mixture(), ONE),
        no_identity=Case(Mixture(), HALF),
        weighted_sum=Case(Mixture(), EVERY),
        does_not_apply={"no_weighted_sum": "it has no budget that could be tight: it is the weighted sum"},
    ),
    "fusion": Row(
        settings=(Fusion(),),
        identity=Case(Fusion(), ONE),
        no_identity=Case(Fusion(), HALF),
        weighted_sum=Case(Fusion(), ONE),
        no_weighted_sum=Case(Fusion(), PAIR),  # weights of sum 1: what differs are the cross terms
    ),
    "linear": Row(
        settings=(Linear(), Linear(rank=2)),
        identity=Case(Linear(rank=ALL), ONE),
        no_identity=Case(Linear(rank=1), ONE),
        weighted_sum=Case(Linear(rank=ALL), EVERY),
        no_weighted_sum=Case(Linear(rank=1), EVERY),
    ),
    "lego": Row(
        settings=(Lego(), Lego(k=3)),
        identity=Case(Lego(k=ALL, output_reweighting=False), ONE),
        no_identity=Case(Lego(k=1), ONE),
        weighted_sum=Case(Lego(k=ALL, output_reweighting=False), EVERY),
        no_weighted_sum=Case(Lego(k=1), EVERY),
    ),
    "ties": Row(
        settings=(Ties(),),
        identity=Case(Ties(density=1.0, rank=ALL), ONE),
        no_identity=Case(Ties(density=0.2), ONE),
        does_not_apply={"weighted_sum": "the election of signs drops entries that disagree, at every density"},
    ),
    "dare": Row(
        settings=(Dare(),),
        identity=Case(Dare(drop=0.0), ONE),
        no_identity=Case(Dare(drop=0.5), ONE),
        weighted_sum=Case(Dare(drop=0.0), EVERY),
        no_weighted_sum=Case(Dare(drop=0.5), EVERY),
    ),
    "dare_ties": Row(
        settings=(DareTies(),),
        identity=Case(DareTies(drop=0.0, density=1.0, rank=ALL), ONE),
        no_identity=Case(DareTies(drop=0.5), ONE),
        does_not_apply={"weighted_sum": "the election of signs drops entries that disagree, at every density"},
    ),
    "magnitude_prune": Row(
        settings=(MagnitudePrune(),),
        identity=Case(MagnitudePrune(density=1.0), ONE),
        no_identity=Case(MagnitudePrune(density=0.2), ONE),
        weighted_sum=Case(MagnitudePrune(density=1.0), EVERY),
        no_weighted_sum=Case(MagnitudePrune(density=0.2), EVERY),
    ),
    "knots": Row(
        settings=(Knots(),),
        identity=Case(Knots(merge="sum"), ONE),
        no_identity=Case(Knots(merge="ties", density=0.2), ONE),
        weighted_sum=Case(Knots(merge="sum"), EVERY),
        no_weighted_sum=Case(Knots(merge="ties", density=0.2), EVERY),
    ),
    "lorahub": Row(
        settings=(LoraHub(), LoraHub(exact_sum=True)),
        identity=Case(LoraHub(), ONE),
        no_identity=Case(LoraHub(), HALF),
        weighted_sum=Case(LoraHub(exact_sum=True), EVERY),
        no_weighted_sum=Case(LoraHub(), EVERY),
    ),
    "arrow": Row(
        settings=(Arrow(), Arrow(top_k=1), Arrow(top_k=None, temperature=0.1)),
        identity=Case(Arrow(top_k=1), ONE),
        no_identity=Case(Arrow(), PAIR),
        # its routing replaces the weights: only without preferences is it a sum, the uniform one
        weighted_sum=Case(Arrow(top_k=None, temperature=1e12), PAIR),
        no_weighted_sum=Case(Arrow(top_k=1), PAIR),
    ),
    "rank_gating": Row(
        settings=(RankGating(), RankGating(m=1)),
        identity=Case(RankGating(m=4), ONE),
        no_identity=Case(RankGating(m=3), ONE),
        weighted_sum=Case(RankGating(m=ALL), EVERY),
        no_weighted_sum=Case(RankGating(m=8), EVERY),
    ),
    "lora_flow": Row(
        settings=(LoraFlow(FLOW), LoraFlow(FLOW, temperature=0.2)),
        # biases of sum 0, as at the start: then a member alone has the weight 1
        identity=Case(LoraFlow(learned(LoraFlow, spread=0.0)), ONE),
        no_identity=Case(LoraFlow(FLOW), ONE),
        # it replaces the weights: at the start, without a task, it is the uniform sum
        weighted_sum=Case(LoraFlow(learned(LoraFlow, spread=0.0)), PAIR),
        no_weighted_sum=Case(LoraFlow(FLOW), PAIR),
    ),
    "cat": Row(
        settings=(Cat(learned(Cat)),),
        identity=Case(Cat(learned(Cat)), ONE),
        no_identity=Case(Cat(learned(Cat)), PAIR),
        weighted_sum=Case(Cat(EVEN), PAIR),
        no_weighted_sum=Case(Cat(learned(Cat)), PAIR),
    ),
    "mole": Row(
        settings=(Mole(learned(Mole)), *(Mole(learned(Mole, granularity=g)) for g in ("matrix", "layer", "network"))),
        identity=Case(Mole(learned(Mole)), ONE),
        no_identity=Case(Mole(learned(Mole)), PAIR),
        # the gates replace the weights: with nothing learned they are the uniform sum
        weighted_sum=Case(Mole(blank(Mole)), PAIR),
        no_weighted_sum=Case(Mole(learned(Mole)), PAIR),
    ),
    "milora": Row(
        settings=(
            Milora(learned(Milora)),
            Milora(learned(Milora, top_k=1, pooler="last", activation="gelu")),
            Milora(learned(Milora, form="modules", pooler="max")),
        ),
        identity=Case(Milora(learned(Milora)), ONE),
        no_identity=Case(Milora(learned(Milora, form="modules")), ONE),
        weighted_sum=Case(Milora(learned(Milora, form="modules", top_k=ALL)), EVERY),
        no_weighted_sum=Case(Milora(learned(Milora, form="modules")), EVERY),
    ),
    "phatgoose": Row(
        settings=(Phatgoose(learned(Phatgoose)), Phatgoose(learned(Phatgoose), top_k=None)),
        identity=Case(Phatgoose(learned(Phatgoose)), ONE),
        no_identity=Case(Phatgoose(learned(Phatgoose), phase="training"), ONE),
        weighted_sum=Case(Phatgoose(blank(Phatgoose)), PAIR),
        no_weighted_sum=Case(Phatgoose(learned(Phatgoose)), PAIR),
    ),
    "ramole": Row(
        settings=(Ramole(learned(Ramole)), Ramole(learned(Ramole), elsewhere="untrained")),
        identity=Case(Ramole(learned(Ramole)), HALF),  # shares sum to 1 whatever the weights
        no_identity=Case(Ramole(learned(Ramole)), PAIR),
        weighted_sum=Case(
            Ramole(learned(Ramole, spread=0.0)), PAIR
        ),  # a router before its first step is the uniform sum
        no_weighted_sum=Case(Ramole(learned(Ramole)), PAIR),
    ),
    "smora": Row(
        # the form for pools; the form of one adapter refuses all others and has its laws in test_smora.py
        settings=(Smora(learned(Smora)), Smora(learned(Smora), active=1), Smora(learned(Smora), active=ALL)),
        identity=Case(Smora(learned(Smora, spread=0.0), active=ALL), ONE),
        no_identity=Case(Smora(learned(Smora), active=ALL), ONE),
        weighted_sum=Case(Smora(learned(Smora, spread=0.0), active=ALL), EVERY),
        no_weighted_sum=Case(Smora(learned(Smora, spread=0.0)), EVERY),
    ),
    "xlora": Row(
        settings=(Xlora(learned(Xlora)), Xlora(learned(Xlora, granularity="network", depth=3, width=8))),
        identity=Case(Xlora(learned(Xlora)), ONE),
        no_identity=Case(Xlora(learned(Xlora)), PAIR),
        weighted_sum=Case(Xlora(learned(Xlora, spread=0.0)), PAIR),  # before its first step it is the uniform sum
        no_weighted_sum=Case(Xlora(learned(Xlora)), PAIR),
    ),
}

# ---------------------------------------------------------------- rows of a batch

# rows of a batch over the hostile adapters: several members, one, none, all, and negative weights with a repeated row
BATCH = (
    (0.5, 0.3, 0.2, 0.0, 0.0, 0.0),
    (0.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (0.2, 0.1, 0.3, 0.1, 0.4, 0.6),
    (-0.4, 0.7, 0.0, 0.0, 0.0, 0.3),
    (0.0, 0.0, 0.0, 1.0, 0.0, 0.0),
    (0.5, 0.3, 0.2, 0.0, 0.0, 0.0),
)
LENGTHS = (7, 2, 5, 4, 6, 1, 3)
NEW = 4  # tokens to generate


def prompts(lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    """Random token ids of the given lengths, without padding or end tokens."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, tiny.VOCABULARY, (n,), generator=generator) for n in lengths]


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Prompts of one batch, padded on the left, with their mask."""
    width = max(len(row) for row in rows)
    ids = torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


# ---------------------------------------------------------------- running


def compose_rows(
    composer: Composer, adapters: Sequence[Adapter], weights: Sequence[Sequence[float]]
) -> Mapping[str, LowRankDelta]:
    """Deltas of a batch as `compose` and the engine make them: adapters in the order of their content."""
    order = content_order(adapters)
    rows = torch.tensor(weights, dtype=torch.float64)[:, order]
    return composer.compose(gather_banks([adapters[i] for i in order]), rows)


def logits(
    model: nn.Module, deltas: Mapping[str, LowRankDelta], on: str, *, batch: int = 2, form: Wanted = "auto"
) -> Tensor:
    """Logits under the deltas on fixed tokens, (batch, seq, vocabulary)."""
    with attach(model, deltas, form=form):
        return tiny.logits(model, on, batch=batch, seq=6)


def composed_logits(
    composer: Composer, adapters: Sequence[Adapter], weights: Sequence[float], on: str = "llama"
) -> Tensor:
    """Logits of two prompts under one composition."""
    return logits(base(on), compose_rows(composer, adapters, [weights]), on)


def generate(
    on: str,
    inputs: Mapping[str, Tensor],
    deltas: Mapping[str, LowRankDelta],
    *,
    form: Wanted = "auto",
    **settings: Any,
) -> Any:
    """NEW tokens for every row, with what the model thought of them."""
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    wanted = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    with attach(base(on), deltas, form=form):
        return base(on).generate(**inputs, **length, **wanted, **settings)


def distance(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest magnitude of what is wanted."""
    error = ((got - want).abs().max() / want.abs().max()).item()
    return error if math.isfinite(error) else math.inf


# ---------------------------------------------------------------- laws, as the error that they leave


def identity_error(case: Case, on: str, loaded: Adapter, peft: nn.Module) -> float:
    """One adapter of weight 1 among adapters that are no members, against the same adapter in PEFT."""
    adapters = (loaded, *hostile_adapters(on)[1:])
    composer = serving(case.composer, [(hostile_adapters(on)[0], loaded)])
    got = composed_logits(composer, adapters, case.weights, on)
    return distance(got, tiny.logits(peft, on, batch=2, seq=6))


def weighted_sum_error(case: Case, on: str = "llama") -> float:
    """The composition against a model whose weights were changed by the dense Σ w_i B_i A_i."""
    adapters = hostile_adapters(on)
    dense = dense_sum(on, adapters, case.weights)
    return distance(composed_logits(case.composer, adapters, case.weights, on), tiny.logits(dense, on, batch=2, seq=6))


def dense_sum(on: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> nn.Module:
    """A copy of the base with Σ w_i B_i A_i added to its weights."""
    model = copy.deepcopy(base(on))
    for adapter, w in zip(adapters, weights, strict=True):
        for path, factors in adapter.factors.items():
            module = model.get_submodule(path)
            update = w * factors.B @ factors.A  # (d_out, d_in)
            stands = isinstance(module, nn.Linear)  # Conv1D and embeddings keep (d_in, d_out)
            # a new parameter, because an embedding may share the old one with the output head
            module.weight = nn.Parameter(module.weight.detach() + (update if stands else update.mT))
    return model


def order_error(composer: Composer, order: Sequence[int], on: str = "llama") -> float:
    """The same adapters with the same weights, given in another order."""
    adapters = hostile_adapters(on)
    got = composed_logits(composer, [adapters[i] for i in order], [EVERY[i] for i in order], on)
    return distance(got, composed_logits(composer, adapters, EVERY, on))


def stranger_error(composer: Composer, on: str = "llama") -> float:
    """Rows with and without an adapter of weight 0 that is 100 times larger, and that another row uses."""
    adapters = hostile_adapters(on)
    weights = BATCH[:5]
    alone = logits(base(on), compose_rows(composer, adapters, weights), on, batch=5)
    beside = [*((*row, 0.0) for row in weights[:4]), (0.0,) * 6 + (1.0,)]
    got = logits(base(on), compose_rows(composer, [*adapters, stranger(on)], beside), on, batch=5)
    return distance(got[:4], alone[:4])


def gauge_error(composer: Composer, on: str = "llama") -> float:
    """The same updates factorised otherwise: A -> M⁻¹ A, B -> B M."""
    adapters = hostile_adapters(on)
    prints = [adapter.fingerprint for adapter in adapters]
    others = [regauged(adapter, seed=prints.index(adapter.fingerprint)) for adapter in adapters]
    same = serving(composer, list(zip(adapters, others, strict=True)))
    return distance(composed_logits(same, others, EVERY, on), composed_logits(composer, adapters, EVERY, on))


def regauged(adapter: Adapter, seed: int) -> Adapter:
    """An adapter of the same updates in other factors."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, f in adapter.factors.items():
        M = torch.randn(f.rank, f.rank, generator=generator, dtype=torch.float64)
        M = M + 2 * math.sqrt(f.rank) * torch.eye(f.rank, dtype=torch.float64)  # well away from singular
        factors[module] = replace(f, A=torch.linalg.solve(M, f.A), B=f.B @ M)
    return Adapter(adapter.name, factors)


def cache_error(composer: Composer, on: str) -> float:
    """Prefill and one decoding step per token with the cache, against one full pass.

    What is decided by the prompt is decided by the tokens of the prefill, so the full pass is told which these are.
    """
    rows, prefill = BATCH[:4], 1 if on == "t5" and composer.scope == "prompt" else 5
    deltas, model = compose_rows(composer, hostile_adapters(on), rows), base(on)
    inputs = torch.stack(prompts([8] * len(rows)))  # (batch, 8)
    encoder = {"input_ids": inputs.flip(1)} if on == "t5" else {}
    tokens = "decoder_input_ids" if on == "t5" else "input_ids"
    # an encoder reads nothing but the prompt; of its decoder's tokens the first alone counts as prompt
    prompt = torch.arange(8).expand(len(rows), -1) < (8 if on == "t5" else prefill)
    with torch.no_grad():
        with attach(model, deltas, prompt if composer.scope == "prompt" else None):
            full = model(**encoder, **{tokens: inputs}).logits
        pieces, past = [], None
        with attach(model, deltas):
            for piece in inputs.split([prefill, *[1] * (8 - prefill)], dim=1):
                out = model(**encoder, **{tokens: piece, CACHE: past}, use_cache=True)
                pieces.append(out.logits)
                past = out[CACHE]
    return distance(torch.cat(pieces, dim=1), full)
