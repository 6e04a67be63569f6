"""One prepared batch on the model, and its texts with their traces."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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
    texts = _decode(base, output, encoded["input_ids"].shape[1])
    each = len(texts) // len(request.prompts)
    return [
        request.answer(i, tuple(texts[i * each : (i + 1) * each]), base.name, attached.never_ran)
        for i in range(len(request.prompts))
    ]


def _decode(base: BaseModel, output: Tensor, prompt_length: int) -> list[str]:
    answers = output if base.model.config.is_encoder_decoder else output[:, prompt_length:]
    return [str(text) for text in base.tokenizer.batch_decode(answers, skip_special_tokens=True)]
