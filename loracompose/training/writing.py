"""The folder of a trained adapter: written aside, synced, then renamed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from loracompose.adapters.folder import write_folder as write_whole


def write_folder(model: PeftModel, target: Path, card: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write the trained parameters in bfloat16 as a PEFT folder, with `card.json` and `training.json`.

    The folder appears in one step when it is complete. The model's trained parameters are rounded in place.
    """

    def fill(fresh: Path) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        model.save_pretrained(fresh, save_embedding_layers=False)
        (fresh / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in; card.json is the card
        for name, content in (("card.json", card), ("training.json", record)):
            (fresh / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    write_whole(target, fill, overwrite=False)
