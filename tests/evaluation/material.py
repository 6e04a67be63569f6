"""A tiny engine with four adapters, tasks of their names, and results made without a model."""

from __future__ import annotations

import numpy as np

from loracompose import AdapterIndex, Engine
from loracompose.evaluation.results import MethodResult, ProtocolResult, Results, RowRecord
from loracompose.evaluation.tasks import TaskRow
from loracompose.retrieval.embedding import CallableEmbedder
from tests.engines import CHATML, build_pool, tokenizer
from tests.retrieval.material import TASKS, bag_of_words
from tests.tiny import base_model

CLUSTERS = {"french": "language", "mood": "language", "sql": "numbers", "sums": "numbers"}


def task_rows(answer="yes"):
    """Three rows a task, of the templates 0, 1 and 5, whose prompts are close to the adapters' examples."""
    return tuple(
        TaskRow(f"{example} now", answer, task, CLUSTERS[task], "accuracy" if task != "french" else "chrf", template)
        for task, examples in TASKS.items()
        for example, template in zip(examples, (0, 1, 5), strict=True)
    )


def solved_rows():
    """Rows of another split."""
    return tuple(
        TaskRow(f"{task} {i}?", f"{i}", task, cluster, "accuracy", 0)
        for task, cluster in CLUSTERS.items()
        for i in range(4)
    )


def build_engine(folder):
    """An engine whose tokenizer has a chat template."""
    index = AdapterIndex.build(
        build_pool(folder / "pool"), folder / "index", embedder=CallableEmbedder(bag_of_words, "bag-of-words", "1")
    )
    return Engine.from_pretrained(base_model(), tokenizer=tokenizer(CHATML), index=index)


def made_results(methods=("base", "oracle", "mixture", "lego k=5"), seed=0, n=6):
    """Results of two protocols on four tasks, drawn at random; method i scores about 20 i."""
    chance = np.random.default_rng(seed)
    rows = tuple(RowRecord(f"{t}{i}", t, c, "accuracy", i % 3) for t, c in CLUSTERS.items() for i in range(n))
    protocols = []
    for name in ("in-domain", "masked"):
        found = tuple(
            MethodResult(
                label,
                f"<{label}>",
                tuple(round(float(x), 2) for x in np.clip(chance.normal(20 * (i + 1), 10, len(rows)), 0, 100)),
                10.0 * (i + 1),
                1000 * i,
            )
            for i, label in enumerate(methods)
        )
        top = tuple(row.task if name == "in-domain" else "mood" for row in rows)
        place = tuple(1 if name == "in-domain" else None for _ in rows)
        protocols.append(ProtocolResult(name, rows, top, place, 1.5, found))
    settings = {"base": "tiny", "dtype": "float32", "rows_per_task": n, "seed": seed}
    return Results(settings, dict.fromkeys(CLUSTERS, "ab12"), {"torch": "2"}, tuple(protocols))
