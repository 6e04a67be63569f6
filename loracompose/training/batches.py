"""Length-bucketed batches whose order is a function of the seed, and the loss on their responses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from loracompose.training.data import EncodedExample

# Examples of this many batches are sorted by length together: less padding, yet no epoch repeats another's batches.
BUCKET = 8
IGNORED = -100


def batch_plan(lengths: Sequence[int], batch_size: int, *, steps: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """The example indices of each of `steps` batches; every epoch sees each example once, in an order of its own.

    The last batch of an epoch may be smaller.
    """
    plan: list[tuple[int, ...]] = []
    generator = torch.Generator().manual_seed(seed)
    while len(plan) < steps:
        plan.extend(_epoch(lengths, batch_size, generator))
    return tuple(plan[:steps])


def steps_per_epoch(count: int, batch_size: int) -> int:
    """How many batches one epoch has."""
    return math.ceil(count / batch_size)


def response_loss(
    model: PreTrainedModel, examples: Sequence[EncodedExample], pad_id: int, *, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the responses given their prompts, over all response tokens of the batch; a scalar.

    Logits are computed for the stretch that holds responses only: with a large vocabulary they are the
    largest tensor of a step.
    """
    if model.config.is_encoder_decoder:
        logits, targets = _encoder_decoder(model, examples, pad_id)
    else:
        logits, targets = _decoder_only(model, examples, pad_id)
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )


def _epoch(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[tuple[int, ...]] = []
    for start in range(0, len(order), batch_size * BUCKET):
        bucket = sorted(order[start : start + batch_size * BUCKET], key=lambda index: lengths[index])
        batches.extend(tuple(bucket[first : first + batch_size]) for first in range(0, len(bucket), batch_size))
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def _decoder_only(model: PreTrainedModel, examples: Sequence[EncodedExample], pad_id: int) -> tuple[Tensor, Tensor]:
    device = model.device
    ids = _pad_right([(*e.prompt, *e.response) for e in examples], pad_id).to(device)  # (batch, seq)
    mask = _pad_right([(1,) * e.length for e in examples], 0).to(device)  # (batch, seq)
    targets = _pad_right([(IGNORED,) * len(e.prompt) + e.response for e in examples], IGNORED).to(device)
    # The token at position p is predicted from p - 1.
    first = min(len(e.prompt) for e in examples) - 1
    kept = torch.arange(first, ids.shape[1] - 1, device=device)
    output = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False)
    return output.logits, targets[:, first + 1 :]  # (batch, kept, vocab), (batch, kept)


def _encoder_decoder(model: PreTrainedModel, examples: Sequence[EncodedExample], pad_id: int) -> tuple[Tensor, Tensor]:
    device = model.device
    ids = _pad_right([e.prompt for e in examples], pad_id).to(device)  # (batch, seq)
    mask = _pad_right([(1,) * len(e.prompt) for e in examples], 0).to(device)
    targets = _pad_right([e.response for e in examples], IGNORED).to(device)  # (batch, seq_out)
    # Given labels, transformers shifts them to the right for the decoder.
    output = model(input_ids=ids, attention_mask=mask, labels=targets)
    return output.logits, targets


def _pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
