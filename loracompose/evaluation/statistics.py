"""What scores show: means over tasks, paired bootstrap intervals, and how methods compare.

A method's score is the mean over tasks of the mean over the task's rows, so tasks count alike however many rows they
have. Rows are resampled within each task, the same rows for all methods (paired). Of n rows n - 1 are drawn, so that
the variance of the resampled mean is the unbiased estimate s² / n however few rows there are (Rao and Wu, 1988);
drawing n would make intervals of 5 rows a tenth too narrow. A task of one row says nothing about its spread: then
there is no interval, its ends are nan. A method that is not defined for some tasks (the oracle of a task without
adapter) is compared on the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, whose ends are nan where nothing is known about the spread."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


FEWEST = 16  # rows


@dataclass(frozen=True)
class Comparison:
    """One method against another.

    Attributes:
        difference: of their scores, with its paired interval.
        won: tasks on which the first has the higher score.
        lost: tasks on which it has the lower.
        moved: rows on which their scores differ.
    """

    difference: Estimate
    won: int
    lost: int
    moved: int

    @property
    def claimed(self) -> Estimate:
        """The difference as evidence: without an interval where fewer than `FEWEST` rows differ.

        With few rows that differ, resamples of two or three rows a task cannot reach the tails: of two methods that are
        equally good, up to half the intervals would leave out 0.
        """
        return self.difference if self.moved >= FEWEST else Estimate(self.difference.value, np.nan, np.nan)


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of all methods on the rows of a protocol.

    Attributes:
        labels: of the methods.
        tasks: names, sorted.
        owner: which task each row belongs to, (N,).
        values: (N, M), nan where a method is not defined.
        resampled: what each row counts in the mean of its task, (samples, N).
    """

    labels: tuple[str, ...]
    tasks: tuple[str, ...]
    owner: NDArray[np.int64]
    values: Matrix
    resampled: Matrix

    @classmethod
    def of(
        cls, tasks: Sequence[str], scores: Mapping[str, Sequence[float | None]], samples: int = 2000, seed: int = 0
    ) -> Scores:
        """The scores of methods by label, one a row, with the task of each row.

        Raises:
            ValueError: no rows, or a method with another number of scores.
        """
        names = tuple(sorted(set(tasks)))
        if not names:
            raise ValueError("there are no rows to summarise")
        for label, own in scores.items():
            if len(own) != len(tasks):
                raise ValueError(f"method {label!r} has {len(own)} scores for {len(tasks)} rows")
        owner = np.array([names.index(task) for task in tasks])
        columns = [[np.nan if score is None else score for score in own] for own in scores.values()]
        values = np.array(columns, dtype=np.float64).reshape(len(columns), len(tasks)).T
        return cls(tuple(scores), names, owner, values, resample(owner, samples, seed))

    def by_task(self) -> Matrix:
        """The mean score of each method on each task, (T, M); nan where it is not defined on all of its rows."""
        return np.stack([self.values[self.owner == t].mean(axis=0) for t in range(len(self.tasks))])

    def score(self, label: str) -> Estimate:
        """The mean over the tasks on which a method is defined."""
        column = self._column(label)
        return self._mean(column, self._defined(column))

    def difference(self, label: str, other: str) -> Comparison:
        """A method against another, on the tasks on which both are defined."""
        first, second = self._column(label), self._column(other)
        defined = self._defined(first) & self._defined(second)
        gap = self.by_task()[:, self.labels.index(label)] - self.by_task()[:, self.labels.index(other)]
        gap = gap[defined]
        moved = int((first != second)[defined[self.owner]].sum())
        return Comparison(self._mean(first - second, defined), int((gap > 0).sum()), int((gap < 0).sum()), moved)

    def normalised(self, label: str, base: str = "base", oracle: str = "oracle") -> Estimate | None:
        """100 (score - base) / (oracle - base), on the tasks on which all three are defined.

        Numerator and denominator are means over tasks, so a task on which the oracle gains nothing does no harm.
        None if the oracle is not above the base, here or in some resample.
        """
        own, low, high = self._column(label), self._column(base), self._column(oracle)
        defined = self._defined(own) & self._defined(low) & self._defined(high)
        if not defined.any():
            return None
        top, bottom = self._means(own - low, defined), self._means(high - low, defined)
        if (bottom <= 0).any():
            return None
        return _estimate(100 * top / bottom)

    def _column(self, label: str) -> Matrix:
        if label not in self.labels:
            raise LookupError(f"no method {label!r}; there are {', '.join(self.labels)}")
        return self.values[:, self.labels.index(label)]

    def _defined(self, column: Matrix) -> NDArray[np.bool_]:
        """Tasks all of whose rows have a score, (T,)."""
        return np.array([not np.isnan(column[self.owner == t]).any() for t in range(len(self.tasks))])

    def _means(self, column: Matrix, defined: NDArray[np.bool_]) -> Matrix:
        """The mean over tasks of the rows as they are, then of each resample, (1 + samples,)."""
        rows = defined[self.owner]
        each = 1.0 / np.bincount(self.owner, minlength=len(self.tasks))[self.owner[rows]]
        plain = [each @ column[rows]]
        means: Matrix = np.concatenate([plain, self.resampled[:, rows] @ column[rows]]) / defined.sum()
        return means

    def _mean(self, column: Matrix, defined: NDArray[np.bool_]) -> Estimate:
        return _estimate(self._means(column, defined)) if defined.any() else Estimate(np.nan, np.nan, np.nan)


def resample(owner: NDArray[np.int64], samples: int, seed: int) -> Matrix:
    """What each row counts in the task's mean of each resample, (samples, N): n - 1 draws of the n rows of its task.

    Args:
        owner: task of each row, (N,), from 0 without holes.
        samples: number of resamples.
        seed: of the draws; those of a task depend on its place and its number of rows alone.

    Returns:
        Rows of weights that sum to the number of tasks; nan for the only row of a task.
    """
    drawn = np.full((samples, len(owner)), np.nan)
    for task in range(int(owner.max()) + 1):
        rows = np.flatnonzero(owner == task)
        n = len(rows)
        if n > 1:
            chance = np.random.default_rng([seed, task])
            drawn[:, rows] = chance.multinomial(n - 1, np.full(n, 1 / n), size=samples) / (n - 1)
    return drawn


def _estimate(values: Matrix) -> Estimate:
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return Estimate(float(values[0]), float(low), float(high))
