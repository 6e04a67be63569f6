"""One prepared batch on the model, and its texts with their traces."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loracompose.decoding import asked
from loracompose.models import BaseModel
from loracompose.prompts import encode_prompts
from loracompose.request import Request
from loracompose.runtime.attach import attach, model_lock
from loracompose.runtime.attachment import Attachment
from loracompose.trace import Generation


@contextmanager
def running(base: BaseModel, request: Request) -> Iterator[Attachment]:
    """The model for ourselves, with the deltas of a request on it."""
    with model_lock(base.model), torch.inference_mode(), attach(base.model, request.deltas) as attached:
        yield attached


def answer(base: BaseModel, request: Request, settings: Mapping[str, Any]) -> list[Generation]:
    """Generate for all prompts of a request.

    Args:
        base: the model.
        request: the batch.
        settings: arguments of the model's `generate` beside the prompts.
    """
    encoded = encode_prompts(base.tokenizer, request.prompts, base.tokenizer.padding_side).to(base.device)
    with running(base, request) as attached:
        start = time.perf_counter()  # the wait for the model is over
        output = base.model.generate(**encoded, **settings)
        request.timings["generate"] = time.perf_counter() - start
    answers = output if base.model.config.is_encoder_decoder else output[:, encoded["input_ids"].shape[1] :]
    texts = _decode(base, answers)
    # An encoder-decoder's answers begin with the token that its decoder starts from, and a row that ended before others
    # is filled up with the padding token.
    over = end_tokens(base, settings) | {int(base.tokenizer.pad_token_id)}
    made = count_new(answers[:, 1:] if base.model.config.is_encoder_decoder else answers, over)
    read = encoded["attention_mask"].sum(dim=1).tolist()
    each = len(texts) // len(request.prompts)
    rows = [slice(i * each, (i + 1) * each) for i in range(len(request.prompts))]
    return [
        request.answer(i, tuple(texts[own]), base.name, attached.never_ran, read[i], tuple(made[own]))
        for i, own in enumerate(rows)
    ]


def end_tokens(base: BaseModel, settings: Mapping[str, Any]) -> frozenset[int]:
    """The tokens that end an answer; none for a model that has none."""
    ends = asked("eos_token_id", settings, base.model.generation_config)
    return frozenset([] if ends is None else torch.as_tensor(ends).flatten().tolist())


def count_new(answers: Tensor, ends: frozenset[int]) -> list[int]:
    """Tokens of each row of answers, (rows, seq), before the first that ends it."""
    over = torch.isin(answers, torch.tensor(sorted(ends), device=answers.device))
    return [int(count) for count in (over.cumsum(dim=1) == 0).sum(dim=1)]


def _decode(base: BaseModel, answers: Tensor) -> list[str]:
    return [str(text) for text in base.tokenizer.batch_decode(answers, skip_special_tokens=True)]
