"""What clients send and are sent: OpenAI's chat completions, with fields for retrieval and composition."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MOST_TOKENS = 64  # of an answer, if a request does not say

Count = Annotated[int, Field(ge=1)]
Scalar = str | int | float | bool


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """The message as the engine takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class Retrieving(BaseModel):
    """What steers retrieval."""

    model_config = ConfigDict(extra="forbid")

    k: Count | None = None
    exclude: list[str] = []
    where: dict[str, Scalar] = {}


class ChatRequest(Retrieving):
    """One request for an answer. A field that is not listed is refused: it would have no effect.

    Attributes:
        model: "auto" retrieves adapters; the name of an adapter runs that one alone, the base's name the base alone.
        messages: the conversation, the user last.
        max_tokens: the longest answer in tokens; `max_completion_tokens` says the same.
        temperature: of sampling; 0, the default, is greedy decoding.
        top_p: of sampling.
        seed: of sampling; such a request runs in a batch of its own.
        n: answers to draw.
        stop: texts that end an answer; they are left out of it.
        stream: send the answer piece by piece.
        user: taken and not used.
        adapters: a set by hand instead of retrieval, of names in the index: a list, at equal weights, or weights.
        composer: how to compose; the server's if not given.
        k: adapters to retrieve.
        exclude: names not to retrieve.
        where: metadata that an adapter must have to be retrieved.
    """

    model: str = "auto"
    messages: list[ChatMessage]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: float = Field(default=0.0, ge=0.0, le=10.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    n: Annotated[int, Field(ge=1, le=16)] = 1
    stop: str | list[str] | None = None
    stream: bool = False
    user: str | None = None
    adapters: list[str] | dict[str, float] | None = None
    composer: str | None = None

    @field_validator("stop")
    @classmethod
    def _some_text(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if stop is not None and (not all(stop) or stop == ""):
            raise ValueError("an empty text stops every answer before it begins")
        return stop

    @field_validator("adapters")
    @classmethod
    def _finite(cls, adapters: list[str] | dict[str, float] | None) -> list[str] | dict[str, float] | None:
        if isinstance(adapters, dict) and not all(math.isfinite(weight) for weight in adapters.values()):
            raise ValueError("weights must be finite")
        return adapters

    @property
    def limit(self) -> int:
        """The longest answer in tokens."""
        given = [value for value in (self.max_tokens, self.max_completion_tokens) if value is not None]
        return min(given, default=MOST_TOKENS)

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def weights(self) -> dict[str, float] | None:
        """The set given by hand; None if adapters are retrieved."""
        if not isinstance(self.adapters, list):
            return self.adapters
        totals: dict[str, float] = {}
        for name in self.adapters:
            totals[name] = totals.get(name, 0.0) + 1 / len(self.adapters)
        return totals

    def decoding(self) -> tuple[tuple[str, Any], ...]:
        """Arguments of the model's `generate`.

        Raises:
            ValueError: a setting of sampling without sampling, or several answers that would be equal.
        """
        given: list[tuple[str, Any]] = []
        if self.temperature > 0:
            given += [("do_sample", True), ("temperature", self.temperature), ("top_p", self.top_p), ("top_k", 0)]
        elif self.top_p < 1 or self.seed is not None or self.n > 1:
            raise ValueError("top_p, seed and n belong to sampling: give a temperature above 0")
        if self.n > 1:
            given.append(("num_return_sequences", self.n))
        if self.stops:
            given.append(("stop_strings", self.stops))
        return tuple(given)


class RetrieveRequest(Retrieving):
    """Which adapters a prompt would get."""

    prompts: Annotated[list[str], Field(min_length=1, max_length=1024)]
