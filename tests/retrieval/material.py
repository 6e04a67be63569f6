"""Adapter folders on disk, a pool of them, and an embedder without a model: a hashed bag of words."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from loracompose import AdapterIndex
from loracompose.retrieval.admission import admitted
from loracompose.retrieval.entering import embedded

TASKS = {
    "french": ["translate the dog into french", "say good morning in french", "the french for a red house"],
    "sql": ["write a query that counts rows", "select the name of every user", "join both tables in one query"],
    "mood": ["is this review positive or negative", "mood of the review: I loved it", "a positive review or not"],
    "sums": ["add seven and nine", "what is twelve minus five", "multiply six by eight and add one"],
}

PROMPTS = ["translate the cat into french", "count the users with a query", "is it positive", "add six and two"]


def bag_of_words(texts):
    rows = np.zeros((len(texts), 64), dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        for word in text.lower().split():
            code = zlib.crc32(word.encode())
            row[code % 64] += 1 if code & 64 else -1
        row[0] += 0.01  # no text is a zero vector
    return rows


def make_adapter(folder, examples, seed=0, *, card=None, base_model="tiny/base", **config):
    """One PEFT adapter folder with a single small module; `card` adds to or overrides card.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {
        f"{stem}A.weight": torch.randn(2, 4, generator=generator),
        f"{stem}B.weight": torch.randn(4, 2, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    content = {"description": folder.name, "examples": list(examples), "tags": [], "license": "mit", **(card or {})}
    (folder / "card.json").write_text(json.dumps(content))
    return folder


def hidden(folder):
    """Names of hidden entries: what an unfinished step would leave."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def contents(index):
    """All that a search can see, names and numbers."""
    found = index.search(PROMPTS, k=100)
    return found.names, found.scores.tolist(), found.weights.tolist(), index.temperature


def assert_alike(found, expected):
    """The same names, and numbers up to rounding."""
    assert found[0] == expected[0]
    for numbers, others in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(numbers, others, atol=1e-5)


def place_inside(pool, home, embedder, *folders):
    """A prepared index that also refers to adapters in its own folder of copies, which it once took."""
    with AdapterIndex.build(pool, home, embedder=embedder) as index:
        for number, folder in enumerate(folders):
            made = make_adapter(home / "adapters" / folder, [f"write poem {number}"], seed=9 + number)
            with admitted(made, home, copies=False) as new:
                index.catalog.add(new.card, new.path, embedded(new.card, embedder, index.catalog.settings))
        index.search(["x"])
    return home
