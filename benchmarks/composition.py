"""What composing one set of three adapters costs, beside what others use: `python benchmarks/composition.py`.

Random adapters of ranks 16, 8 and 8 on all seven linear modules of every layer, at the widths of SmolLM2-135M. Times
are processor time of one thread, so that they mean something on a machine that others use; contenders alternate, the
median of the repeats is reported, and equality of results is checked before anything is timed. scikit-learn and PEFT
run on two layers of the thirty and are scaled up by 15.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import sklearn
import torch
from peft import LoraConfig, get_peft_model
from sklearn.cluster import KMeans
from transformers import LlamaConfig, LlamaForCausalLM

from loracompose import COMPOSERS, Adapter, LoraFactors
from loracompose.composers.lego import Lego
from loracompose.composers.linear import Linear
from loracompose.composition.bank import RankBank, content_order, gather_banks
from loracompose.composition.clustering import kmeans

HIDDEN, KEYS, INNER, LAYERS = 576, 192, 1536, 30
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KEYS),
    "self_attn.v_proj": (HIDDEN, KEYS),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
RANKS = (16, 8, 8)
WEIGHTS = (0.5, 0.3, 0.2)
FEW = 2  # layers for the contenders that take minutes


def adapter(seed: int, rank: int, layers: int) -> Adapter:
    """Random factors of the size that training leaves."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(layers):
        for name, (d_in, d_out) in SHAPES.items():
            A = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            factors[f"model.layers.{layer}.{name}"] = LoraFactors(
                A, 0.05 * torch.randn(d_out, rank, generator=generator)
            )
    return Adapter(f"a{seed}", factors)


def material(layers: int) -> tuple[list[Adapter], dict[str, RankBank], torch.Tensor]:
    """The adapters sorted by content, their banks, and their weights (1, 3)."""
    made = [adapter(seed, rank, layers) for seed, rank in enumerate(RANKS, 1)]
    order = content_order(made)
    adapters = [made[i] for i in order]
    return adapters, gather_banks(adapters), torch.tensor([[WEIGHTS[i] for i in order]])


def seconds(run: Callable[[], Any]) -> float:
    """Processor seconds of one thread."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def units(bank: RankBank, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ranks of one module as points [a; b] and their masses."""
    return torch.cat([bank.A, bank.B.mT], dim=1), bank.per_rank(weights)[0]


def lego_against_sklearn(repeats: int) -> dict[str, float]:
    """LEGO of all modules, and KMeans(n_init=10) of two layers times 15; inertia of ours over theirs, worst module."""
    _, banks, weights = material(LAYERS)
    few = list(banks)[: FEW * len(SHAPES)]
    points = {module: units(banks[module], weights) for module in few}
    k, ours, theirs, ratios = max(RANKS), [], [], []
    for module in few:
        x, w = points[module]
        own = kmeans((x @ x.mT)[None], w[None], k, n_init=10, max_iter=100, seed=0).inertia.item()
        other = KMeans(k, n_init=10, random_state=0).fit(x.numpy(), sample_weight=w.numpy()).inertia_
        ratios.append(own / other)
    for _ in range(repeats):
        ours.append(seconds(lambda: Lego().compose(banks, weights)))
        own = [
            lambda x=x, w=w: KMeans(k, n_init=10, random_state=0).fit(x, sample_weight=w) for x, w in points.values()
        ]
        theirs.append(sum(seconds(fit) for fit in own) * LAYERS / FEW)
    a, b = statistics.median(ours), statistics.median(theirs)
    return {"lego_s": a, "sklearn_s": b, "times": b / a, "worst_inertia_ratio": max(ratios)}


def linear_against_peft(repeats: int) -> dict[str, float]:
    """`linear` at rank 16 and PEFT's add_weighted_adapter(combination_type="svd") on two layers, times 15."""
    adapters, banks, weights = material(FEW)
    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=FEW, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    targets = [name.rpartition(".")[2] for name in SHAPES]
    model: Any = None
    for own in adapters:
        rank = next(iter(own.factors.values())).rank
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        if model is None:
            model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name=own.name)
        else:
            model.add_adapter(own.name, lora)
        for module, f in own.factors.items():
            layer = model.base_model.model.get_submodule(module)
            layer.lora_A[own.name].weight.data, layer.lora_B[own.name].weight.data = f.A.clone(), f.B.clone()

    def theirs() -> None:
        model.delete_adapter("svd") if "svd" in model.peft_config else None
        model.add_weighted_adapter(
            [own.name for own in adapters], weights[0].tolist(), "svd", combination_type="svd", svd_rank=max(RANKS)
        )

    def ours() -> Any:
        return Linear(rank=max(RANKS)).compose(banks, weights)

    theirs()
    worst = 0.0
    for module, delta in ours().items():
        layer = model.base_model.model.get_submodule(module)
        want = layer.lora_B["svd"].weight @ layer.lora_A["svd"].weight
        worst = max(worst, float((delta.B @ delta.A - want).norm() / want.norm()))
    pairs = [(seconds(ours) * LAYERS / FEW, seconds(theirs) * LAYERS / FEW) for _ in range(repeats)]
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"linear_s": a, "peft_svd_s": b, "times": b / a, "worst_relative_difference": worst}


def every_composer(names: list[str], repeats: int) -> dict[str, float]:
    """Seconds to compose one set over all modules."""
    _, banks, weights = material(LAYERS)
    found = {}
    for name in names:
        composer = COMPOSERS[name]()
        composer.compose(banks, weights)
        found[name] = statistics.median(seconds(partial(composer.compose, banks, weights)) for _ in range(repeats))
    return found


def main() -> None:
    """Measure and print, or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--composers", default="fusion,linear,lego,knots,ties,magnitude_prune,dare")
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with torch.no_grad():
        report = {
            "setting": {"ranks": RANKS, "modules": LAYERS * len(SHAPES), "repeats": arguments.repeats, "threads": 1},
            "machine": platform.processor() or platform.machine(),
            "versions": {"torch": str(torch.__version__), "peft": peft.__version__, "sklearn": sklearn.__version__},
            "lego": lego_against_sklearn(arguments.repeats),
            "linear": linear_against_peft(arguments.repeats),
            "seconds_per_set": every_composer(arguments.composers.split(","), arguments.repeats),
        }
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
