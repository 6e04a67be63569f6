"""The one function that turns a prompt into a model's input, for trainer, engine and evaluation alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

Message: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = str | Sequence[Message]

ROLES = ("system", "user", "assistant")

# Any finished exchange would do: what a template writes after it, it writes in the middle of a conversation,
# where no template repeats its beginning-of-text token or inserts a default system turn.
_EXCHANGE = ({"role": "user", "content": "X"}, {"role": "assistant", "content": "Y"})


def as_prompts(prompts: str | Sequence[Prompt]) -> list[Prompt]:
    """The prompts of a call as a list: one string alone is one prompt.

    Raises:
        ValueError: a chat message alone, whose keys would be taken for prompts.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        raise ValueError(
            f"prompts must be a string or a list of prompts, got one chat message, {prompts!r:.200}: a prompt is a "
            "list of messages, so write [[{...}]]"
        )
    return list(prompts)


def user_text(prompt: Prompt) -> str:
    """What retrieval sees: the prompt itself, or the last user turn of a list of chat messages.

    Raises:
        ValueError: the prompt is neither a string nor a valid list of chat messages.
    """
    return str(_messages(prompt)[-1]["content"])


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The text that the model continues: the chat template, with no system turn unless the prompt has one.

    Many templates insert a system turn of their own when none is given; it is cut, a beginning-of-text token is
    kept. A template that writes a turn differently in the middle of a conversation is used as it is. Without a
    template (GPT-2, T5) a string is its own text.

    Raises:
        ValueError: the prompt is invalid, or it is a list of messages and the tokenizer has no chat template.
    """
    messages = _messages(prompt)
    if not has_chat_template(tokenizer):
        if isinstance(prompt, str):
            return prompt
        raise ValueError(
            f"chat messages need a chat template and the tokenizer {tokenizer.name_or_path!r} has none: give a string"
        )
    plain = _render(tokenizer, messages, generate=True)
    if messages[0]["role"] == "system":
        return plain
    exchange = _render(tokenizer, _EXCHANGE, generate=False)
    continued = _render(tokenizer, [*_EXCHANGE, *messages], generate=True)
    turns = continued.removeprefix(exchange)
    if turns == continued or not plain.endswith(turns):
        return plain
    head = plain.removesuffix(turns)
    bos = tokenizer.bos_token
    # SmolLM2's beginning-of-text token is <|im_start|>, which opens every turn: then it belongs to the turn.
    keep_bos = bos and head.startswith(bos) and not turns.startswith(bos)
    return f"{bos}{turns}" if keep_bos else turns


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], padding_side: str = "left"
) -> BatchEncoding:
    """Token ids and attention mask of `chat_text`, each (batch, seq), padded on a side: left, or right for an encoder.

    The template has already written every special token; without a template the tokenizer adds its own. Padding is
    done here: a fast tokenizer that pads remembers it, and another thread's call would find its texts padded.

    Raises:
        ValueError: there is no prompt, or one of them is invalid or empty.
    """
    rows = _encode(tokenizer, prompts)
    lengths = [len(ids) for ids in rows]
    _check_lengths(lengths)
    ids = torch.full((len(rows), max(lengths)), int(tokenizer.pad_token_id))
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(ids.shape[1] - len(row), None) if padding_side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return BatchEncoding({"input_ids": ids, "attention_mask": mask})


def prompt_lengths(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[int]:
    """How many tokens `encode_prompts` makes of each prompt; raises as it does."""
    lengths = [len(ids) for ids in _encode(tokenizer, prompts)]
    _check_lengths(lengths)
    return lengths


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    if not prompts:
        raise ValueError("there is no prompt to encode: give at least one")
    texts = [chat_text(tokenizer, prompt) for prompt in prompts]
    special = not has_chat_template(tokenizer)
    encoded = tokenizer(texts, add_special_tokens=special, return_token_type_ids=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _check_lengths(lengths: Sequence[int]) -> None:
    if 0 in lengths:
        raise ValueError(f"prompt {lengths.index(0)} is empty: the model needs at least one token to continue")


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer can render chat messages."""
    return getattr(tokenizer, "chat_template", None) is not None


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generate: bool) -> str:
    turns = [dict(message) for message in messages]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))


def _messages(prompt: Prompt) -> Sequence[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    _check(prompt)
    return prompt


def _check(messages: object) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, bytes):
        raise ValueError(f"a prompt is a string or a list of chat messages, got {messages!r:.200}")
    for place, message in enumerate(messages):
        _check_message(place, message)
    roles = [message["role"] for message in messages]
    spoken = [role for role in roles if role != "system"]
    if not spoken or spoken[0] != "user" or roles[-1] != "user":
        raise ValueError(f"chat messages must begin (after any system turn) and end with the user, got roles {roles}")


def _check_message(place: int, message: object) -> None:
    if not isinstance(message, Mapping):
        raise ValueError(f'message {place} must be {{"role": ..., "content": ...}}, got {message!r}')
    if message.get("role") not in ROLES:
        raise ValueError(f"message {place} has role {message.get('role')!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"message {place} must have a string as content, got {message.get('content')!r}")
