"""What learned gates are worth on equal sets, by the loss on the responses of test rows, and ablations of them.

    python benchmarks/response_loss.py TASKS --work runs/response_loss -o benchmarks/results/response_loss.json

TASKS holds `<task>.{train,test}.jsonl` files with "prompt" and "response". The set of a row are the three adapters of
the shipped pool nearest to its prompt: of the whole pool ("in-domain"), or as if its own had never been uploaded
("masked"). First the shipped routers are measured on equal weights, then the variants, each trained here. Variants of
one method see the same rows in the same order and differ in what their name says. A router that is in WORK is not
trained again, what is in the output is not measured again. `--only` takes some of the methods, in its order. `--pool`
takes another folder of adapters, each named as its task, for which no routers are shipped:

    python benchmarks/every_linear.py TASKS runs/every_linear
    python benchmarks/response_loss.py TASKS --pool runs/every_linear --work runs/every_linear_loss \
        -o benchmarks/results/response_loss_every_linear.json --only base "own adapter" "equal weights" \
        "mole, a gate per matrix" "mole, a gate per layer" "mole, a gate per block" "mole, a gate per network"
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracompose import AdapterIndex, __version__, load_adapter
from loracompose.benchmarks.made_with import made_otherwise
from loracompose.composers import Composer, get_composer
from loracompose.composers.mixture import Mixture
from loracompose.composition.bank import RankBank, gather_banks
from loracompose.composition.router import Router, load_router
from loracompose.durable import write_whole
from loracompose.models import DEFAULT_BASE, BaseModel, load_base
from loracompose.prompts import user_text
from loracompose.retrieval.retriever import Retriever
from loracompose.training.members import member_table
from loracompose.training.pool import LoadedPool, open_pool
from loracompose.training.recipe import Recipe
from loracompose.training.router import frozen, train_router
from loracompose.training.router_loop import Material, composed_loss
from loracompose.training.router_recipe import RouterRecipe
from loracompose.training.smora import train_smora
from loracompose.training.smora_settings import SmoraSettings
from loracompose.training.task_mixture import TaskMixture, task_mixture

ROOT = Path(__file__).parent.parent
POOL, ROUTERS = ROOT / "index" / "pool", ROOT / "index" / "routers"
K, PASS = 3, 6  # adapters of a row, rows of a pass
STEPS, BATCH, MAX_LENGTH = 16, 8, 64
UNSEEN = ("clinc_domain", "e2e_text2data", "snips_intent", "sst2", "subj")  # by the variants of RAMoLE
PROTOCOLS = ("in-domain", "masked")
# methods that learn nothing, with the weights that they run
FIXED = {"base": "none", "own adapter": "own", "selection": "best", "mixture": "posterior", "equal weights": "equal"}


@dataclass(frozen=True)
class Variant:
    """A router trained here.

    Attributes:
        label: its name in the results.
        method: the composer.
        settings: of the method.
        recipe: fields of the recipe that are not those of every variant.
        seen: the only tasks, and adapters, that it is trained with; all if none is named.
    """

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    seen: tuple[str, ...] = ()


SEEN = ("fr_en", "snips_slots", "trec", "wiki_split")  # together they adapt every module that the pool adapts
VARIANTS = (
    *(Variant(f"mole, a gate per {g}", "mole", {"granularity": g}) for g in ("matrix", "layer", "block", "network")),
    *(
        Variant(f"ramole, adapter dropout {p}", "ramole", {}, {"members": "all", "adapter_dropout": p}, SEEN)
        for p in (0.0, 0.5)
    ),
    Variant("xlora", "xlora"),
)
# Adapters with a router of their own, trained from scratch. Ranks that share a gate are one expert: a block of 8 is a
# whole LoRA of rank 8, of which two act on a token. (Of one block alone the gate never moves: it is refused.)
BLOCKS = {f"smora, 16 of 64 ranks in blocks of {b}": b for b in (1, 8)}


@dataclass(frozen=True, eq=False)
class Test:
    """Test rows, and the sets that they run.

    Attributes:
        base: the model.
        pool: the adapters.
        rows: the rows.
        own: the column of each row's own adapter, (N,).
        members: protocol -> (N, K) bool.
        posterior: protocol -> weights by retrieval, (N, K).
    """

    base: BaseModel
    pool: LoadedPool
    rows: TaskMixture
    own: Tensor
    members: Mapping[str, Tensor]
    posterior: Mapping[str, Tensor]

    def weights(self, kind: str, protocol: str) -> Tensor:
        """The weights of every row, (N, K): "none", "own", "best", "equal" or "posterior"."""
        members, posterior = self.members[protocol], self.posterior[protocol]
        if kind in ("own", "best"):
            chosen = self.own if kind == "own" else posterior.argmax(dim=1)
            return torch.nn.functional.one_hot(chosen, members.shape[1]).float()
        return {"none": torch.zeros_like(posterior), "equal": members / K, "posterior": posterior}[kind]

    def losses(self, composer: Composer, weights: Tensor, banks: Mapping[str, RankBank] | None = None) -> list[float]:
        """The mean loss a response token of every row, in nats."""
        encoded = self.rows.encoded
        order = sorted(range(len(encoded)), key=lambda i: encoded[i].length)
        members = member_table(RouterRecipe(), self.rows.examples, self.pool.pool.names, None)
        pad = int(self.base.tokenizer.pad_token_id)
        material = Material(self.base.model, banks or self.pool.pool.banks, pad, self.rows, members)
        found = [0.0] * len(order)
        with torch.no_grad(), frozen(self.base.model):
            for start in range(0, len(order), PASS):
                places = order[start : start + PASS]
                batch = [encoded[i] for i in places]
                each, _ = composed_loss(material, composer, batch, weights[places], reduction="none")  # type: ignore[arg-type]
                for i, loss in zip(places, each.view(len(batch), -1).sum(dim=1).tolist(), strict=True):
                    found[i] = round(loss / len(encoded[i].response), 4)
        return found


def nearest(index: AdapterIndex, rows: TaskMixture, names: Sequence[str], masked: bool) -> tuple[Tensor, Tensor]:
    """Members (N, K) bool and their weights (N, K) by retrieval."""
    exclude = [[example.task] if masked else [] for example in rows.examples]
    found = Retriever(index, k=K).retrieve([user_text(example.prompt) for example in rows.examples], exclude=exclude)
    columns = [names.index(name) for name in found.names]
    members, weights = torch.zeros(2, len(rows.examples), len(names))
    members[:, columns], weights[:, columns] = found.scores.isfinite().float(), found.weights
    return members.bool(), weights


def test_of(base: BaseModel, index: AdapterIndex, pool: LoadedPool, data: Path, per_task: int) -> Test:
    """The rows that methods are measured on."""
    names = pool.pool.names
    lines = [line for name in sorted(names) for line in (data / f"{name}.test.jsonl").read_text("utf-8").splitlines()]
    rows = task_mixture(map(json.loads, lines), base.tokenizer, per_task=per_task, max_length=MAX_LENGTH)
    sets = {protocol: nearest(index, rows, names, protocol == "masked") for protocol in PROTOCOLS}
    own = torch.tensor([names.index(example.task) for example in rows.examples])
    members, posterior = ({p: both[part] for p, both in sets.items()} for part in (0, 1))
    return Test(base, pool, rows, own, members, posterior)


def trained(variant: Variant, test: Test, index: AdapterIndex, data: Path, work: Path, steps: int) -> Path:
    """The folder of a variant's router, trained now if it is not there."""
    folder = work / variant.label.replace(", ", "-").replace(" ", "_")
    if folder.exists():
        return folder
    tasks = variant.seen or tuple(sorted(test.pool.pool.names))
    common = RouterRecipe(
        steps=steps,
        batch_size=BATCH,
        warmup=3,
        max_length=MAX_LENGTH,
        tasks=tasks,
        members="retrieved",
        k=K,
        hide_own=0.0 if variant.seen else 0.5,
    )
    recipe = replace(common, **variant.recipe)
    pool: Any = [POOL / task for task in tasks] if variant.seen else index  # such variants are of the shipped pool
    settings = variant.settings
    train_router(variant.method, data, pool, folder, base=test.base, settings=settings, recipe=recipe, progress=False)
    return folder


