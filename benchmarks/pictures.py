"""Draw docs/lego_clusters.png and docs/gates.png from the shipped pool: `python benchmarks/pictures.py`."""

from __future__ import annotations

from pathlib import Path

import torch

from loracompose import Adapter, load_adapter
from loracompose.composers.lego import Lego
from loracompose.composers.lora_flow import LoraFlow
from loracompose.composition.bank import content_order, gather_banks
from loracompose.composition.router import load_router
from loracompose.evaluation.pictures import gate_heat_map, rank_clusters
from loracompose.evaluation.watching import by_layer, decisions, watch
from loracompose.models import DEFAULT_BASE, load_base
from loracompose.prompts import encode_prompts
from loracompose.runtime.attach import attach

ROOT = Path(__file__).parent.parent
LAYERS = 30
PROMPT = "French: Ce film est une merveille, drôle et tendre.\nEnglish:"
EQUAL = torch.full((3,), 1 / 3)


def pool(*names: str) -> list[Adapter]:
    adapters = [load_adapter(ROOT / "index" / "pool" / name) for name in names]
    return [adapters[i] for i in content_order(adapters)]


def clusters():
    """Two adapters trained from one seed, and one from another."""
    adapters = pool("subj", "clinc_domain", "sst2")
    found = Lego().clusters(gather_banks(adapters), EQUAL)
    panels = {}
    for part in ("q_proj", "v_proj"):
        own = [found[f"model.layers.{layer}.self_attn.{part}"] for layer in range(LAYERS)]
        panels[part] = [(module.owner, module.labels) for module in own]
    return rank_clusters(panels, [adapter.name for adapter in adapters])


def gates():
    """LoRA-Flow's shares for one prompt with one adapter that fits and two that do not."""
    adapters = pool("sst2", "fr_en", "trec")
    banks = gather_banks(adapters)
    base = load_base(DEFAULT_BASE, dtype="float32")
    inputs = encode_prompts(base.tokenizer, [PROMPT])
    deltas = LoraFlow(load_router(ROOT / "index" / "routers" / "lora_flow")).compose(banks, EQUAL[None])
    with torch.no_grad(), attach(base.model, watch(deltas)) as attached:
        base.model(**inputs)
    shares = by_layer(decisions(attached.scratch), {m: bank.owner for m, bank in banks.items()}, len(adapters))
    tokens = [base.tokenizer.decode([token]) for token in inputs["input_ids"][0]]
    return gate_heat_map(shares[0], [adapter.name for adapter in adapters], tokens)


if __name__ == "__main__":
    clusters().savefig(ROOT / "docs" / "lego_clusters.png", dpi=100)
    gates().savefig(ROOT / "docs" / "gates.png", dpi=80)
