"""What an evaluation found: plain values that go to JSON and back, without a prompt or an answer in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loracompose.durable import write_whole

FORMAT = 1


@dataclass(frozen=True)
class RowRecord:
    """A row that was asked: identity by content, and to which task and phrasing it belongs."""

    id: str
    task: str
    cluster: str
    metric: str
    template: int | None


@dataclass(frozen=True)
class MethodResult:
    """A method on the rows of a protocol.

    Attributes:
        label: its name.
        composer: repr of the composer; "" for the base model alone.
        scores: in [0, 100], one a row; None where the method is not defined.
        ms: milliseconds a prompt at a fixed length, adapters read and sets composed before, without retrieval; None if
            it was not timed.
        added_bytes: mean bytes a prompt of the ranks that ran beside the base model, and of what the composer learned.
    """

    label: str
    composer: str
    scores: tuple[float | None, ...]
    ms: float | None
    added_bytes: int


@dataclass(frozen=True)
class ProtocolResult:
    """All methods on the rows of a protocol.

    Attributes:
        name: key in PROTOCOLS.
        rows: the rows asked.
        top: the adapter each row found first; None where none was left.
        place: at which place, from 1, each row found its own adapter; None where it did not.
        retrieval_ms: milliseconds of the search a prompt.
        methods: with their scores.
    """

    name: str
    rows: tuple[RowRecord, ...]
    top: tuple[str | None, ...]
    place: tuple[int | None, ...]
    retrieval_ms: float
    methods: tuple[MethodResult, ...]


@dataclass(frozen=True)
class Results:
    """An evaluation.

    Attributes:
        settings: what was asked for: rows a task, seeds, longest answer, batch size, base, dtype.
        pool: fingerprint of every adapter of the index.
        versions: of the packages that compute.
        protocols: what was found.
    """

    settings: Mapping[str, Any]
    pool: Mapping[str, str]
    versions: Mapping[str, str]
    protocols: tuple[ProtocolResult, ...]


def write_results(results: Results, file: str | Path, summary: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all, with a summary for readers beside the scores."""
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "summary": summary, **asdict(results)}
    write_whole(target, to_json(content))


def read_results(file: str | Path) -> Results:
    """Read what `write_results` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or of another format.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there are no results {path}; make them with `loracompose eval run`")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"{path}: format {content['format']}, this loracompose reads {FORMAT}; run it again")
        protocols = tuple(_protocol(found) for found in content["protocols"])
        return Results(content["settings"], content["pool"], content["versions"], protocols)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of an evaluation ({error!r}); run it again") from error


def to_json(content: Mapping[str, Any]) -> str:
    """JSON in which every list of plain values, such as a row or the scores of a method, is one line."""
    return _lines(content, "") + "\n"


def _lines(value: Any, indent: str) -> str:
    plain = json.dumps(value, ensure_ascii=False, allow_nan=False)
    deeper = indent + " "
    if isinstance(value, Mapping) and any(isinstance(v, Mapping | list | tuple) for v in value.values()):
        inside = [f"{deeper}{json.dumps(key)}: {_lines(v, deeper)}" for key, v in value.items()]
        return "{\n" + ",\n".join(inside) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(v, Mapping | list | tuple) for v in value):
        return "[\n" + ",\n".join(deeper + _lines(v, deeper) for v in value) + f"\n{indent}]"
    return plain


def _protocol(found: Mapping[str, Any]) -> ProtocolResult:
    return ProtocolResult(
        found["name"],
        tuple(RowRecord(**row) for row in found["rows"]),
        tuple(found["top"]),
        tuple(found["place"]),
        found["retrieval_ms"],
        tuple(MethodResult(**{**m, "scores": tuple(m["scores"])}) for m in found["methods"]),
    )
