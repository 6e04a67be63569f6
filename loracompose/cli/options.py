"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from loracompose.composers import Composer

Base = Annotated[str, typer.Option("--base", "-m", help="Base model: a folder or a Hub name.")]
Index = Annotated[Path | None, typer.Option("--index", "-i", help="Folder of an index.")]
ComposerName = Annotated[str, typer.Option("--composer", "-c", help="How to compose; `loracompose doctor` lists them.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A hyper-parameter of the composer, such as k=16; may be repeated.")
]
Router = Annotated[Path | None, typer.Option(help="Folder of what the composer has learned, for one that learns.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]

# Of every training of factors or gates.
Targets = Annotated[str, typer.Option(help="Adapted modules, by the ends of their names.")]
Epochs = Annotated[float, typer.Option(help="Passes over the data.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")]
BatchSize = Annotated[int, typer.Option(help="Examples per step.")]
LearningRate = Annotated[float, typer.Option(help="Highest learning rate of AdamW.")]
MaxLength = Annotated[int, typer.Option(help="Rows of more tokens are left out.")]
EvalEvery = Annotated[int, typer.Option(help="Steps between dev losses; 0 measures it at the end.")]
Restart = Annotated[bool, typer.Option("--restart", help="Forget an interrupted run.")]

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def parse_composer(name: str, settings: list[str] | None, router: Path | None = None) -> Composer:
    """A composer from its name, `key=value` settings and the folder of what it has learned.

    Raises:
        LookupError: no composer of that name.
        ValueError: a setting that the composer does not have, or a router where none is needed or none where one is.
    """
    from loracompose.composers import get_composer
    from loracompose.composition.router import load_router

    made = get_composer(name, None if router is None else load_router(router))
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(made) if dataclasses.is_dataclass(made) else ()
    known = [field.name for field in fields if field.name != "router"]
    values = parse_settings(settings, known, f"composer {name!r}")
    return dataclasses.replace(made, **values) if values else made  # type: ignore[type-var]


def parse_settings(settings: list[str] | None, known: Collection[str] | None, owner: str) -> dict[str, object]:
    """Values by name from `key=value` texts.

    Args:
        settings: the texts.
        known: the names there are; None leaves the check to the owner.
        owner: for the message.

    Raises:
        ValueError: no `key=value`, or a key that is not known.
    """
    values = {}
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals or (known is not None and key not in known):
            has = "" if known is None else f"{owner} has {', '.join(known) or 'no settings'}; "
            raise ValueError(f"--set {setting}: {has}write key=value")
        values[key] = parse_value(text)
    return values


def parse_targets(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_value(text: str) -> object:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_weights(text: str) -> list[float]:
    """Numbers separated by commas.

    Raises:
        ValueError: one of them is no number.
    """
    try:
        return [float(weight) for weight in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights {text!r}: give one number per adapter, such as 0.7,0.3") from None


def parse_set(text: str) -> list[str] | dict[str, float]:
    """An adapter set: "a,b" is a list, "a=0.7,b=0.3" a mapping, "" the base model.

    The weights of an adapter named twice add up, as they do in `Engine.generate`.

    Raises:
        ValueError: some adapters have a weight and some do not, a weight is no number, or belongs to no name.
    """
    pairs = [split_weight(item.strip()) for item in text.split(",") if item.strip()]
    if all(weight is None for _, weight in pairs):
        return [name for name, _ in pairs]
    totals: dict[str, float] = {}
    for name, weight in pairs:
        if weight is None:
            raise ValueError(f"--adapters {text!r}: give every adapter a weight (a=0.7,b=0.3) or none (a,b)")
        if not name:
            raise ValueError(f"--adapters {text!r}: there is no name before the weight {weight}, write a={weight}")
        totals[name] = totals.get(name, 0.0) + parse_weight(text, name, weight)
    return totals


def split_weight(item: str) -> tuple[str, str | None]:
    """An adapter and the text of its weight, None if it has none; an equals sign may also be part of a path."""
    name, equals, weight = item.rpartition("=")
    if not equals or "/" in weight or Path(item).is_dir():
        return item, None
    return name.strip(), weight.strip()


def parse_weight(text: str, name: str, weight: str) -> float:
    """The weight of one adapter of --adapters.

    Raises:
        ValueError: it is no number.
    """
    try:
        return float(weight)
    except ValueError:
        raise ValueError(
            f"--adapters {text!r}: the weight of {name!r} is {weight!r}, expected a number, such as {name}=0.7"
        ) from None
