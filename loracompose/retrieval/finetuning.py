"""Fine-tune the sentence encoder of an index on the example prompts of its adapters.

LoraRetriever (Zhao et al., arXiv:2402.09997) trains its encoder so that prompts of one adapter lie together: for two
examples x and x⁺ of one adapter and examples x⁻ of others, all under the instruction, with s the cosine,

    L = -log(e^{s(x, x⁺) / t} / (e^{s(x, x⁺) / t} + Σ e^{s(x, x⁻) / t}))

on the adapters of 40 % of the tasks; 0 % and 100 % are its ablations. Where we depart from it, and why:

- The printed loss lacks the -log; this is InfoNCE as it is known.
- Negatives are all other texts of a batch, whose pairs are of different adapters, and every text takes its turn as x:
  more comparisons for the same forward passes than p random negatives would give.
- An index compares whole prompts with and without the instruction (`embedding.py`), so both are trained on, by turns.
  Openings and closings of prompts, which it compares as well, are not trained on.
- The paper names no hyper-parameter; `benchmarks/retriever_finetuning.py` compares recipes on held-out example prompts,
  never on test prompts.

What an index fits in closed form comes on top of the encoder. It is fitted on the examples that the encoder was trained
on, which are then told apart more easily than prompts that it has not seen.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loracompose import __version__
from loracompose.adapters.folder import sync, write_folder
from loracompose.devices import pick_device
from loracompose.encoders import encoder_revision, load_encoder
from loracompose.locating import DEFAULT_ENCODER, resolve_encoder
from loracompose.retrieval.embedding import INSTRUCTION
from loracompose.retrieval.encoder_recipe import EncoderRecipe
from loracompose.retrieval.pairing import Material, gather_material
from loracompose.retrieval.profiles import Source, draw_share, read_profiles, trainable

if TYPE_CHECKING:
    from loracompose.retrieval.contrastive import ContrastiveStep

RECORD = "training.json"


@dataclass(frozen=True)
class FinetuningReport:
    """What a training came to.

    `revision` is the new encoder's identity; `adapters` are those whose examples were trained on, `examples` how many
    these were; `losses` are those of the steps.
    """

    output: Path
    revision: str
    adapters: tuple[str, ...]
    examples: int
    losses: tuple[float, ...]
    seconds: float

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.losses)


def train_retriever(
    source: Source,
    output: Path | str,
    *,
    share: float = 1.0,
    recipe: EncoderRecipe | None = None,
    encoder: str = DEFAULT_ENCODER,
    instruction: str = INSTRUCTION,
    device: str = "auto",
    resume: bool = True,
    progress: bool = True,
    on_step: Callable[[ContrastiveStep], None] | None = None,
) -> FinetuningReport:
    """Train a sentence encoder on the profiles of a pool and write it as a sentence-transformers folder.

    Use it with `AdapterIndex.build(..., embedder=str(output))` or `AdapterIndex.open(..., embedder=..., reembed=True)`.
    The folder appears when everything is done, with `training.json` in it. Until then checkpoints lie beside it in
    `<output>.partial`; the same call continues from the last one, with the same result as a run that was never
    interrupted. For a seed, a machine and a number of threads the result is deterministic.

    Args:
        source: an `AdapterIndex`, the folder of one, a folder of adapters with cards, a JSONL file of
            `{"adapter", "prompt"}`, or a mapping from names to prompts. Prompts that several adapters share, and
            adapters with fewer than two others, are not trained on.
        output: the folder to write.
        share: part of the adapters whose examples are trained on, drawn by the recipe's seed; 0 copies the encoder.
        recipe: the hyper-parameters.
        encoder: the encoder to begin with, a folder or a Hub name.
        instruction: what an index puts before its prompts.
        device: "auto" is CUDA where there is one, else the CPU.
        resume: continue from a checkpoint if there is one; False deletes it.
        progress: show a bar with the loss.
        on_step: called after each step, with its loss.

    Raises:
        FileExistsError: `output` is there already.
        FileNotFoundError: there is no such source.
        ValueError: a bad profile, a share that leaves fewer than two adapters, a checkpoint of another run, or a
            loss that is not finite.
        LookupError: the encoder is nowhere to be found.
        ModuleNotFoundError: the packages that training needs are not installed.
    """
    target, recipe = Path(output), recipe or EncoderRecipe()
    if target.exists():
        raise FileExistsError(f"{target} exists: delete it or choose another folder")
    profiles = read_profiles(source)
    drawn = draw_share(profiles, share, recipe.seed)
    if not share:
        return _untrained(target, encoder)
    chosen = trainable({name: profiles[name] for name in drawn}, among=profiles)
    if len(chosen) < 2:
        raise ValueError(
            f"share={share} of {len(profiles)} adapters leaves {len(chosen)} with two or more prompts of its own; "
            "contrastive training needs two: give more examples or a larger share"
        )
    _check_installed()
    from loracompose.retrieval.contrastive import run_contrastive  # here, for importing it takes seconds

    started = time.monotonic()
    model = load_encoder(encoder, str(pick_device(device)))
    material = gather_material(chosen, recipe, instruction)
    partial = target.with_name(f"{target.name}.partial")
    _claim(partial, _identity(recipe, encoder_revision(encoder), material), resume=resume)
    with ExitStack() as stack:
        shown = stack.enter_context(_bar(target.name)) if progress else None
        losses = run_contrastive(
            model,
            material.texts,
            material.labels,
            material.batches,
            recipe,
            partial,
            _observers(shown, on_step),
        )
    seconds = time.monotonic() - started
    record = {
        **_origin(encoder),
        "share": share,
        "instruction": instruction,
        "recipe": asdict(recipe),
        "adapters": list(chosen),
        "examples": sum(map(len, chosen.values())),
        "steps": len(losses),
        "seconds": round(seconds, 1),
        "losses": [round(loss, 5) for loss in losses],
        "device": model.device.type,
    }
    _write(target, lambda folder: model.save_pretrained(str(folder), create_model_card=False), record)
    shutil.rmtree(partial, ignore_errors=True)
    return FinetuningReport(target, encoder_revision(target), tuple(chosen), record["examples"], losses, seconds)


def _untrained(target: Path, encoder: str) -> FinetuningReport:
    """The encoder's own files under another name: the same revision, for not one of them differs."""
    if resolve_encoder(encoder).source == "hub":
        load_encoder(encoder)  # fetches it
    origin = Path(resolve_encoder(encoder).path_or_name)
    record = {**_origin(encoder), "share": 0.0, "adapters": [], "examples": 0, "steps": 0}
    hidden = shutil.ignore_patterns(".*")
    _write(target, lambda folder: shutil.copytree(origin, folder, ignore=hidden, dirs_exist_ok=True), record)
    return FinetuningReport(target, encoder_revision(target), (), 0, (), 0.0)


