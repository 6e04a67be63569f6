"""A tokenizer of single characters, and tiny base model folders that have it."""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.tiny import base_model

# Shaped like SmolLM2's: a default system turn is written where none is given.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(
    chat_template: str | None = CHATML, *, bos: str | None = "<|im_start|>", eos: str | None = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """One token a character; <pad> is 0, <|im_start|> 1, <|im_end|> 2; unless told not to, it begins with <s>, 3."""
    specials = ["<pad>", "<|im_start|>", "<|im_end|>", "<s>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *string.printable[:96], "\n"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    given = {"bos_token": bos, "eos_token": eos, "pad_token": "<pad>" if eos else None}
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=specials,
        **{name: token for name, token in given.items() if token},
    )
    made.chat_template = chat_template
    return made


def base_folder(parent: Path, base: str = "llama", *, head: float = 25.0) -> Path:
    """A folder with a tiny model and the tokenizer, as `save_pretrained` writes them.

    The random head is multiplied by `head`: frozen and as small as it is made, no adapter could make it certain.
    """
    folder = parent / base
    model = base_model(base)
    if base == "llama":
        model.lm_head.weight.data *= head
    model.save_pretrained(folder)
    tokenizer(CHATML if base == "llama" else None).save_pretrained(folder)
    return folder
