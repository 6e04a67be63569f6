"""LORAUTER: prompts are compared with tasks, not with adapters, and tasks are known by rows of a validation set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracompose.composers import Composer
from loracompose.composers.mixture import Mixture
from loracompose.evaluation.found import LORAUTER_TEMPERATURE
from loracompose.evaluation.methods import Question, Situation
from loracompose.evaluation.tasks import TaskRow, draw
from loracompose.retrieval.embedding import unit_vectors
from loracompose.retrieval.index import AdapterIndex

ROWS_A_TASK = 40
"""Validation rows that make a task's representation."""


@dataclass(frozen=True)
class Lorauter:
    """y = W x + Σ_i softmax(cos / τ)_i B_i A_i x over the k tasks nearest to the prompt.

    A task's representation is the mean of the embeddings of its validation prompts; an index's examples, which are
    training rows, are not read. Departs from the paper: there every task is first given the adapter of the pool that
    does best on its validation set, found by successive halving; here pools hold one adapter a task, which is that
    of its name, and a task whose adapter a protocol hides is hidden with it. The encoder is the index's.

    Source: LORAUTER, arXiv:2601.21795 (τ = 0.2, k = 3).

    Attributes:
        label: its name in the table.
        k: tasks a prompt.
        temperature: τ.

    Raises:
        ValueError: k or the temperature is out of its range.
    """

    label: str = "lorauter"
    k: int = 3
    temperature: float = LORAUTER_TEMPERATURE

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"lorauter: k must be an integer of at least 1, got {self.k!r}")
        if not (isinstance(self.temperature, int | float) and 0 < self.temperature < math.inf):
            raise ValueError(f"lorauter: temperature must be above 0 and finite, got {self.temperature!r}")

    @property
    def composer(self) -> Composer:
        """The exact weighted sum of outputs."""
        return Mixture()

    def questions(self, situation: Situation) -> list[Question | None]:
        """The adapters of the nearest tasks; the base model where every task is hidden.

        Raises:
            LookupError: nothing is known of the tasks.
        """
        cosines = situation.task_cosines
        if cosines is None:
            raise LookupError("lorauter needs validation rows: put a TASK.dev.jsonl beside the test rows of each task")
        names = sorted(situation.pool)
        kept = min(self.k, cosines.shape[1])
        best = cosines.topk(kept, dim=1)  # (batch, kept)
        weights = torch.softmax(best.values.double() / self.temperature, dim=1)
        return [
            Question(row.prompt, {names[j]: w for j, w, c in zip(*own, strict=True) if math.isfinite(c)})
            for row, *own in zip(
                situation.rows, best.indices.tolist(), weights.tolist(), best.values.tolist(), strict=True
            )
        ]


def task_cosines(
    index: AdapterIndex, prompts: Sequence[str], excluded: Sequence[frozenset[str]], validation: Sequence[TaskRow]
) -> Tensor:
    """Cosine of every prompt with every task that has an adapter, (batch, N); -inf where the adapter is hidden.

    Args:
        index: whose adapters are named after their tasks; columns are its names, sorted.
        prompts: of the rows asked.
        excluded: names that each prompt must do without.
        validation: rows with the tasks' names; the first `ROWS_A_TASK` of each are read, evenly over phrasings.

    Raises:
        LookupError: an adapter's task has no validation row.
    """
    names = sorted(card.name for card in index.cards)
    own = [row for row in draw(validation, ROWS_A_TASK, seed=0) if row.task in set(names)]
    if missing := sorted(set(names) - {row.task for row in own}):
        raise LookupError(f"lorauter needs validation rows of every adapter's task; there are none of {missing}")
    settings = index.catalog.settings
    texts = [settings.instruction + text for text in (*prompts, *(row.prompt for row in own))]
    vectors = torch.from_numpy(unit_vectors(index.embedder, texts, settings.dimension)).double()
    queries, examples = vectors[: len(prompts)], vectors[len(prompts) :]
    owner = torch.tensor([names.index(row.task) for row in own])
    means = torch.zeros(len(names), vectors.shape[1], dtype=vectors.dtype).index_add_(0, owner, examples)
    cosines = queries @ torch.nn.functional.normalize(means, dim=1).T  # (batch, N)
    hidden = torch.tensor([[name in out for name in names] for out in excluded])
    return cosines.masked_fill(hidden, -torch.inf)
