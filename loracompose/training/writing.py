"""The folder of a trained adapter: written aside, synced, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel


def write_folder(model: PeftModel, target: Path, card: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write the trained parameters in bfloat16 as a PEFT folder, with `card.json` and `training.json`.

    The folder appears in one step when it is complete. The model's trained parameters are rounded in place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        model.save_pretrained(aside, save_embedding_layers=False)
        (aside / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in; card.json is the card
        for name, content in (("card.json", card), ("training.json", record)):
            (aside / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for written in aside.iterdir():
            written.chmod(0o644)
            with written.open("rb") as stream:
                os.fsync(stream.fileno())
        aside.chmod(0o755)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
