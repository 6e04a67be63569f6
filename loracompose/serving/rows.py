"""The rows of a batch while they are generated: where each answer ends, and what is said of it on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

Finish = Literal["stop", "length"]
UNFINISHED = "\ufffd"  # what a tokenizer writes for a character whose last bytes are still to come


@dataclass(frozen=True)
class Written:
    """One answer.

    Attributes:
        text: up to a stop text, which is left out.
        tokens: that were drawn for it, without the one that ended it.
        finish: "stop" where the model or a stop text ended it, "length" where its limit did.
    """

    text: str
    tokens: int
    finish: Finish


class Row:
    """One answer as its tokens come."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limit: int,
        stops: Sequence[str] = (),
        tell: Callable[[str], None] | None = None,
        left: threading.Event | None = None,
    ) -> None:
        """Begin.

        Args:
            tokenizer: reads tokens.
            limit: the most tokens.
            stops: texts that end the answer.
            tell: is called with every piece of text that no later token can change.
            left: set when nobody waits for the answer any more.
        """
        self._tokenizer, self._limit, self._stops = tokenizer, limit, tuple(stops)
        self._tell, self._left = tell, left
        self._longest = max((len(stop) for stop in stops), default=1)
        self._ids: list[int] = []
        self._before = self._read = 0  # the last piece was read from ids[before:read]
        self._held, self._parts = "", [""]
        self._finish: Finish | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._finish is not None

    @property
    def told(self) -> bool:
        """Whether some of it was told."""
        return self._tell is not None and len(self._parts) > 1

    def take(self, token: int, ends: frozenset[int]) -> None:
        """The next token; those after the end are ignored."""
        if self.done:
            return
        if token in ends:
            self._end("stop")
            return
        self._ids.append(token)
        if (self._stops or self._tell is not None) and self._stopped():
            self._finish = "stop"
        elif len(self._ids) >= self._limit or (self._left is not None and self._left.is_set()):
            self._end("length")

    def written(self) -> Written:
        """The answer; one that was still running is ended."""
        if not self.done:
            self._end("length")
        text = "".join(self._parts)
        if not self._stops and self._tell is None:
            text = self._decode(0)
        return Written(text, len(self._ids), self._finish or "length")

    def _stopped(self) -> bool:
        """Read what is new; whether a stop text is complete."""
        before, now = self._decode(self._before, self._read), self._decode(self._before)
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return False
        self._before, self._read = self._read, len(self._ids)
        return self._write(now[len(before) :])

    def _write(self, piece: str) -> bool:
        self._held, stopped = cut(self._held + piece, self._stops)
        sure = len(self._held) if stopped else max(0, len(self._held) - self._longest + 1)
        self._say(self._held[:sure])
        self._held = self._held[sure:]
        return stopped

    def _end(self, finish: Finish) -> None:
        """Read and tell what waited for more tokens."""
        self._finish = finish
        rest = self._decode(self._before)[len(self._decode(self._before, self._read)) :]
        if rest and self._write(rest):
            self._finish = "stop"
        self._say(self._held)
        self._held = ""

    def _say(self, text: str) -> None:
        if text:
            self._parts.append(text)
            if self._tell is not None:
                self._tell(text)

    def _decode(self, start: int, end: int | None = None) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))


class Rows(StoppingCriteria):  # type: ignore[misc]
    """Ends the rows of a batch one by one, and gives each its tokens."""

    def __init__(self, rows: Sequence[Row], ends: frozenset[int]) -> None:
        """Take rows in the order of the batch, and the tokens that end an answer."""
        self._rows, self._ends = list(rows), ends

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether each row is done, (rows,) bool."""
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.take(token, self._ends)
        return torch.tensor([row.done for row in self._rows], device=input_ids.device)


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
    """The text up to the first stop text, which is left out, and whether there was one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
