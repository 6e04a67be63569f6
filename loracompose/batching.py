"""Which prompts of a call run together: those of like length, within a bound on rows or on tokens."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import GenerationConfig

from loracompose.decoding import asked
from loracompose.membership import Row

BATCH = 32  # prompts that run together if the caller does not say


@dataclass(frozen=True)
class Budget:
    """How large a batch may be; a batch of one prompt is always allowed.

    Attributes:
        prompts: at most so many run together; None: as many as the tokens allow.
        tokens: at most so many tokens, padding and answers included; None: as many as the prompts need.
        answer: tokens of the longest answer.
        copies: rows that one prompt takes: beams, or return sequences.
    """

    prompts: int | None
    tokens: int | None
    answer: int = 0
    copies: int = 1

    def allows(self, prompts: int, longest: int) -> bool:
        """Whether so many prompts, the longest of so many tokens, may run together."""
        rows = prompts * self.copies
        few = self.prompts is None or prompts <= self.prompts
        return prompts == 1 or (few and (self.tokens is None or rows * (longest + self.answer) <= self.tokens))


def budget_of(
    batch_size: int | None,
    batch_tokens: int | None,
    max_new_tokens: int | None,
    settings: Mapping[str, Any],
    own: GenerationConfig | None = None,
) -> Budget:
    """The budget of a call: 32 prompts if it says nothing.

    Args:
        batch_size: prompts that run together.
        batch_tokens: tokens that run together.
        max_new_tokens: the longest answer.
        settings: arguments of the model's `generate`.
        own: the model's own config, which says what the settings leave open.

    Raises:
        ValueError: a bound below 1, or a bound on tokens without one on the answer's.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    if batch_tokens is not None and max_new_tokens is None:
        raise ValueError("batch_tokens counts the tokens of answers, so it needs max_new_tokens: give both, or neither")
    copies = [asked(name, settings, own) or 1 for name in ("num_beams", "num_return_sequences")]
    prompts = BATCH if batch_size is None and batch_tokens is None else batch_size
    return Budget(prompts, batch_tokens, max_new_tokens or 0, max(copies))


def plan_batches(lengths: Sequence[int], sets: Sequence[Hashable], budget: Budget) -> list[list[int]]:
    """The places of the prompts of each batch, every place once, in the order given within a batch.

    Prompts are sorted by length, the longest first, so that padding is small and what does not fit in memory says so
    at once; among prompts of one length those of equal sets stand together, which costs no padding and saves
    compositions. A function of its arguments alone.

    Args:
        lengths: tokens of each prompt.
        sets: what each prompt is composed of.
        budget: how large a batch may be.
    """
    first = {own: place for place, own in reversed(list(enumerate(sets)))}
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], first[sets[i]], i))
    batches: list[list[int]] = []
    for place in order:
        if batches and budget.allows(len(batches[-1]) + 1, lengths[batches[-1][0]]):
            batches[-1].append(place)
        else:
            batches.append([place])
    return [sorted(batch) for batch in batches]


def set_of(row: Row) -> Hashable:
    """What decides the composition of a row, as far as batches care: the members that count, at their weights."""
    return frozenset((member.ref, member.weight) for member in row if member.weight)


@contextmanager
def prompt_bar(total: int, shown: bool) -> Iterator[Any]:
    """A progress bar over prompts; yields what advances it by a number of prompts."""
    columns = (TextColumn("generate"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown, transient=True) as progress:
        task = progress.add_task("generate", total=total)
        yield lambda prompts: progress.advance(task, prompts)