def from_scratch(label: str, test: Test, data: Path, work: Path, steps: int) -> Path:
    """The folder of a SMoRA adapter, trained now if it is not there; its router lies beside it."""
    folder = work / f"smora-{BLOCKS[label]}"
    if not folder.exists():
        dtype = str(test.base.dtype).removeprefix("torch.")
        recipe = Recipe(rank=64, steps=steps, batch_size=BATCH, warmup=3, max_length=MAX_LENGTH, dtype=dtype)
        settings = SmoraSettings(active=16, block=BLOCKS[label])
        rows = [data / f"{name}.train.jsonl" for name in sorted(test.pool.pool.names)]
        train_smora(rows, folder, recipe=recipe, settings=settings, device="cpu", progress=False)
    return folder


def fixed(test: Test, kind: str) -> dict[str, Any]:
    """Losses of a weighted sum."""
    if kind in ("none", "own"):  # the set of a row does not matter
        losses = test.losses(Mixture(), test.weights(kind, PROTOCOLS[0]))
        return dict.fromkeys(PROTOCOLS if kind == "none" else PROTOCOLS[:1], losses)
    return {protocol: test.losses(Mixture(), test.weights(kind, protocol)) for protocol in PROTOCOLS}


def learned(test: Test, folder: Callable[[], Path]) -> dict[str, Any]:
    """Losses of a router on equal weights."""
    router = load_router(folder())
    composer = get_composer(router.method, router)
    losses = {protocol: test.losses(composer, test.weights("equal", protocol)) for protocol in PROTOCOLS}
    return {**losses, "training": training(router)}


