"""What the model's `generate` is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from loracompose.composers import Composer

OURS = ("inputs", "input_ids", "attention_mask", "streamer", "return_dict_in_generate")
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
LENGTHS = ("max_length", "generation_config")
GREEDY = {"do_sample": False, "num_beams": 1}
# What makes decoding assisted. In transformers 5.24 use_mtp and some assistants draft after the first pass only.
DRAFTS = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit", "use_mtp")


def asked(name: str, settings: Mapping[str, Any], own: GenerationConfig | None) -> Any:
    """The value of a setting that the model's `generate` will go by; None if nobody says one.

    A keyword wins, None included. transformers fills what a given config leaves None from the model's own.

    Args:
        name: the setting.
        settings: arguments of the model's `generate`.
        own: the model's own config; None to learn what the call alone says.
    """
    if name in settings:
        return settings[name]
    value = getattr(settings.get("generation_config"), name, None)
    return getattr(own, name, None) if value is None else value


def decoding_settings(
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int | None,
    given: Mapping[str, Any],
    own: GenerationConfig | None = None,
) -> dict[str, Any]:
    """Arguments of the model's `generate` beside the prompts: greedy unless something given says otherwise.

    Args:
        tokenizer: pads, and splits stop strings.
        max_new_tokens: the longest answer; None leaves it to what is given.
        given: the caller's own arguments, which win.
        own: the model's own config, whose stop strings hold where the call gives none.

    Raises:
        ValueError: an argument that the engine sets, one that asks for what an answer does not hold, or two that say
            how long answers are.
    """
    given = {name: value for name, value in given.items() if name != "generation_config" or value is not None}
    if taken := [name for name in OURS if name in given]:
        raise ValueError(f"the engine sets {', '.join(taken)} itself; leave them out")
    if unread := [name for name in OUTPUTS if asked(name, given, None)]:
        raise ValueError(f"{', '.join(unread)} would have no effect: answers are texts; leave them out")
    if max_new_tokens is not None and (clash := [name for name in LENGTHS if name in given]):
        raise ValueError(f"{clash[0]} says how long answers are: pass max_new_tokens=None with it")
    settings: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "return_dict_in_generate": False}
    if max_new_tokens is not None:
        settings["max_new_tokens"] = max_new_tokens
    if asked("stop_strings", given, own) is not None:
        settings["tokenizer"] = tokenizer
    # As keywords, for what a given config leaves open would be taken from the model's own.
    greedy = {name: value for name, value in GREEDY.items() if asked(name, given, None) is None}
    return {**settings, **given, **greedy}


def check_prefill(composer: Composer, settings: Mapping[str, Any], own: GenerationConfig | None = None) -> None:
    """Refuse to split or lengthen prompts where the composer decides on the whole of each.

    Args:
        composer: how adapters are composed.
        settings: arguments of the model's `generate`.
        own: the model's own config, which fills what the settings leave open.

    Raises:
        ValueError: the prompts would reach it in pieces, or may do so with tokens drafted behind them.
    """
    if composer.scope != "prompt":
        return
    if size := asked("prefill_chunk_size", settings, own):
        raise ValueError(
            f"composer {composer.name!r} decides once on the whole prompt, so prompts cannot be read in pieces of "
            f"{size} tokens: leave prefill_chunk_size out, or pass None where a config sets it"
        )
    for name in DRAFTS:
        value = asked(name, settings, own)
        if value is not None and value is not False:
            raise ValueError(
                f"composer {composer.name!r} decides once on the whole prompt, and in assisted decoding the first pass "
                f"may read drafts behind it: leave {name} out, or pass None where a config sets it"
            )
