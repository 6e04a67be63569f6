"""Router: what a gated composer has learned, as a value and as a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loracompose.adapters.folder import write_folder

FORMAT = 1
TENSORS_FILE, SETTINGS_FILE = "router.safetensors", "router.json"


@dataclass(frozen=True, order=True)
class RouterAdapter:
    """An adapter that a router was trained for: its content decides, its name is for messages."""

    fingerprint: str
    name: str


@dataclass(frozen=True, eq=False, repr=False)
class Router:
    """The learned tensors of a composer and all that says where they may be used.

    Its repr has the method and the fingerprint, not the tensors: the repr of a composer is an experiment record.

    Attributes:
        method: key in COMPOSERS.
        settings: hyper-parameters that the tensors were trained under; plain JSON.
        tensors: name -> tensor; names say the module or layer they belong to.
        base_model: name of the base model it was trained on.
        adapters: the adapters it was trained for, in the order that its tensors count them; None if it serves any.
        training: record of how it came about (data, seed, steps, losses, versions); no part of its identity.
    """

    method: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    base_model: str
    adapters: tuple[RouterAdapter, ...] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Router({self.method!r}, {self.fingerprint[:12]})"

    @property
    def fingerprint(self) -> str:
        """sha256 over the method, the settings, the adapters and the content of the tensors."""
        digest = hashlib.sha256()
        serves = None if self.adapters is None else [adapter.fingerprint for adapter in self.adapters]
        digest.update(json.dumps([self.method, self.settings, serves], sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def columns(self, fingerprints: Sequence[str]) -> list[int]:
        """Where the router counts each of these adapters.

        Raises:
            LookupError: it was not trained for one of them.
        """
        if self.adapters is None:
            raise LookupError(f"the {self.method} router serves any adapter and counts none")
        places = {adapter.fingerprint: place for place, adapter in enumerate(self.adapters)}
        for fingerprint in fingerprints:
            if fingerprint not in places:
                raise self._stranger(f"the adapter of fingerprint {fingerprint[:12]}")
        return [places[fingerprint] for fingerprint in fingerprints]

    def check_serves(self, adapters: Mapping[str, str]) -> None:
        """Refuse adapters, given as fingerprint -> name, that the router was not trained for.

        Raises:
            LookupError: one of them, by its name.
        """
        if self.adapters is None:
            return
        known = {adapter.fingerprint for adapter in self.adapters}
        for fingerprint, name in adapters.items():
            if fingerprint not in known:
                raise self._stranger(f"the adapter {name!r} (fingerprint {fingerprint[:12]})")

    def _stranger(self, who: str) -> LookupError:
        names = ", ".join(adapter.name for adapter in self.adapters or ())
        return LookupError(
            f"the {self.method} router was not trained for {who}; it knows {names}. Train it again with this adapter, "
            "or exclude the adapter"
        )

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor of that name.

        Raises:
            LookupError: the router has none.
            ValueError: it has another shape.
        """
        if name not in self.tensors:
            raise LookupError(
                f"the {self.method} router has no tensor {name!r}; it was trained on {self.base_model} and adapters "
                "of other modules"
            )
        found = self.tensors[name]
        if tuple(found.shape) != tuple(shape):
            raise ValueError(
                f"the {self.method} router: {name!r} has shape {tuple(found.shape)}, expected {tuple(shape)}; it was "
                f"trained on {self.base_model} with other adapters"
            )
        return found


def save_router(router: Router, folder: str | Path) -> None:
    """Write a router as a folder, whole or not at all.

    Raises:
        FileExistsError: the folder is there already.
    """
    target = Path(folder)
    if target.exists():
        raise FileExistsError(f"{target} exists already; delete it or choose another folder")

    def fill(fresh: Path) -> None:
        save_file({name: t.detach().cpu().contiguous() for name, t in router.tensors.items()}, fresh / TENSORS_FILE)
        (fresh / SETTINGS_FILE).write_text(json.dumps(_record(router), indent=1) + "\n", encoding="utf-8")

    write_folder(target, fill, overwrite=False)


def load_router(folder: str | Path) -> Router:
    """Read the folder that `save_router` wrote.

    Raises:
        FileNotFoundError: there is no router.
        ValueError: a file is damaged, of a newer format, or the tensors are not those of the record.
    """
    home = Path(folder)
    for file in (SETTINGS_FILE, TENSORS_FILE):
        if not (home / file).is_file():
            raise FileNotFoundError(
                f"no router in {home}: {file} is missing; train one with `loracompose train router`"
            )
    try:
        record = json.loads((home / SETTINGS_FILE).read_text(encoding="utf-8"))
        tensors = load_file(home / TENSORS_FILE)
        found = record["format"]
        if found != FORMAT:
            raise ValueError(f"{home}: router format {found}, this loracompose reads {FORMAT}; train it again")
        router = _router(record, tensors)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{home} holds no readable router ({error!r}); train it again") from error
    if router.fingerprint != record["fingerprint"]:
        raise ValueError(f"{home}: {TENSORS_FILE} and {SETTINGS_FILE} do not belong together; train the router again")
    return router


def _record(router: Router) -> dict[str, Any]:
    adapters = router.adapters
    return {
        "format": FORMAT,
        "method": router.method,
        "settings": dict(router.settings),
        "base_model": router.base_model,
        "adapters": None if adapters is None else [{"fingerprint": a.fingerprint, "name": a.name} for a in adapters],
        "fingerprint": router.fingerprint,
        "training": dict(router.training),
    }


def _router(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Router:
    adapters = record["adapters"]
    return Router(
        record["method"],
        record["settings"],
        tensors,
        record["base_model"],
        None if adapters is None else tuple(RouterAdapter(a["fingerprint"], a["name"]) for a in adapters),
        record["training"],
    )
