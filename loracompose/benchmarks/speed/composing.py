"""How long it takes to compose one set of adapters, beside scikit-learn's k-means and PEFT's merges."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from loracompose.adapters.checkpoint import convert
from loracompose.adapters.lora import Adapter
from loracompose.benchmarks.speed.case import Case, make_adapters, write_adapters
from loracompose.benchmarks.speed.measure import machine
from loracompose.benchmarks.speed.peft_ways import peft_model
from loracompose.benchmarks.speed.rounds import summary
from loracompose.composers import get_composer
from loracompose.composers.lego import Lego
from loracompose.composition.bank import RankBank, content_order, gather_banks
from loracompose.composition.clustering import kmeans
from loracompose.models import BaseModel

SET = Case(rows=1, k=3, distinct=1, ranks=(16,), targets="all")
METHODS = ("mixture", "linear", "lego", "fusion", "knots")
EFFORTS = ((Lego().n_init, Lego().max_iter), (3, 10))  # starts and steps of LEGO's clustering: its own, and fewer
ENTRYWISE = ("magnitude_prune", "dare", "ties", "dare_ties")  # seconds each: they look at every entry of every update


def measure(
    base: BaseModel, *, rounds: int = 7, slow_rounds: int = 3, case: Case = SET, seed: int = 0
) -> dict[str, Any]:
    """Seconds to compose one set over all its modules, and what the results of two implementations differ by.

    Args:
        base: the model; only its modules' shapes matter.
        rounds: measurements of what is fast.
        slow_rounds: measurements of the entry-wise methods, of scikit-learn and of PEFT, seconds to minutes each.
        case: the adapters, of which one row's set is composed.
        seed: of the adapters.
    """
    made = make_adapters(case, base.model, seed)
    ordered = [made[i] for i in content_order(made)]
    banks = gather_banks(ordered)
    weights = torch.full((1, case.k), 1 / case.k)
    with torch.inference_mode():
        ours = {
            name: repeated(partial(get_composer(name).compose, banks, weights), count)
            for names, count in ((METHODS, rounds), (ENTRYWISE, slow_rounds))
            for name in names
        }
        lego = lego_against_sklearn(banks, max(case.ranks), rounds, slow_rounds)
    with TemporaryDirectory() as folder:
        peft = peft_model(base.model, write_adapters(made, Path(folder)), 1)
    linear = linear_against_svd(peft, made, ours["linear"], slow_rounds)
    return {
        "question": "what composing one set of adapters costs",
        "model": base.name,
        "modules": len(banks),
        "adapters": case.k,
        "rounds": rounds,
        "slow_rounds": slow_rounds,
        "ranks": list(case.ranks),
        "machine": machine(torch.device("cpu")),
        "seconds": {name: summary(values) for name, values in ours.items()},
        "lego": lego,
        "linear": linear,
    }


def repeated(work: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each of several runs, after one that is not counted."""
    work()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def lego_against_sklearn(banks: Mapping[str, RankBank], k: int, rounds: int, slow_rounds: int) -> dict[str, Any]:
    """The clustering alone: all modules at once, as the composer does, and module by module with n_init=10.

    Ours works in float32, as the composer does, scikit-learn in float64. Ours takes a point and its negative for the
    same. So both cluster magnitudes here, among which no point is nearer when it is turned round.
    """
    from sklearn.cluster import KMeans

    points = {path: torch.cat([bank.A, bank.B.mT], dim=1).abs() for path, bank in banks.items()}

    def batched(starts: int, steps: int) -> float:
        gram = torch.stack([cloud @ cloud.T for cloud in points.values()])  # (G, R, R)
        share = gram.new_ones(gram.shape[:2])
        return float(kmeans(gram, share, k, n_init=starts, max_iter=steps, seed=0).inertia.sum())

    def one_by_one() -> float:
        return sum(
            float(KMeans(k, n_init=10, random_state=0).fit(cloud.double().numpy()).inertia_)
            for cloud in points.values()
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = repeated(one_by_one, slow_rounds)
        ours = {effort: repeated(partial(batched, *effort), rounds) for effort in EFFORTS}
        reached = one_by_one()
    found = {
        f"{starts} starts of {steps} steps": {
            "seconds": summary(seconds),
            "times_faster": float(np.median(theirs) / np.median(seconds)),
            "inertia_ratio": batched(starts, steps) / reached,
        }
        for (starts, steps), seconds in ours.items()
    }
    return {"sklearn_seconds": summary(theirs), "efforts": found}


def linear_against_svd(
    peft: PeftModel, adapters: Sequence[Adapter], ours: Sequence[float], rounds: int
) -> dict[str, Any]:
    """Re-compression of a sum: ours by factored SVD, PEFT's by forming the matrix.

    Also the largest difference of the two results, and of each from the same in float64: where the last rank kept and
    the first one dropped weigh nearly alike, rounding decides what is kept.
    """
    names = [adapter.name for adapter in adapters]
    rank = max(part.rank for adapter in adapters for part in adapter.factors.values())
    seconds = []
    for number in range(rounds):
        start = time.perf_counter()
        peft.add_weighted_adapter(names, [1 / len(names)] * len(names), f"svd{number}", "svd", svd_rank=rank)
        seconds.append(time.perf_counter() - start)
    order = content_order(adapters)
    ordered = [adapters[i] for i in order]
    weights = torch.full((1, len(adapters)), 1 / len(adapters))
    own = composed_updates(gather_banks(ordered), weights)
    precise = [convert(adapter, torch.device("cpu"), torch.float64) for adapter in ordered]
    exact = composed_updates(gather_banks(precise), weights.double())
    layers = {path: peft.base_model.model.get_submodule(path) for path in own}
    theirs = {
        path: (layer.lora_B["svd0"].weight @ layer.lora_A["svd0"].weight * layer.scaling["svd0"]).detach()
        for path, layer in layers.items()
    }
    return {
        "seconds": summary(ours),
        "peft_seconds": summary(seconds),
        "times_faster": float(np.median(seconds) / np.median(ours)),
        "difference": largest_difference(own, theirs),
        "error": largest_difference(own, exact),
        "peft_error": largest_difference(theirs, exact),
    }


def composed_updates(banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, Tensor]:
    """delta_W of every module, (d_out, d_in), of the one row's sum, re-compressed in the dtype of the banks."""
    deltas = get_composer("linear").compose(banks, weights)
    return {
        path: (delta.B[0] if delta.per_row else delta.B) * delta.weights[0] @ (delta.A[0] if delta.per_row else delta.A)
        for path, delta in deltas.items()
    }


def largest_difference(updates: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The largest difference of an entry over the largest entry of its module's reference."""
    return max(float((updates[path] - own).abs().max() / own.abs().max()) for path, own in reference.items())