def _identity(recipe: EncoderRecipe, revision: str, material: Material) -> str:
    parts = [asdict(recipe), revision, asdict(material)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _claim(partial: Path, identity: str, *, resume: bool) -> None:
    """Make the folder of the checkpoints this run's own."""
    mark = partial / "identity"
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    if mark.is_file():
        if mark.read_text(encoding="utf-8") != identity:
            raise ValueError(
                f"{partial} belongs to another run (other profiles, encoder or recipe): delete it or train with "
                "resume=False"
            )
        return
    partial.mkdir(parents=True, exist_ok=True)
    mark.write_text(identity, encoding="utf-8")
    sync(mark)


def _origin(encoder: str) -> dict[str, Any]:
    packages = ("torch", "transformers", "sentence-transformers")
    return {
        "encoder": encoder,
        "revision": encoder_revision(encoder),
        "versions": {"loracompose": __version__, **{package: version(package) for package in packages}},
    }


def _write(target: Path, fill: Callable[[Path], Any], record: dict[str, Any]) -> None:
    def everything(folder: Path) -> None:
        fill(folder)
        (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for file in folder.rglob("*"):
            sync(file)

    write_folder(target, everything, overwrite=False)


def _check_installed() -> None:
    missing = [name for name in ("accelerate", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"training an encoder needs {' and '.join(missing)}: pip install 'loracompose[retriever]'"
        )


@contextmanager
def _bar(name: str) -> Iterator[Callable[[ContrastiveStep], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(name)

        def show(step: ContrastiveStep) -> None:
            bar.update(task, total=step.total, completed=step.number, description=f"{name}  loss {step.loss:.3f}")

        yield show


def _observers(*observers: Callable[[ContrastiveStep], None] | None) -> Callable[[ContrastiveStep], None]:
    def tell(step: ContrastiveStep) -> None:
        for observer in observers:
            if observer is not None:
                observer(step)

    return tell
