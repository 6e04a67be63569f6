"""Tiny base models from configurations, and PEFT adapters made on the spot with PEFT itself as the oracle."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 128
CONFIGS: Mapping[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "t5": T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    ),
}
CLASSES: Mapping[str, type] = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel, "t5": T5ForConditionalGeneration}
TASK_TYPES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "t5": ["q", "v"]}
ALL_TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "t5": "embed_tokens"}


def base_model(base: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A randomly initialised model ("llama", "gpt2" or "t5"), always the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # the configuration is copied, because a model keeps and changes the one it is given
        return CLASSES[base](type(CONFIGS[base]).from_dict(CONFIGS[base].to_dict())).to(dtype).eval()


def peft_adapter(
    parent: Path,
    name: str = "adapter",
    *,
    base: str = "llama",
    seed: int = 1,
    scale: float = 0.3,
    dtype: torch.dtype = torch.float32,
    examples: list[str] | None = None,
    **lora: Any,
) -> tuple[Path, PeftModel]:
    """A folder `parent/name` that PEFT saved, with random A and B, and the PEFT model itself as the oracle.

    Keyword arguments go to `LoraConfig`; r is 4, lora_alpha 8 and the targets are `TARGETS[base]` unless given.
    """
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[base], "task_type": TASK_TYPES[base], **lora}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")
        model = get_peft_model(base_model(base, dtype=dtype), LoraConfig(**settings))
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
                parameter.data = values.to(parameter.dtype)
        folder = parent / name
        model.save_pretrained(folder)
    card = {"description": name, "examples": examples or [f"{name} example {i}" for i in range(20)]}
    (folder / "card.json").write_text(json.dumps(card))
    return folder, model.eval()


def peft_load(folder: Path, *, base: str = "llama", dtype: torch.dtype = torch.float32) -> PeftModel:
    """What stock PEFT makes of an adapter folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base_model(base, dtype=dtype), folder, autocast_adapter_dtype=False).eval()


def logits(model: nn.Module, base: str = "llama", *, batch: int = 3, seq: int = 12) -> Tensor:
    """Logits (batch, seq, vocabulary) on fixed random tokens."""
    ids = torch.randint(3, VOCABULARY, (batch, seq), generator=torch.Generator().manual_seed(1))
    extra = {"decoder_input_ids": ids.flip(1)} if base == "t5" else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def edited(
    folder: Path,
    copy: Path,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Path:
    """The folder `copy`, made from an adapter folder with fields of its configuration or its tensors changed."""
    shutil.copytree(folder, copy)
    if config is not None:
        file = copy / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    if tensors is not None:
        weights = copy / "adapter_model.safetensors"
        save_file(tensors(load_file(weights)), weights, metadata={"format": "pt"})
    return copy


def relative_error(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over the norm of what was wanted."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
