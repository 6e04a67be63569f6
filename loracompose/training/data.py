"""Training rows: read from JSONL, checked, and turned into token ids with the response marked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from loracompose.prompts import Prompt, chat_text, has_chat_template, user_text


@dataclass(frozen=True)
class Example:
    """One row: a prompt (a string or chat messages), the response to learn, and the task it is of, "" if unsaid."""

    prompt: Prompt
    response: str
    task: str = ""


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of a prompt and of its response, the latter closed by the end-of-turn token."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of prompt and response together."""
        return len(self.prompt) + len(self.response)


def read_examples(data: Path | str | Iterable[Mapping[str, Any]]) -> tuple[Example, ...]:
    """The examples of a JSONL file with the fields `prompt`, `response` and, if there is one, `task`, or of such rows.

    Other fields are ignored.

    Raises:
        ValueError: a row is not of this form (the message names file and line), or there is none.
    """
    if isinstance(data, (str, Path)):
        examples = tuple(_read_line(Path(data), number, line) for number, line in _lines(Path(data)))
    else:
        examples = tuple(_example(row, f"row {number}") for number, row in enumerate(data, start=1))
    if not examples:
        raise ValueError(
            f'{data if isinstance(data, (str, Path)) else "the data"} holds no {{"prompt", "response"}} row'
        )
    return examples


def encode_example(tokenizer: PreTrainedTokenizerBase, example: Example) -> EncodedExample:
    """Token ids as generation sees them: the prompt as `encode_prompts` writes it, the response with an end token.

    Prompt and response are tokenised apart, because at generation the prompt is finished before the response begins.

    Raises:
        ValueError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no end token, so no response could ever end")
    templated = has_chat_template(tokenizer)
    prompt = tokenizer(chat_text(tokenizer, example.prompt), add_special_tokens=not templated)["input_ids"]
    response = tokenizer(example.response, add_special_tokens=False)["input_ids"]
    return EncodedExample(tuple(prompt), (*response, tokenizer.eos_token_id))


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> tuple[EncodedExample, ...]:
    """The examples of at most `max_length` tokens, encoded; a longer one is left out, never cut.

    Raises:
        ValueError: every example is longer.
    """
    encoded = tuple(encode_example(tokenizer, example) for example in examples)
    kept = tuple(example for example in encoded if example.length <= max_length)
    if not kept:
        shortest = min(example.length for example in encoded)
        raise ValueError(f"max_length is {max_length} and the shortest of {len(encoded)} rows has {shortest} tokens")
    return kept


def first_prompts(examples: Sequence[Example], count: int = 20) -> tuple[str, ...]:
    """The first distinct user texts, for the card of an adapter whose author gave no examples."""
    return tuple(dict.fromkeys(user_text(example.prompt) for example in examples))[:count]


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    with path.open(encoding="utf-8") as stream:
        yield from ((number, line) for number, line in enumerate(stream, start=1) if line.strip())


def _read_line(path: Path, number: int, line: str) -> Example:
    place = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    return _example(row, place)


def _example(row: Any, place: str) -> Example:
    if not isinstance(row, Mapping) or not {"prompt", "response"} <= row.keys():
        raise ValueError(f'{place}: a row must be {{"prompt": ..., "response": ...}}, got {row!r:.200}')
    if not isinstance(row["response"], str) or not row["response"].strip():
        raise ValueError(f"{place}: the response must be a string that is not empty, got {row['response']!r}")
    try:
        text = user_text(row["prompt"])
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if not text.strip():
        raise ValueError(f"{place}: the prompt is empty")
    return Example(row["prompt"], row["response"], str(row.get("task") or ""))
