"""Contrastive training of a sentence encoder: the loss, and the trainer of sentence-transformers around it."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import BatchSampler
from transformers import PrinterCallback, TrainerCallback

from loracompose.adapters.folder import sync
from loracompose.retrieval.encoder_recipe import EncoderRecipe

CHUNK = 16
"""Texts of a batch that are padded together, after sorting by length; padding is what a CPU spends most time on."""

_COMPLETE = "complete"


@dataclass(frozen=True)
class ContrastiveStep:
    """What one optimizer step came to: `number` counts from 1."""

    number: int
    total: int
    loss: float


def info_nce(vectors: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """InfoNCE of unit vectors, a scalar: the mean of -log(e^{s⁺/t} / (e^{s⁺/t} + Σ e^{s⁻/t})).

    The mean is over all ordered pairs of vectors of one label, s⁺ being their inner product; s⁻ are those of the first
    with every vector of another label. Vectors of one label are never negatives of each other.

    Args:
        vectors: (batch, dimension), unit.
        labels: (batch,), whose they are; at least one label twice, and at least two labels.
        temperature: above 0.
    """
    logits = vectors @ vectors.T / temperature  # (batch, batch)
    same = labels[:, None] == labels[None, :]
    negatives = logits.masked_fill(same, -math.inf).logsumexp(dim=1, keepdim=True)  # (batch, 1)
    positives = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return functional.softplus(negatives - logits)[positives].mean()


class InfoNCE(nn.Module):
    """The loss as the trainer calls it; the columns of a batch are chunks of its texts."""

    def __init__(self, model: SentenceTransformer, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, sentence_features: Sequence[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of one batch.

        Raises:
            ValueError: it is not finite.
        """
        vectors = torch.cat([self.model(chunk)["sentence_embedding"] for chunk in sentence_features])
        loss = info_nce(functional.normalize(vectors, dim=1), labels, self.temperature)
        if not torch.isfinite(loss):
            raise ValueError(f"the contrastive loss is {loss.item()}: lower the learning rate")
        return loss


class LengthSorted:
    """A collator: the texts of a batch in chunks of like length, a column of features each, and their labels."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.valid_label_columns = ["label"]  # which the trainer asks for
        self._preprocess = model.preprocess

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Features named as the trainer expects them, and `label`, (batch,), in the order of the sorted texts."""
        ordered = sorted(rows, key=lambda row: len(row["text"]))
        batch: dict[str, Any] = {"label": torch.tensor([row["label"] for row in ordered])}
        for start in range(0, len(ordered), CHUNK):
            features = self._preprocess([row["text"] for row in ordered[start : start + CHUNK]])
            batch |= {f"chunk{start}_{key}": value for key, value in features.items()}
        return batch


class PlannedBatches(BatchSampler):
    """Batches that were decided beforehand, so that a continued run sees those that it has not seen."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        super().__init__(range(sum(map(len, batches))), max(map(len, batches)), drop_last=False)
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Trainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """The trainer with the batches of a plan, and without the card it would write, which may ask the Hub."""

    def __init__(self, batches: Sequence[Sequence[int]], **arguments: Any) -> None:
        self._batches = batches
        super().__init__(**arguments)
        self.remove_callback(PrinterCallback)

    def get_batch_sampler(self, *_: Any, **__: Any) -> BatchSampler:
        return PlannedBatches(self._batches)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None."""


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Reports each step, and marks each checkpoint once all of it is on the disk."""

    def __init__(self, on_step: Callable[[ContrastiveStep], None] | None) -> None:
        self._on_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if self._on_step is not None and "loss" in logs:
            self._on_step(ContrastiveStep(state.global_step, state.max_steps, logs["loss"]))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for file in folder.rglob("*"):
            sync(file)
        (folder / _COMPLETE).touch()
        sync(folder)


def run_contrastive(
    model: SentenceTransformer,
    texts: Sequence[str],
    labels: Sequence[int],
    batches: Sequence[Sequence[int]],
    recipe: EncoderRecipe,
    checkpoints: Path,
    on_step: Callable[[ContrastiveStep], None] | None = None,
) -> tuple[float, ...]:
    """Train a model in place and return the loss of every step; it continues from the last complete checkpoint.

    The token embeddings are not trained: a pool has few of the words that the model knows.

    Args:
        model: the encoder.
        texts: what batches refer to.
        labels: the adapter of each text.
        batches: numbers of texts, a batch a step.
        recipe: the hyper-parameters.
        checkpoints: folder for checkpoints.
        on_step: called after every step; an exception it raises stops the run, which can be continued.

    Raises:
        ValueError: the loss is not finite, or the encoder is of a kind that cannot be trained here.
    """
    length = model.max_seq_length
    with _random_state(model.device):
        _freeze(model, recipe.depth)
        model.max_seq_length = recipe.max_length if length is None else min(length, recipe.max_length)
        trainer = _Trainer(
            batches,
            model=model,
            args=_arguments(recipe, len(batches), checkpoints, model.device),
            train_dataset=Dataset.from_dict({"text": list(texts), "label": list(labels)}),
            loss=InfoNCE(model, recipe.temperature),
            data_collator=LengthSorted(model),
            callbacks=[_Watch(on_step)],
        )
        trainer.train(resume_from_checkpoint=_last_complete(checkpoints))
    model.max_seq_length = length
    model.eval()
    return tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def _arguments(
    recipe: EncoderRecipe, steps: int, checkpoints: Path, device: torch.device
) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=2 * recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        save_strategy="steps",
        save_steps=recipe.save_every,
        save_total_limit=2,  # the older is deleted before the newer is marked as complete
        logging_strategy="steps",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def _freeze(model: SentenceTransformer, depth: float) -> None:
    """Leave what is trained: all but the token embeddings, or the last layers alone."""
    transformer = getattr(model[0], "auto_model", None)
    if transformer is None:
        raise ValueError(f"{type(model[0]).__name__} is no transformer: only transformer encoders can be trained here")
    transformer.get_input_embeddings().requires_grad_(False)
    if depth < 1:
        transformer.requires_grad_(False)
        layers = _layers(transformer)
        layers[len(layers) - math.ceil(depth * len(layers)) :].requires_grad_(True)
    if model.device.type == "cpu":
        transformer.set_attn_implementation("eager")  # faster than sdpa for short rows on a CPU


def _layers(transformer: Any) -> nn.ModuleList:
    count = transformer.config.num_hidden_layers
    for module in transformer.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"the layers of {type(transformer).__name__} are not one list: train all of it with depth=1")


def _last_complete(checkpoints: Path) -> str | None:
    """The newest checkpoint that was wholly written; others are deleted, lest the trainer count them."""
    found = {}
    for folder in checkpoints.glob("checkpoint-*"):
        if (folder / _COMPLETE).is_file():
            found[int(folder.name.rpartition("-")[2])] = folder
        else:
            shutil.rmtree(folder)
    return str(found[max(found)]) if found else None


@contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """Give the global generators, which the trainer seeds, back unchanged."""
    numbers, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(numbers)
            np.random.set_state(arrays)  # noqa: NPY002
