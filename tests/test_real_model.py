"""The demonstration end to end: the real base model, the real encoder, the shipped pool, one mixed batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from loracompose import COMPOSERS, AdapterIndex, Engine, load_adapter
from loracompose.composers import get_composer
from loracompose.composers.base import Pool
from loracompose.composition.bank import content_order, gather_banks
from loracompose.models import DEFAULT_BASE, load_base
from loracompose.prompts import encode_prompts
from loracompose.runtime.attach import attach
from tests.tiny import relative_error

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent
POOL = ROOT / "index" / "pool"
QUESTIONS = [json.loads(line) for line in (ROOT / "index" / "demo_prompts.jsonl").read_text("utf-8").splitlines()]
PROMPTS = [question["prompt"] for question in QUESTIONS]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    index = AdapterIndex.build(POOL, tmp_path_factory.mktemp("real") / "index", strict=True)
    return Engine.from_pretrained(DEFAULT_BASE, index=index, dtype="float32")


def normal(text):
    return text.lower().replace(".", "").strip()


def last_logits(engine, prompts, adapters, weights):
    """Logits of the next token, (batch, vocabulary), through one forward pass of the whole batch."""
    inputs = encode_prompts(engine.base.tokenizer, prompts)
    deltas = get_composer("mixture").compose(gather_banks(adapters), torch.tensor(weights))
    with torch.no_grad(), attach(engine.base.model, deltas):
        return engine.base.model(**inputs).logits[:, -1]


def test_the_demo_finds_the_right_adapter_first_and_answers_right(engine):
    answers = engine.generate(PROMPTS, max_new_tokens=32, do_sample=False)
    right = {
        question["task"]
        for question, answer in zip(QUESTIONS, answers, strict=True)
        if answer.adapters[0].name == question["task"] and normal(answer.text) == normal(question["expected"])
    }
    assert right == {question["task"] for question in QUESTIONS}
    assert len(right) >= 4
    base = engine.generate(PROMPTS, adapters=[[]] * len(PROMPTS), max_new_tokens=32, do_sample=False)
    alone = [normal(b.text) == normal(q["expected"]) for q, b in zip(QUESTIONS, base, strict=True)]
    assert sum(alone) < len(alone) / 2  # the adapters are what answers, not the base


def test_every_row_of_the_demo_equals_its_prompt_alone(engine):
    names = [question["task"] for question in QUESTIONS]
    adapters = [load_adapter(POOL / name) for name in dict.fromkeys(names)]
    place = {adapter.name: i for i, adapter in enumerate(adapters)}
    weights = torch.full((len(names), len(adapters)), 0.05)
    for row, name in enumerate(names):
        weights[row, place[name]] = 0.8
    batch = last_logits(engine, PROMPTS, adapters, weights.tolist())
    for row in (0, len(names) // 2, len(names) - 1):
        alone = last_logits(engine, [PROMPTS[row]], adapters, weights[row : row + 1].tolist())
        assert (batch[row] - alone[0]).abs().max() < 1e-4 * alone.abs().max()


def test_a_pool_adapter_answers_as_it_does_in_peft(engine):
    name = QUESTIONS[0]["task"]
    inputs = encode_prompts(engine.base.tokenizer, PROMPTS[:2])
    peft = PeftModel.from_pretrained(load_base(DEFAULT_BASE, dtype="float32").model, POOL / name).eval()
    with torch.no_grad():
        want = peft(**inputs).logits[:, -1]
    got = last_logits(engine, PROMPTS[:2], [load_adapter(POOL / name)], [[1.0], [1.0]])
    assert relative_error(got, want) < 1e-5
    bare = last_logits(engine, PROMPTS[:2], [load_adapter(POOL / name)], [[0.0], [0.0]])
    assert relative_error(bare, want) > 1e-2


def made(name):
    """The composer, one that learns with the router it would start its training with."""
    kind = COMPOSERS[name]
    if not hasattr(kind, "initial"):
        return name
    adapters = [load_adapter(folder) for folder in sorted(POOL.iterdir()) if (folder / "adapter_config.json").is_file()]
    ordered = [adapters[i] for i in content_order(adapters)]
    pool = Pool(DEFAULT_BASE, 576, tuple(adapter.name for adapter in ordered), gather_banks(ordered))
    return kind(kind.initial(pool, 0, {}))


@pytest.mark.parametrize("composer", sorted(COMPOSERS))
def test_every_composer_answers_a_mixed_batch_on_the_real_model(engine, composer):
    answers = engine.generate(PROMPTS[:4], composer=made(composer), max_new_tokens=8, do_sample=False)
    right = [
        normal(answer.text) == normal(question["expected"])
        for question, answer in zip(QUESTIONS, answers, strict=False)
    ]
    assert all(answer.text.strip() for answer in answers)
    if composer in ("mixture", "selection", "linear"):
        assert sum(right) >= 2
