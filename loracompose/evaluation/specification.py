"""A method as one line of text: `NAME key=value ...`, for the command line and for benchmark files."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from loracompose.composers import COMPOSERS, Composer, get_composer
from loracompose.composition.router import load_router
from loracompose.evaluation.found import check_weighting
from loracompose.evaluation.lorauter import Lorauter
from loracompose.evaluation.methods import BASELINES, Base, Composed, Method, OneAdapter, Oracle
from loracompose.evaluation.searched import Searched

RETRIEVAL = ("k", "weighting", "temperature", "router", "label")
FILES = ("path", "weights")
WHOLE: Mapping[str, type[Any]] = {**BASELINES, "lorauter": Lorauter}  # what brings its own adapters and composer


def parse_method(line: str) -> Method:
    """A method from its line.

    A baseline: `base`, `oracle`, `uniform_all`, `random seed=1`, `few_shot shots=3`, `adapter path=FOLDER`,
    `lorauter k=3`, `lorahub weights=FILE`. A
    composer: its name, then any of `k=3`, `weighting=uniform`, `temperature=0.2`, `router=FOLDER` for one that
    learns, and its own settings as `set.NAME=VALUE`. `label=NAME` names it; otherwise its line does, without folders.

    Raises:
        LookupError: no method of that name.
        ValueError: a key that the method does not have, or a value out of its range.
    """
    words = shlex.split(line)
    if not words:
        raise ValueError("a method is a line such as 'mixture' or 'lego k=5 weighting=uniform set.k=16', got nothing")
    name, given = words[0], _pairs(line, words[1:])
    kind = Searched if name == Searched.label and "weights" in given else WHOLE.get(name)
    if kind is not None:
        return _baseline(kind, given, line)
    if name not in COMPOSERS:
        raise LookupError(f"no method {name!r}; there are {', '.join([*WHOLE, *COMPOSERS])}")
    settings = {key.removeprefix("set."): value for key, value in given.items() if key.startswith("set.")}
    rest = {key: value for key, value in given.items() if not key.startswith("set.")}
    _check_keys(rest, RETRIEVAL, line, hint="; settings of the composer are written set.NAME=VALUE")
    router = rest.pop("router", None)
    label = str(rest.pop("label", _label(words)))
    method = Composed(label=label, composer=build_composer(name, settings, router), **rest)
    if not isinstance(method.k, int) or method.k < 1:
        raise ValueError(f"{line!r}: k must be an integer of at least 1, got {method.k!r}")
    check_weighting(method.weighting, method.temperature)
    return method


def parse_methods(lines: Sequence[str]) -> tuple[Method, ...]:
    """The methods of a table; `base` and `oracle`, which scores are normalised by, come first if not given.

    Raises:
        ValueError: two methods of one label.
    """
    methods = [parse_method(line) for line in lines]
    for reference in (Oracle(), Base()):
        if not any(isinstance(method, type(reference)) for method in methods):
            methods.insert(0, reference)
    labels = [method.label for method in methods]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"two methods are called {twice[0]!r}: leave one out or add label=NAME")
    return tuple(methods)


def build_composer(name: str, settings: Mapping[str, Any], router: str | Path | None) -> Composer:
    """A composer from its name, its settings and the folder of what it has learned.

    Raises:
        ValueError: a setting it does not have, or a router that is missing, another's, or of no use.
    """
    learned = None if router is None else load_router(router)
    plain = get_composer(name, learned)
    if not settings:
        return plain
    known: list[str] = [f.name for f in fields(plain) if f.name != "router"] if is_dataclass(plain) else []
    _check_keys(settings, known, name)
    made: Composer = replace(plain, **settings)  # type: ignore[type-var]
    return made


def _baseline(kind: type[Any], given: Mapping[str, Any], line: str) -> Method:
    _check_keys(given, [f.name for f in fields(kind) if f.init], line)
    if kind is OneAdapter and "path" not in given:
        raise ValueError(f"{line!r}: say which, path=FOLDER")
    files = {key: Path(str(given[key])) for key in FILES if key in given}
    label = str(given.get("label", _label(shlex.split(line))))
    if kind in (Base, Oracle) and label != kind().label:
        raise ValueError(
            f"{line!r}: {kind().label!r} keeps its name, for scores are normalised by it; leave label= out"
        )
    method: Method = kind(**{**given, **files, "label": label})
    return method


def _label(words: Sequence[str]) -> str:
    """The words that mean the same on every machine."""
    return " ".join(word for word in words if not word.startswith(("router=", "path=", "weights=")))


def _pairs(line: str, words: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key or key in values:
            raise ValueError(f"{line!r}: expected key=value, each key once, got {word!r}")
        values[key] = _value(text)
    return values


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_keys(given: Mapping[str, Any], known: Sequence[str], line: str, hint: str = "") -> None:
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{line!r} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}{hint}")
