"""Sensitivity: one setting moves along an axis, all else stays, on the same rows.

A study asks lines of the leaderboard's grammar at every point of its axis; a point may also name another pool.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loracompose.durable import write_whole
from loracompose.evaluation.results import Results, to_json
from loracompose.evaluation.statistics import Comparison, Estimate, Scores

FORMAT = 1
WHOLE_POOL = "whole"


@dataclass(frozen=True)
class Study:
    """What is moved, and what is asked at each point.

    Attributes:
        name: of the study.
        axis: what moves, for the figure.
        points: values along the axis.
        lines: label of a curve -> line of a method with `{x}` where the value goes.
        pools: which pool each point asks; a pool for all points if there is one.
        protocols: names of protocols.
        logarithmic: whether the axis is.
    """

    name: str
    axis: str
    points: tuple[float | str, ...]
    lines: Mapping[str, str]
    pools: tuple[str, ...] = (WHOLE_POOL,)
    protocols: tuple[str, ...] = ("in-domain", "masked")
    logarithmic: bool = False

    def __post_init__(self) -> None:
        if len(self.pools) not in (1, len(self.points)):
            raise ValueError(f"study {self.name!r} has {len(self.points)} points and {len(self.pools)} pools")

    def asked(self, pool: str) -> dict[str, str]:
        """Label in the results -> line, of all points that ask a pool."""
        return {
            f"{label} @ {x}": f"{line.format(x=x)} label='{label} @ {x}'"
            for label, line in self.lines.items()
            for x, name in zip(self.points, self._pool_of_points, strict=True)
            if name == pool
        }

    @property
    def _pool_of_points(self) -> tuple[str, ...]:
        return self.pools if len(self.pools) == len(self.points) else self.pools * len(self.points)


STUDIES: tuple[Study, ...] = (
    Study(
        "k",
        "adapters retrieved, k",
        (1, 2, 3, 4, 5, 6, 8, 10),
        {"mixture": "mixture k={x}", "equal weights": "mixture weighting=uniform k={x}", "lego": "lego k={x}"},
    ),
    Study(
        "budget",
        "ranks that LEGO keeps",
        (2, 4, 8, 16, 32),
        {"lego": "lego weighting=uniform set.k={x}"},
        logarithmic=True,
    ),
    Study(
        "active",
        "ranks active per token",
        (1, 2, 4, 8, 16, 32),
        {"rank gating": "rank_gating set.m={x}", "equal weights": "rank_gating weighting=uniform set.m={x}"},
        logarithmic=True,
    ),
    Study(
        "temperature",
        "temperature of the posterior's logits",
        (0.25, 1.0, 2.0, 4.0, 8.0, 16.0),
        {"mixture": "mixture weighting=softmax temperature={x}"},
        logarithmic=True,
    ),
    Study(
        "pool",
        "adapters in the pool",
        (5, 10, 15, 21),
        {
            "selection": "selection",
            "mixture": "mixture",
            "equal weights": "mixture weighting=uniform",
            "all, equally": "uniform_all",
        },
        pools=("5", "10", "15", WHOLE_POOL),
    ),
    Study(
        "seeds",
        "seeds of the adapters",
        ("one", "own"),
        {
            "mixture": "mixture weighting=uniform",
            "fusion": "fusion weighting=uniform",
            "linear": "linear weighting=uniform",
            "lego": "lego weighting=uniform",
        },
        pools=(WHOLE_POOL, "reseeded"),
    ),
    Study(
        "ranks",
        "ranks of the adapters",
        ("4 to 16", "the same, by SVD", "4 each"),
        {
            "selection": "selection",
            "mixture": "mixture weighting=uniform",
            "fusion": "fusion weighting=uniform",
            "linear": "linear weighting=uniform",
            "lego": "lego weighting=uniform",
            "rank gating": "rank_gating weighting=uniform",
        },
        pools=(WHOLE_POOL, "turned", "equal"),
    ),
    Study(
        "harm",
        "one harmful adapter in the pool",
        ("none", "random x10", "shuffled labels"),
        {
            "selection": "selection",
            "mixture": "mixture",
            "equal weights": "mixture weighting=uniform",
            "all, equally": "uniform_all",
            "lego": "lego weighting=uniform",
            "rank gating": "rank_gating weighting=uniform",
        },
        pools=(WHOLE_POOL, "random", "shuffled"),
    ),
)


@dataclass(frozen=True)
class Curve:
    """Scores of one line of a study under one protocol, on the same rows at every point.

    Attributes:
        study: its name.
        protocol: its name.
        label: of the line.
        points: values along the axis.
        tasks: of each row.
        scores: of each row at each point.
    """

    study: str
    protocol: str
    label: str
    points: tuple[float | str, ...]
    tasks: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]

    def estimates(self) -> list[Estimate]:
        """Mean over tasks at each point, with its interval."""
        scores = self._scores()
        return [scores.score(str(x)) for x in self.points]

    def against(self, point: float | str, other: float | str) -> Comparison:
        """One point against another, paired by row."""
        return self._scores().difference(str(point), str(other))

    def _scores(self) -> Scores:
        return Scores.of(self.tasks, {str(x): own for x, own in zip(self.points, self.scores, strict=True)})


def curves(study: Study, by_pool: Mapping[str, Results]) -> list[Curve]:
    """The curves of a study from the results of each pool it asks.

    Raises:
        ValueError: pools were asked different rows.
    """
    found: list[Curve] = []
    for name in study.protocols:
        rounds = {pool: next(p for p in results.protocols if p.name == name) for pool, results in by_pool.items()}
        rows = {tuple(row.id for row in protocol.rows) for protocol in rounds.values()}
        if len(rows) != 1:
            raise ValueError(f"study {study.name!r}: its pools were asked different rows under {name!r}")
        tasks = tuple(row.task for row in next(iter(rounds.values())).rows)
        scores = {method.label: method.scores for protocol in rounds.values() for method in protocol.methods}
        for label in study.lines:
            own = tuple(tuple(_defined(s, label) for s in scores[f"{label} @ {x}"]) for x in study.points)
            found.append(Curve(study.name, name, label, study.points, tasks, own))
    return found


def _defined(score: float | None, label: str) -> float:
    if score is None:
        raise ValueError(f"{label!r} is not defined on every row; a study needs methods that are")
    return float(score)


def write_curves(found: Iterable[Curve], file: str | Path, settings: Mapping[str, Any]) -> None:
    """Write curves with the settings they were measured at, whole or not at all."""
    content = {"format": FORMAT, "settings": dict(settings), "curves": [asdict(curve) for curve in found]}
    write_whole(Path(file), to_json(content))


def read_curves(file: str | Path) -> tuple[dict[str, Any], list[Curve]]:
    """Settings and curves of a file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"{file}: format {content['format']}, this loracompose reads {FORMAT}; run it again")
        return content["settings"], [_curve(curve) for curve in content["curves"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no curves ({error!r}); run it again") from error


def study_of(name: str, studies: Sequence[Study] = STUDIES) -> Study:
    """The study of a name.

    Raises:
        LookupError: there is none.
    """
    for study in studies:
        if study.name == name:
            return study
    raise LookupError(f"there is no study {name!r}; there are {', '.join(study.name for study in studies)}")


def _curve(found: Mapping[str, Any]) -> Curve:
    scores = tuple(tuple(own) for own in found["scores"])
    return Curve(
        found["study"], found["protocol"], found["label"], tuple(found["points"]), tuple(found["tasks"]), scores
    )
