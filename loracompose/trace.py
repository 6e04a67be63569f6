"""What one answer is made of: the text and the trace that explains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from loracompose.prompts import Prompt


@dataclass(frozen=True)
class AdapterUse:
    """One adapter of one answer.

    Attributes:
        name: the adapter's name in the index, or its own.
        fingerprint: content identity of what really ran.
        score: what retrieval scored it, the higher the better (log-probability, or cosine under scoring="mean");
            None if the set was given by hand.
        weight: what the composer was given; 0 means retrieved but not used.
    """

    name: str
    fingerprint: str
    score: float | None
    weight: float


@dataclass(frozen=True)
class Generation:
    """One prompt's answer with its trace.

    Attributes:
        prompt: as it was given.
        texts: the answers, one per return sequence.
        composer: repr of the composer, hyper-parameters included.
        adapters: what was retrieved or given, by weight, then by score; empty if the base model answered alone.
        timings: seconds: `retrieve` of the whole call, `load`, `compose` and `generate` of this prompt's batch; with
            `overlap` the first three of a batch may pass while another one generates.
        notes: anything unusual, such as an adapter made for a base of another name.
        added_parameters: numbers in the A and B of the ranks that ran for this prompt.
        from_cache: whether what was made of its adapters was kept from an earlier request instead of being made for
            this one; False for composers that only weigh or gate ranks as they are.
        prompt_tokens: what the model read, the template's own tokens included.
        new_tokens: of each text, without the token that ended it.
    """

    prompt: Prompt
    texts: tuple[str, ...]
    composer: str
    adapters: tuple[AdapterUse, ...]
    timings: Mapping[str, float] = field(compare=False)
    notes: tuple[str, ...] = ()
    added_parameters: int = 0
    from_cache: bool = field(default=False, compare=False)
    prompt_tokens: int = 0
    new_tokens: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The answer, or the first of several."""
        return self.texts[0]

    def as_dict(self) -> dict[str, Any]:
        """The whole trace as JSON values."""
        return {**asdict(self), "text": self.text, "timings": dict(self.timings)}
