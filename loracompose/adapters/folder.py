"""The files of an adapter folder: found, read within limits, and written so that a crash leaves none half made."""

from __future__ import annotations

import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECIPE = "recipe.json"
PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
MAX_JSON_BYTES = 16_000_000


def open_regular(path: Path) -> BufferedReader:
    """An open binary file, which must be a regular one: a pipe or a device would block or never end.

    Raises:
        LookupError: the folder has no such file.
        ValueError: it is not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LookupError(_missing(path)) from error
    file = os.fdopen(descriptor, "rb") if _is_regular(descriptor) else None
    if file is None:
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file")
    return file


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 16 MB.

    Raises:
        LookupError: the folder has no such file.
        ValueError: not a regular file, too large, not JSON, or not an object.
    """
    return parse_json_object(read_json_text(path), str(path))


def read_json_text(path: Path) -> bytes:
    """What a file of JSON holds, of at most 16 MB, not looked at.

    Raises:
        LookupError: the folder has no such file.
        ValueError: not a regular file, or too large.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{path} has {size} bytes, at most {MAX_JSON_BYTES} are read")
        return file.read(MAX_JSON_BYTES)


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`; stricter than `json.loads`: no key twice, no NaN or Infinity.

    Raises:
        ValueError: invalid UTF-8 or JSON, nested too deeply, a repeated key, or not an object.
    """

    def refuse_constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique_pairs, parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values make equal files."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def write_folder(folder: Path, fill: Callable[[Path], None], *, overwrite: bool) -> None:
    """Make `folder` in one step: `fill` writes files into a folder beside it, which is synced and renamed.

    Whoever may read the folder may read its files.
    With `overwrite` an existing adapter folder is moved aside first, and moved back if the rename fails.

    Raises:
        FileExistsError: `folder` exists and `overwrite` is false.
        ValueError: `folder` exists and is not an adapter folder, which is never deleted.
    """
    _check_target(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.new"
    fresh.mkdir()
    try:
        fill(fresh)
        allowed = stat.S_IMODE(fresh.stat().st_mode)  # safetensors writes files that only their owner can read
        for file in fresh.rglob("*"):
            file.chmod(allowed if file.is_dir() else allowed & 0o666)
            sync(file)
        sync(fresh)
        _swap(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    sync(folder.parent)


def _check_target(folder: Path, overwrite: bool) -> None:
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} exists; choose another folder, or pass overwrite=True to replace it")
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; it is not replaced, remove it first")
    if any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no {CONFIG}; a folder that is no adapter is not replaced")


def _swap(fresh: Path, folder: Path) -> None:
    """Rename `fresh` to `folder`; what stood there comes back if that fails and is deleted if it does not."""
    if not folder.exists():
        fresh.rename(folder)
        return
    old = fresh.with_suffix(".old")
    folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
    return found


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no adapter folder {path.parent}"
    there = sorted(p.name for p in path.parent.iterdir())[:20]
    return f"{path.parent.name}: no {path.name} in {path.parent}; it holds {there}"