def alone(test: Test, folder: Callable[[], Path]) -> dict[str, Any]:
    """Losses of a SMoRA adapter under its own router, whatever the row."""
    home = folder()
    router = load_router(home.with_name(f"{home.name}.router"))
    banks = gather_banks([load_adapter(home, base=test.base.model, dtype=torch.float32)])
    losses = test.losses(get_composer(router.method, router), torch.ones(len(test.own), 1), banks)
    return {PROTOCOLS[0]: losses, "training": training(router)}


def training(router: Router) -> dict[str, Any]:
    """What the record of a router says about how it was made."""
    record = {name: router.training[name] for name in ("steps", "examples", "seconds")}
    return {**record, "parameters": sum(t.numel() for t in router.tensors.values()), "settings": brief(router.settings)}


def brief(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the tables of modules."""
    return {name: value for name, value in settings.items() if not isinstance(value, Mapping)}


def about(test: Test, given: argparse.Namespace) -> dict[str, Any]:
    """What the numbers are of; two runs of one file must agree in it."""
    return {
        "data": test.rows.digest,
        "tasks": [example.task for example in test.rows.examples],
        "tokens": [len(example.response) for example in test.rows.encoded],
        "adapters": K,
        "variants": {"steps": given.steps, "batch_size": BATCH, "max_length": MAX_LENGTH},
        "unseen": [name for name in sorted(test.pool.pool.names) if name not in SEEN],
        "base": test.base.name,
        "dtype": str(test.base.dtype).removeprefix("torch."),
        "machine": platform.machine(),
        "versions": {"loracompose": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}},
    }


def main() -> None:
    """Measure what the command line asks for and the output does not have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pool", type=Path, default=POOL, help="folder of adapters, each named as its task")
    parser.add_argument("--work", type=Path, required=True, help="where routers and the index are kept")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "response_loss.json")
    parser.add_argument("--rows", type=int, default=8, help="test rows of each task")
    parser.add_argument("--steps", type=int, default=STEPS, help="of every variant")
    parser.add_argument("--dtype", default="auto", help="of the base; bfloat16 where the CPU multiplies in it")
    parser.add_argument("--only", nargs="+", default=[])
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    paths = {"data": str(given.data.resolve()), "pool": str(given.pool.resolve())}
    if (other := made_otherwise(given.work, {"steps": given.steps, "dtype": given.dtype, **paths})) is not None:
        parser.error(f"{given.work} was made with {other}; give the same, or another --work")
    base, place = load_base(DEFAULT_BASE, device="cpu", dtype=given.dtype), given.work / "index"
    with (
        AdapterIndex.open(place) if place.exists() else AdapterIndex.build(given.pool, place) as index,
        open_pool(index, base) as pool,
    ):
        test = test_of(base, index, pool, given.data, given.rows)
        results = {"about": about(test, given), "methods": {}}
        if given.output.is_file():
            results = json.loads(given.output.read_text(encoding="utf-8"))
            if results["about"] != about(test, given):
                raise ValueError(f"{given.output} was measured on other rows, steps or versions: choose another file")
        work = jobs(test, index, given)
        for label in given.only or work:
            if label in results["methods"]:
                continue
            began = time.process_time()
            results["methods"][label] = {**work[label](), "cpu_seconds": round(time.process_time() - began, 1)}
            write_whole(given.output, json.dumps(results, indent=None) + "\n")
            print(
                label,
                {p: round(sum(results["methods"][label].get(p, [])) / len(test.own), 4) for p in PROTOCOLS},
                flush=True,
            )


def jobs(test: Test, index: AdapterIndex, given: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Everything that is to be measured, by its name in the results."""
    made: dict[str, Callable[[], dict[str, Any]]] = {label: partial(fixed, test, kind) for label, kind in FIXED.items()}
    shipped = sorted(ROUTERS.iterdir()) if given.pool == POOL else []
    for folder in (folder for folder in shipped if folder.is_dir()):
        made[folder.name] = partial(learned, test, partial(Path, folder))
    for variant in VARIANTS:
        made[variant.label] = partial(
            learned, test, partial(trained, variant, test, index, given.data, given.work, given.steps)
        )
    for label in BLOCKS:
        made[label] = partial(alone, test, partial(from_scratch, label, test, given.data, given.work, given.steps))
    return made


if __name__ == "__main__":
    main()
