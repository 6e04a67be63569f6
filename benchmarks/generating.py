"""Which of transformers' own ways to generate is fastest for a batch on this machine, without adapters.

    python benchmarks/generating.py index/demo_prompts.jsonl -o benchmarks/results/generating.json

A cache that grows, one of full length from the start, and continuous batching, which lays the tokens of all prompts in
one row and so lets a prompt begin where another has ended. All answer the same prompts, greedily, to their ends.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from loracompose.benchmarks.speed.measure import machine
from loracompose.benchmarks.speed.rounds import compared, summary
from loracompose.durable import write_whole
from loracompose.models import BaseModel, load_base
from loracompose.prompts import encode_prompts

NEW_TOKENS = 48
Ids = list[list[int]]


def ways(base: BaseModel, prompts: list[str]) -> dict[str, Callable[[], Ids]]:
    """What answers the prompts, with the tokens of every answer."""
    inputs = encode_prompts(base.tokenizer, prompts)
    length = inputs["input_ids"].shape[1]
    alone = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    ends = base.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    pad = base.tokenizer.pad_token_id

    def together(**more: Any) -> Ids:
        with torch.inference_mode():
            out = base.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **more)
        return [until(row, ends) for row in out[:, length:].tolist()]

    def packed() -> Ids:
        settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=pad)
        found = base.model.generate_batch(alone, generation_config=settings, progress_bar=False)
        order = sorted(found, key=lambda name: int(name.rpartition("_")[2]))
        return [until(found[name].generated_tokens, ends) for name in order]

    return {
        "growing cache": together,
        "static cache": lambda: together(cache_implementation="static"),
        "continuous batching": packed,
    }


def until(tokens: list[int], ends: list[int]) -> list[int]:
    """What comes before the end of an answer."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def measure(base: BaseModel, prompts: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of every way, in turn, and how many answers are those of the first."""
    seconds: dict[str, list[float]] = {}
    made = ways(base, prompts)
    answers = {name: way() for name, way in made.items()}  # warms up
    for _ in range(rounds):
        for name, way in made.items():
            start = time.perf_counter()
            way()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    first, reference = next(iter(answers.values())), next(iter(seconds.values()))
    return {
        name: {
            "seconds": summary(own),
            "ratio": compared(own, reference),
            "equal_answers": sum(mine == other for mine, other in zip(answers[name], first, strict=True)),
        }
        for name, own in seconds.items()
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="JSON lines with a prompt")
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--copies", type=int, default=1, help="of every prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    base = load_base(given.base, device="cpu", dtype="float32")
    prompts = [json.loads(line)["prompt"] for line in given.prompts.read_text(encoding="utf-8").splitlines()]
    result = {
        "question": "which of transformers' own ways to generate is fastest here",
        "model": base.name,
        "machine": machine(base.device),
        "prompts": len(prompts) * given.copies,
        "new_tokens": NEW_TOKENS,
        "rounds": given.rounds,
        "ways": measure(base, prompts * given.copies, given.rounds),
    }
    write_whole(given.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
