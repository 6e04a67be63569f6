"""fit_lorahub: weights of a LoraHub composition from a few examples, without gradients."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loracompose.adapters.lora import Adapter
from loracompose.composers.lorahub import LoraHub
from loracompose.composition.bank import content_order, gather_banks
from loracompose.runtime.attach import attach, model_lock
from loracompose.training.batches import response_loss
from loracompose.training.data import EncodedExample, Example, encode_example

Objective = Callable[[Sequence[float]], float]
Progress = Callable[[int, float], None]


def fit_lorahub(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Sequence[Adapter],
    examples: Sequence[Example],
    *,
    budget: int = 40,
    bounds: float = 1.5,
    l1: float = 0.05,
    seed: int = 0,
    exact_sum: bool = False,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> LoraHub:
    """A LoraHub composer whose weights make the examples' responses likely: one forward pass per step and batch.

    Minimises mean response loss + l1 · mean|w| over w in [-bounds, bounds]^K with nevergrad's NGOpt from w = 0, where
    the loss is the base model's. Returns the best weights tried, which therefore are never worse than the base model
    on the examples (the paper takes the optimiser's recommendation, which may be a point never tried). The same seed
    gives the same weights, in whatever order the adapters are given. The model is had alone for one evaluation at a
    time: between two of them an engine may answer with it.

    Args:
        model: base model in eval mode.
        tokenizer: its tokenizer.
        adapters: the K adapters to weigh; the paper draws 20 at random.
        examples: a few, 5 in the paper.
        budget: evaluations of the objective.
        bounds: largest magnitude of a weight.
        l1: strength of the penalty on mean|w|.
        seed: of the optimiser; up to a few hundred evaluations NGOpt chooses COBYLA, which draws nothing at random.
        exact_sum: fit weights of the sum of the updates instead of the factors.
        batch_size: examples per forward pass.
        progress: called with the number of evaluations made and the best objective so far.

    Raises:
        ModuleNotFoundError: nevergrad is not installed.
        ValueError: no adapter, no example, an adapter twice, a model in training mode, or budget < 1.
    """
    _check(model, adapters, examples, budget)
    adapters = [adapters[i].to(model.device) for i in content_order(adapters)]
    encoded = sorted((encode_example(tokenizer, e) for e in examples), key=lambda e: e.length)
    batches = [encoded[start : start + batch_size] for start in range(0, len(encoded), batch_size)]
    composer, banks, pad_id = LoraHub(exact_sum=exact_sum), gather_banks(adapters), tokenizer.pad_token_id or 0

    def objective(weights: Sequence[float]) -> float:
        row = torch.tensor([weights], dtype=torch.float64, device=model.device)  # (1, K)
        with model_lock(model), torch.inference_mode(), attach(model, composer.compose(banks, row)):
            return mean_loss(model, batches, pad_id) + l1 * row.abs().mean().item()

    best = minimise(objective, len(adapters), budget=budget, bounds=bounds, seed=seed, progress=progress)
    learned = {adapter.fingerprint: weight for adapter, weight in zip(adapters, best, strict=True)}
    return LoraHub(learned=learned, exact_sum=exact_sum)


def mean_loss(model: PreTrainedModel, batches: Sequence[Sequence[EncodedExample]], pad_id: int) -> float:
    """Cross-entropy per response token over all batches."""
    losses: list[Tensor] = [response_loss(model, batch, pad_id, reduction="sum") for batch in batches]
    return sum(loss.item() for loss in losses) / sum(len(e.response) for batch in batches for e in batch)


def minimise(
    objective: Objective, size: int, *, budget: int, bounds: float, seed: int, progress: Progress | None = None
) -> list[float]:
    """The best of `budget` points that NGOpt tries in [-bounds, bounds]^size, the first of them 0.

    Raises:
        ModuleNotFoundError: nevergrad is not installed.
    """
    optimizer = ngopt(size, budget, bounds, seed)
    best, lowest = [0.0] * size, objective([0.0] * size)
    try:
        for step in range(1, budget):
            candidate = optimizer.ask()
            loss = objective(candidate.value.tolist())
            optimizer.tell(candidate, loss)
            if loss < lowest:
                best, lowest = candidate.value.tolist(), loss
            if progress is not None:
                progress(step + 1, lowest)
    finally:
        # NGOpt may run its solver in a thread that only its deletion ends. A traceback would keep it alive, and
        # Python waits for threads when it exits.
        del optimizer
    return best


def ngopt(size: int, budget: int, bounds: float, seed: int) -> Any:
    """NGOpt over a box around 0, with a random state of its own."""
    if importlib.util.find_spec("nevergrad") is None:
        raise ModuleNotFoundError('fitting LoraHub weights needs nevergrad: pip install "loracompose[lorahub]"')
    import nevergrad
    import numpy

    space = nevergrad.p.Array(init=numpy.zeros(size)).set_bounds(-bounds, bounds)
    space.random_state = numpy.random.RandomState(seed)
    return nevergrad.optimizers.NGOpt(parametrization=space, budget=budget)


def _check(model: PreTrainedModel, adapters: Sequence[Adapter], examples: Sequence[Example], budget: int) -> None:
    if not adapters or not examples:
        raise ValueError(f"LoraHub needs adapters and examples, got {len(adapters)} and {len(examples)}")
    names = [adapter.name for adapter in adapters]
    if len({adapter.fingerprint for adapter in adapters}) < len(adapters):
        raise ValueError(f"an adapter stands twice among {names}; its two weights could not be told apart")
    if model.training:
        raise ValueError("the model is in training mode, where dropout blurs every comparison: call model.eval()")
    if budget < 1:
        raise ValueError(f"budget must be at least 1 evaluation, got {budget}")
