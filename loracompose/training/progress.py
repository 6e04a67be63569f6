"""A progress bar over optimizer steps, and telling several observers of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loracompose.training.loop import Step

Observer = Callable[[Step], None]


@contextmanager
def progress_bar(name: str) -> Iterator[Observer]:
    """A bar with the losses of the last step, for the length of a block."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(name)

        def show(step: Step) -> None:
            described = f"{name}  loss {step.loss:.3f}"
            if step.dev_loss is not None:
                described += f"  dev {step.dev_loss:.3f}"
            bar.update(task, total=step.total, completed=step.number, description=described)

        yield show


def tell_all(*observers: Observer | None) -> Observer:
    """One observer that tells those given, in their order."""

    def tell(step: Step) -> None:
        for observer in observers:
            if observer is not None:
                observer(step)

    return tell
