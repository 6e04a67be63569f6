"""What the model's `generate` is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from loracompose.composers import Composer

OURS = ("inputs", "input_ids", "attention_mask", "streamer", "return_dict_in_generate")
LENGTHS = ("max_length", "generation_config")


def decoding_settings(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of the model's `generate` beside the prompts: greedy unless something given says otherwise.

    Args:
        tokenizer: pads, and splits stop strings.
        max_new_tokens: the longest answer; None leaves it to what is given.
        given: the caller's own arguments, which win.

    Raises:
        ValueError: an argument that the engine sets, or two that say how long answers are.
    """
    given = {name: value for name, value in given.items() if name != "generation_config" or value is not None}
    if taken := [name for name in OURS if name in given]:
        raise ValueError(f"the engine sets {', '.join(taken)} itself; leave them out")
    if max_new_tokens is not None and (clash := [name for name in LENGTHS if name in given]):
        raise ValueError(f"{clash[0]} says how long answers are: pass max_new_tokens=None with it")
    settings: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "return_dict_in_generate": False}
    if max_new_tokens is not None:
        settings["max_new_tokens"] = max_new_tokens
    if "generation_config" not in given:
        settings["do_sample"] = False
    if "stop_strings" in given:
        settings["tokenizer"] = tokenizer
    return {**settings, **given}


def check_prefill(composer: Composer, settings: Mapping[str, Any], own: GenerationConfig | None = None) -> None:
    """Refuse to split prompts where the composer decides on the whole of each.

    Args:
        composer: how adapters are composed.
        settings: arguments of the model's `generate`.
        own: the model's settings, which hold where no others are given.

    Raises:
        ValueError: the prompts would reach it in pieces.
    """
    config = settings.get("generation_config") or own
    size = settings.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
    if size and composer.scope == "prompt":
        raise ValueError(
            f"composer {composer.name!r} decides once on the whole prompt, so prompts cannot be read in pieces of "
            f"{size} tokens: leave prefill_chunk_size out"
        )
