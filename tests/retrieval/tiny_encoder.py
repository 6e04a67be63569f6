"""A tiny random BERT as a sentence encoder, in a folder: one token a word, vectors of 32 numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from loracompose.retrieval.embedding import INSTRUCTION
from tests.retrieval.material import PROMPTS, TASKS

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def encoder_folder(parent: Path, *, seed: int = 0, weight: float | None = None) -> Path:
    """A folder that sentence-transformers loads; `weight` sets one weight of the last layer."""
    texts = [INSTRUCTION, *PROMPTS, *(text for group in TASKS.values() for text in group)]
    words = sorted({word for text in texts for word in text.lower().replace(":", " :").split()})
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIALS, *words])}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=48,
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True)),
    )
    config = BertConfig(
        vocab_size=len(SPECIALS) + len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bert = BertModel(config)
    if weight is not None:
        bert.encoder.layer[1].output.dense.weight.data[0, 0] = weight
    bert.save_pretrained(parent / "bert")
    tokenizer.save_pretrained(parent / "bert")
    transformer = Transformer(str(parent / "bert"))
    model = SentenceTransformer(modules=[transformer, Pooling(config.hidden_size)], device="cpu")
    model.save_pretrained(str(parent / "encoder"), create_model_card=False)
    return parent / "encoder"
