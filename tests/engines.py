"""A tiny engine: a Llama from a configuration, a tokenizer of single characters, an index of four adapters."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import PreTrainedTokenizerFast

from loracompose import AdapterIndex, Engine
from loracompose.retrieval.embedding import CallableEmbedder
from tests.retrieval.material import TASKS, bag_of_words
from tests.tiny import base_model, peft_adapter

CHATML = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; 0 pads, 1 begins, 2 ends."""
    characters = {chr(i): i - 29 for i in range(32, 127)}
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **characters, "\n": 98}
    tok = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tok.decoder = Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    wrapped.chat_template = template
    return wrapped


def build_pool(folder: Path) -> Path:
    """Four adapters of unequal rank and modules whose cards come from TASKS."""
    shapes = [
        {"r": 4},
        {"r": 2, "target_modules": ["q_proj", "k_proj", "o_proj"]},
        {"r": 8, "use_rslora": True},
        {"r": 3, "target_modules": ["gate_proj", "down_proj"]},
    ]
    for seed, ((name, examples), shape) in enumerate(zip(TASKS.items(), shapes, strict=True), 1):
        peft_adapter(folder, name, seed=seed, scale=0.5, examples=examples, **shape)
    return folder


def build_engine(folder: Path, *, dtype: torch.dtype = torch.float32, **kwargs) -> Engine:
    """An engine over a fresh index in `folder`."""
    pool = build_pool(folder / "pool")
    embedder = CallableEmbedder(bag_of_words, "bag-of-words", "1")
    index = AdapterIndex.build(pool, folder / "index", embedder=embedder)
    return Engine.from_pretrained(base_model(dtype=dtype), tokenizer=tokenizer(), index=index, **kwargs)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
