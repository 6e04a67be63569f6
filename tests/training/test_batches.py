"""Batches: complete, deterministic, of like lengths; and a loss on responses alone."""

from __future__ import annotations

import pytest
import torch

from loracompose.training.batches import batch_plan, response_loss, steps_per_epoch
from loracompose.training.data import EncodedExample
from tests.tiny import base_model

LENGTHS = torch.randint(5, 100, (333,), generator=torch.Generator().manual_seed(3)).tolist()
EXAMPLES = [
    EncodedExample((1, 9, 8, 7), (5, 2)),
    EncodedExample((1, 30, 31, 32, 33, 34, 35), (6, 7, 8, 2)),
    EncodedExample((1, 40), (9, 10, 11, 12, 13, 2)),
]


def test_every_epoch_holds_each_example_once_in_its_own_order():
    count = steps_per_epoch(len(LENGTHS), 16)
    plan = batch_plan(LENGTHS, 16, steps=2 * count, seed=0)
    first, second = plan[:count], plan[count:]
    for epoch in (first, second):
        assert sorted(index for batch in epoch for index in batch) == list(range(len(LENGTHS)))
    assert first != second


def test_a_plan_is_a_function_of_the_seed_and_a_shorter_one_its_beginning():
    plan = batch_plan(LENGTHS, 16, steps=30, seed=0)
    assert plan == batch_plan(LENGTHS, 16, steps=30, seed=0)
    assert plan[:7] == batch_plan(LENGTHS, 16, steps=7, seed=0)
    assert plan != batch_plan(LENGTHS, 16, steps=30, seed=1)


def test_a_batch_holds_examples_of_like_length():
    plan = batch_plan(LENGTHS, 16, steps=steps_per_epoch(len(LENGTHS), 16), seed=0)
    padded = sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in plan)
    assert padded < 1.15 * sum(LENGTHS)


def test_batches_of_all_lengths_come_early():
    plan = batch_plan(LENGTHS, 16, steps=8, seed=0)
    longest = [max(LENGTHS[index] for index in batch) for batch in plan]
    assert longest != sorted(longest)


@pytest.mark.parametrize("base", ["llama", "gpt2", "t5"])
def test_the_loss_of_a_batch_is_that_of_its_rows_one_by_one(base):
    model = base_model(base, dtype=torch.float64)
    alone = sum(response_loss(model, [example], 0, reduction="sum") for example in EXAMPLES)
    tokens = sum(len(example.response) for example in EXAMPLES)
    assert response_loss(model, EXAMPLES, 0).item() == pytest.approx(alone.item() / tokens, abs=1e-6)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_the_loss_is_the_cross_entropy_of_the_response_given_the_prompt(base):
    model, example = base_model(base), EXAMPLES[1]
    ids = torch.tensor([[*example.prompt, *example.response]])
    logs = model(ids).logits.log_softmax(-1)[0]
    start = len(example.prompt)
    expected = -sum(logs[start + i - 1, token] for i, token in enumerate(example.response)) / len(example.response)
    assert response_loss(model, [example], 0).item() == pytest.approx(expected.item(), abs=1e-6)


def test_an_encoder_decoder_learns_the_response_from_the_prompt():
    model, example = base_model("t5"), EXAMPLES[1]
    expected = model(input_ids=torch.tensor([example.prompt]), labels=torch.tensor([example.response])).loss
    assert response_loss(model, [example], 0).item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_padding_token_does_not_matter_even_if_it_is_the_end_token():
    model = base_model(dtype=torch.float64)
    assert response_loss(model, EXAMPLES, 0).item() == pytest.approx(response_loss(model, EXAMPLES, 2).item(), abs=1e-9)
