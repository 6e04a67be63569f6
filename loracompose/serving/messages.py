"""What clients send: OpenAI's chat completions, with fields for retrieval and composition."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MOST_TOKENS = 64  # of an answer, if a request does not say
COLDEST = 0.01  # a lower temperature than this divides logits until they are no numbers
HEAVIEST = 100.0  # a weight by hand; beyond, updates drown the model, and far beyond they are no numbers

Count = Annotated[int, Field(ge=1)]
Scalar = str | int | float | bool
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Name = Annotated[str, Field(max_length=1024)]
Weight = Annotated[float, Field(ge=-HEAVIEST, le=HEAVIEST)]


def _cold(value: Any) -> Any:
    if isinstance(value, float) and 0 < value < COLDEST:
        raise ValueError(f"must be 0, which is greedy decoding, or at least {COLDEST}")
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Strict(BaseModel):
    """A field that is not listed is refused: it would have no effect."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One turn; "developer" is OpenAI's newer word for "system"."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """The message as the engine takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    """What a stream says beside the text."""

    include_usage: bool | None = None


class Retrieving(Strict):
    """What steers retrieval."""

    k: Count | None = None
    exclude: Annotated[list[Name], Field(max_length=1024)] | None = None
    where: Annotated[dict[str, Scalar], Field(max_length=16)] | None = None


class ChatRequest(Retrieving):
    """One request for an answer. Null is the default of every field but the messages.

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
        stream_options: `include_usage` counts tokens at its end.
        frequency_penalty, presence_penalty, logprobs: taken where they say what is done anyway: nothing.
        user: taken and not used.
        adapters: a set by hand instead of retrieval, of names in the index: a list, at equal weights, or weights.
        composer: how to compose; the server's if not given.
        k: adapters to retrieve.
        exclude: names not to retrieve.
        where: metadata that an adapter must have to be retrieved.
    """

    model: Name | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0.0, le=10.0), BeforeValidator(_cold)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n: Count | None = None
    stop: Annotated[list[Stop], Field(max_length=16), BeforeValidator(_listed)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    user: str | None = None
    adapters: list[Name] | dict[Name, Weight] | None = None
    composer: Name | None = None

    @property
    def limit(self) -> int:
        """The longest answer in tokens."""
        given = [value for value in (self.max_tokens, self.max_completion_tokens) if value is not None]
        return min(given, default=MOST_TOKENS)

    def weights(self) -> dict[str, float] | None:
        """The set given by hand; None if adapters are retrieved."""
        if not isinstance(self.adapters, list):
            return self.adapters
        totals: dict[str, float] = {}
        for name in self.adapters:
            totals[name] = totals.get(name, 0.0) + 1 / len(self.adapters)
        return totals


class RetrieveRequest(Retrieving):
    """Which adapters prompts would get."""

    prompts: Annotated[list[str], Field(min_length=1, max_length=1024)]
