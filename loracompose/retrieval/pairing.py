"""Which examples meet in which batch of contrastive training: a plan made once, a function of the seed alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from loracompose.retrieval.encoder_recipe import EncoderRecipe
from loracompose.retrieval.profiles import Profiles

Pair = tuple[int, int, int]
"""An adapter and two of its examples, by number."""


@dataclass(frozen=True)
class Material:
    """What is trained on: texts, the adapter of each by number, and the numbers of the texts of each batch."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    batches: tuple[tuple[int, ...], ...]


def gather_material(profiles: Profiles, recipe: EncoderRecipe, instruction: str) -> Material:
    """All texts, first as they are and then instructed, and batches that are of one of these kinds each."""
    plain = [prompt for prompts in profiles.values() for prompt in prompts]
    labels = [label for label, prompts in enumerate(profiles.values()) for _ in prompts]
    sizes = [len(prompts) for prompts in profiles.values()]
    starts = [sum(sizes[:label]) for label in range(len(sizes))]
    plan = pair_plan(sizes, batch_size=recipe.batch_size, epochs=recipe.epochs, seed=recipe.seed)
    batches = []
    for number, pairs in enumerate(plan):
        under = recipe.views == "instructed" or (recipe.views == "both" and number % 2 == 0)
        shift = len(plain) if under else 0
        batches.append(tuple(starts[adapter] + shift + place for adapter, *two in pairs for place in two))
    return Material((*plain, *(instruction + text for text in plain)), (*labels, *labels), tuple(batches))


def pair_plan(sizes: Sequence[int], *, batch_size: int, epochs: int, seed: int) -> tuple[tuple[Pair, ...], ...]:
    """Batches of pairs; the pairs of a batch are of different adapters, so that each is a negative of all others.

    An epoch pairs every example of an adapter with another one, at random; where their number is odd, one example
    occurs twice. The pairs of all adapters are dealt out in rounds, one an adapter, and a round is cut into batches
    of nearly equal size. A round with the pair of a single adapter, which has nothing to be told from, is left out.

    Args:
        sizes: examples of each adapter, at least two each.
        batch_size: most pairs in a batch, at least three.
        epochs: how often each example occurs.
        seed: of the pairs and their order.
    """
    random = np.random.default_rng(seed)
    return tuple(batch for _ in range(epochs) for batch in _epoch(sizes, batch_size, random))


def _epoch(sizes: Sequence[int], batch_size: int, random: np.random.Generator) -> list[tuple[Pair, ...]]:
    pairs = [_pairs(adapter, size, random) for adapter, size in enumerate(sizes)]
    batches: list[tuple[Pair, ...]] = []
    for place in range(max(map(len, pairs))):
        drawn = [own[place] for own in pairs if place < len(own)]
        if len(drawn) < 2:
            continue
        mixed = [drawn[i] for i in random.permutation(len(drawn))]
        count = math.ceil(len(mixed) / batch_size)
        bounds = [len(mixed) * part // count for part in range(count + 1)]
        batches.extend(tuple(mixed[low:high]) for low, high in pairwise(bounds))
    return [batches[i] for i in random.permutation(len(batches))]


def _pairs(adapter: int, size: int, random: np.random.Generator) -> list[Pair]:
    order = random.permutation(size).tolist()
    if size % 2:
        order.append(order[0])
    return [(adapter, first, second) for first, second in zip(order[::2], order[1::2], strict=True)]
