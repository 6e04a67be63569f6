"""A training that somebody stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Interrupted(Exception):
    """Raised instead of Ctrl-C."""


def interrupt_at(number: int) -> Callable[[Any], None]:
    """An `on_step` that stops the training after a step."""

    def on_step(step: Any) -> None:
        if step.number == number:
            raise Interrupted

    return on_step
