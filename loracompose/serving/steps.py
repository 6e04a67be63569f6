"""What the server asks of the model's `generate` step by step: rows of unequal length, seeds, where texts end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria


class RowLimits(StoppingCriteria):  # type: ignore[misc]
    """Ends each prompt's answers at a number of tokens of its own, within one batch.

    Attributes:
        made: tokens that every row has been given so far.
        last: the latest of them, (rows,).
    """

    def __init__(self, limits: Sequence[int]) -> None:
        self.made = 0
        self.last = torch.tensor([], dtype=torch.long)
        self._limits = torch.tensor(limits)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether each row is done, (prompts * answers of each,) bool."""
        self.made += 1
        self.last = input_ids[:, -1]
        each = input_ids.shape[0] // len(self._limits)
        return (self.made >= self._limits).repeat_interleave(each).to(input_ids.device)


class SeedOnce(LogitsProcessor):  # type: ignore[misc]
    """Seeds torch before the first token is drawn, when the model is ours and nothing else draws."""

    def __init__(self, seed: int) -> None:
        self._seed: int | None = seed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are."""
        if self._seed is not None:
            torch.manual_seed(self._seed)
            self._seed = None
        return scores


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop string, which is left out, and whether there was one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def cut_pieces(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Pieces of a text up to the first stop string; what may be the beginning of one waits for the next piece."""
    kept, longest = "", max((len(stop) for stop in stops), default=1)
    for piece in pieces:
        kept, stopped = cut(kept + piece, stops)
        if stopped:
            break
        safe = len(kept) - longest + 1
        if safe > 0:
            yield kept[:safe]
            kept = kept[safe:]
    if kept:
        yield kept
