"""A stream of prompts over pools of growing size on disk: what a large pool costs beside a small one."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from loracompose.adapters.folder import CONFIG, WEIGHTS
from loracompose.adapters.store import AdapterStore
from loracompose.benchmarks.speed.case import TARGETS, Case
from loracompose.benchmarks.speed.measure import machine
from loracompose.composers.mixture import Mixture
from loracompose.composition.layers import layer_of
from loracompose.engine import Engine
from loracompose.models import load_base
from loracompose.runtime.fitting import module_shape

STORE_BYTES = 200 * 10**6
TEXT = "Row {}: the quick brown fox jumps over the lazy dog and runs."


@dataclass(frozen=True)
class Stream:
    """What is asked of a pool.

    Attributes:
        prompts: how many prompts there are in all.
        k: adapters of each prompt, drawn without replacement.
        zipf: exponent: the n-th most popular adapter is drawn in proportion to n to the minus this.
        rows: prompts that run together.
        new_tokens: of every answer.
        store_bytes: what the adapters in memory may occupy.
        overlap: whether the adapters of the next batch are loaded while one generates.
        seed: of the drawing.
    """

    prompts: int = 1000
    k: int = 3
    zipf: float = 1.0
    rows: int = 16
    new_tokens: int = 16
    store_bytes: int = STORE_BYTES
    overlap: bool = True
    seed: int = 0

    def sets(self, adapters: int) -> Iterator[list[int]]:
        """The adapters of each prompt."""
        random = np.random.default_rng(self.seed)
        share = 1.0 / np.arange(1, adapters + 1) ** self.zipf
        share /= share.sum()
        for _ in range(self.prompts):
            yield [int(i) for i in random.choice(adapters, self.k, replace=False, p=share)]


def write_pool(folder: Path, size: int, model: PreTrainedModel, tick: Callable[[], None] = lambda: None) -> list[Path]:
    """PEFT folders of adapters that all differ, in bfloat16; those that are there already stay as they are.

    The numbers of an adapter are those of one of eight drawn ones, moved on by a few places: drawing all anew would
    take longer than all that is measured.
    """
    case = Case()
    shapes = {path: module_shape(module) for path, module in model.named_modules() if layer_of(path)}
    drawn = [_file(*_drawn(shapes, number, case)) for number in range(8)]
    made = []
    for number in range(size):
        path = folder / f"adapter{number:05d}"
        made.append(path)
        if not (path / CONFIG).exists():
            config, header, numbers = drawn[number % 8]
            path.mkdir(parents=True, exist_ok=True)
            (path / WEIGHTS).write_bytes(header + np.roll(numbers, number // 8).tobytes())
            config |= {"base_model_name_or_path": model.config.name_or_path}
            (path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        tick()
    return made


def _file(rank: int, kinds: Sequence[str], tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Any], bytes, Any]:
    """The configuration of an adapter, the header of its file of weights, and the numbers after it."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(kinds),
    }
    content = save(tensors)
    begin = 8 + int.from_bytes(content[:8], "little")  # the length of the header stands before it
    return config, content[:begin], np.frombuffer(content, np.uint16, offset=begin)


def _drawn(shapes: dict[str, Any], number: int, case: Case) -> tuple[int, Sequence[str], dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(number)
    rank, kinds = case.ranks[number % len(case.ranks)], TARGETS["mixed"][number % 2]
    tensors = {}
    for path, shape in shapes.items():
        if shape is not None and path.rpartition(".")[2] in kinds:
            A, B = torch.randn(rank, shape[1], generator=random), torch.randn(shape[2], rank, generator=random)
            tensors[f"base_model.model.{path}.lora_A.weight"] = (A / shape[1] ** 0.5).to(torch.bfloat16)
            tensors[f"base_model.model.{path}.lora_B.weight"] = (0.1 * B).to(torch.bfloat16)
    return rank, kinds, tensors


def measure(
    base: str,
    pool: Path,
    sizes: Sequence[int],
    stream: Stream | None = None,
    tell: Callable[[str], None] = lambda text: None,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Serve the stream from pools of each size, each in a process of its own, so that its memory is its own.

    Args:
        base: folder or Hub name of the base model.
        pool: folder for the adapters; about 1.5 MB each; kept.
        sizes: of the pools, which are the first so many adapters.
        stream: what is asked.
        tell: is told what goes on.
        before: an earlier result of the same stream, whose pools of other sizes are kept.

    Raises:
        ValueError: the earlier result is of another model or stream.
    """
    stream = stream or Stream()
    found = _kept(before, base, stream)
    tell(f"writing {max(sizes):,} adapters")
    write_pool(pool, max(sizes), load_base(base).model)
    for size in sizes:
        tell(f"serving {stream.prompts:,} prompts from {size:,} adapters")
        with get_context("spawn").Pool(1) as process:
            found[str(size)] = process.apply(serve, (base, pool, size, stream))
    found = dict(sorted(found.items(), key=lambda item: int(item[0])))
    smallest = next(iter(found.values()))["seconds"]
    return {
        "question": "what a large pool costs beside a small one",
        "model": base,
        "machine": machine(torch.device("cpu")),
        "stream": asdict(stream),
        "pools": found,
        "seconds_to_smallest": {size: part["seconds"] / smallest for size, part in found.items()},
    }


def _kept(before: Mapping[str, Any] | None, base: str, stream: Stream) -> dict[str, Any]:
    if before is None:
        return {}
    if (before["model"], before["stream"]) != (base, asdict(stream)):
        raise ValueError(
            f"the earlier result is of {before['model']} and {before['stream']}, not of {base} and {asdict(stream)}: "
            "choose another file"
        )
    return dict(before["pools"])


def serve(base: str, pool: Path, size: int, stream: Stream) -> dict[str, Any]:
    """Seconds, memory and what the store did while one pool served the stream."""
    opened = load_base(base)
    before = peak()
    store = AdapterStore(max_bytes=stream.store_bytes, device=opened.device, dtype=torch.float32, base=opened.model)
    folders = [pool / f"adapter{number:05d}" for number in range(size)]
    sets = [[folders[i] for i in members] for members in stream.sets(size)]
    prompts = [TEXT.format(i) for i in range(stream.prompts)]
    with Engine(opened, Mixture(), store) as engine:
        engine.generate(prompts[: stream.rows], adapters=[[]] * stream.rows, max_new_tokens=stream.new_tokens)
        start = time.perf_counter()
        answers = engine.generate(
            prompts,
            adapters=sets,
            batch_size=stream.rows,
            overlap=stream.overlap,
            max_new_tokens=stream.new_tokens,
            min_new_tokens=stream.new_tokens,
        )
        total = time.perf_counter() - start
    batches = {tuple(answer.timings.items()) for answer in answers}  # every answer has the times of its batch
    spent: dict[str, float] = {}
    for stage, seconds in chain.from_iterable(batches):
        spent[stage] = spent.get(stage, 0.0) + seconds
    stats = store.stats
    return {
        "seconds": total,
        "prompts_a_second": stream.prompts / total,
        "stages_seconds": spent,
        "distinct_adapters": len({i for members in stream.sets(size) for i in members}),
        "hits": stats.hits,
        "reads": stats.misses,
        "evictions": stats.evictions,
        "store_mb": stats.bytes / 1e6,
        "peak_mb": peak() / 1e6,
        "model_mb": before / 1e6,
    }


def peak() -> int:
    """Most bytes of memory that this process has occupied."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
