"""Protocols: which rows are asked, and which adapters a method must do without."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from loracompose.evaluation.tasks import TaskRow, draw

Hidden = Literal["nothing", "own", "cluster"]


@dataclass(frozen=True)
class Protocol:
    """A way to ask.

    Attributes:
        name: key in PROTOCOLS.
        question: what it answers.
        hidden: the adapters that each row must do without: none; the one of its own task (LoraRetriever's
            out-of-domain); those of all tasks of its cluster.
        unseen: only rows of the phrasing that no adapter saw.
        shuffled: rows answered as they come, all tasks mixed, instead of those of like length together.
    """

    name: str
    question: str
    hidden: Hidden = "nothing"
    unseen: bool = False
    shuffled: bool = False

    def rows(
        self, rows: Sequence[TaskRow], n: int | None, seed: int, unseen_template: int | None
    ) -> tuple[TaskRow, ...]:
        """At most n rows a task, drawn evenly over phrasings, in the order they are asked.

        Raises:
            ValueError: no row is of the unseen phrasing.
        """
        asked = rows
        if self.unseen:
            asked = [row for row in rows if row.template is not None and row.template == unseen_template]
            if not asked:
                raise ValueError(f"protocol {self.name!r} needs rows of template {unseen_template!r}; there are none")
        drawn = list(draw(asked, n, seed))
        if self.shuffled:
            random.Random(seed).shuffle(drawn)
        return tuple(drawn)

    def excluded(
        self, rows: Sequence[TaskRow], clusters: Mapping[str, str], names: Collection[str]
    ) -> list[frozenset[str]]:
        """The adapters that each row must do without.

        Args:
            rows: the rows asked.
            clusters: the cluster of every task; an adapter belongs to the cluster of the task of its name.
            names: the adapters of the pool.
        """
        if self.hidden == "nothing":
            return [frozenset() for _ in rows]
        if self.hidden == "own":
            return [frozenset({row.task} & set(names)) for row in rows]
        return [frozenset(name for name in names if clusters.get(name) == row.cluster) for row in rows]


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol("in-domain", "the whole pool"),
            Protocol("masked", "the row's own adapter is removed", hidden="own"),
            Protocol("cluster-masked", "all adapters of the row's cluster are removed", hidden="cluster"),
            Protocol("unseen", "the whole pool, phrasings that no adapter saw", unseen=True),
            Protocol("mixed", "the whole pool, prompts of all tasks in the order in which they come", shuffled=True),
        )
    }
)


def get_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        LookupError: there is none.
    """
    if name not in PROTOCOLS:
        raise LookupError(f"no protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
