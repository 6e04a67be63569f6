"""The report's figures, drawn by matplotlib; colours can be told apart by colour-blind readers and in grey."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from loracompose.evaluation.results import ProtocolResult
from loracompose.evaluation.summary import Line, Summary

# Okabe and Ito's palette.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
REFERENCES = ("base", "oracle")
LONGEST_GAP = 9  # points between a point and a name without a line
LEAST_MS = 0.1  # a logarithmic axis has no 0
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "loracompose",  # the same figure is the same file
    "figure.constrained_layout.use": True,
}


def leaderboard(summary: Summary) -> str:
    """Scores with intervals, best on top; dashed lines are the base and the own adapter.

    Where retrieval was right for some rows and wrong for others, triangles show the mean over each kind: what is lost
    by retrieval is the way between them, what is lost by composition the way from the upper one to the oracle's.
    """
    lines = list(reversed(summary.lines))
    told_apart = any(line.hit is not None for line in lines) and any(line.miss is not None for line in lines)
    with figure(8.5, 0.3 * len(lines) + 1.2) as (plt, save):
        axes = plt.gca()
        if told_apart:
            _hits_and_misses(axes, lines)
        for y, line in enumerate(lines):
            colour = GREY if line.label in REFERENCES else BLUE
            score = line.score
            axes.plot([score.low, score.high], [y, y], color=colour, linewidth=2.5, solid_capstyle="butt", alpha=0.55)
            axes.plot(score.value, y, "o", color=colour, markersize=6)
            place = {"xycoords": axes.get_yaxis_transform(), "va": "center", "ha": "right"}
            axes.annotate(f"{score.value:.1f}", (1.07, y), **place)
            if line.label in REFERENCES:
                axes.axvline(score.value, color=GREY, linestyle="--", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(lines)), [line.label for line in lines])
        axes.set_xlabel("mean score over tasks, with 95 % interval")
        axes.margins(x=0.03)
        axes.set_xlim(left=0.0)
        axes.set_ylim(-0.7, len(lines) - 0.3)
        if told_apart:
            axes.legend(loc="lower right", fontsize=9, framealpha=0.9)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        return save()


def _hits_and_misses(axes: Any, lines: Sequence[Line]) -> None:
    """Small triangles at the mean over rows whose own adapter was found first (up) and over the others (down)."""
    for kind, marker, colour, meaning in (
        ("hit", "^", GREEN, "own adapter found first"),
        ("miss", "v", ORANGE, "another found first"),
    ):
        found = [(getattr(line, kind), y) for y, line in enumerate(lines) if getattr(line, kind) is not None]
        x, y = zip(*found, strict=True)
        axes.plot(x, y, marker, color=colour, markersize=4.5, markerfacecolor="white", linestyle="none", label=meaning)


def task_heat_map(summary: Summary) -> str:
    """Scores of every method on every task."""
    labels = [line.label for line in summary.lines]
    columns = [summary.scores.labels.index(label) for label in labels]
    values = summary.scores.by_task()[:, columns].T  # (M, T)
    with figure(0.42 * values.shape[1] + 3.6, 0.34 * len(labels) + 2.1) as (plt, save):
        _matrix(
            plt, values, labels, summary.scores.tasks, "score", "cividis", (0.0, 100.0), lambda at: f"{values[at]:.0f}"
        )
        return save()


def wins(summary: Summary) -> str:
    """Difference of every method (row) to every other (column), and on how many tasks it is ahead and behind.

    Bold where the interval leaves out 0 and at least 16 rows differ.
    """
    labels = [line.label for line in summary.lines]
    values = np.full((len(labels), len(labels)), np.nan)
    sure = np.zeros(values.shape, dtype=bool)
    texts: dict[tuple[int, int], str] = {}
    for (first, second), comparison in summary.comparisons().items():
        at = labels.index(first), labels.index(second)
        values[at] = comparison.difference.value
        sure[at] = comparison.claimed.excludes_zero
        texts[at] = f"{comparison.difference.value:+.0f}\n{comparison.won}:{comparison.lost}"
    size = 0.5 * len(labels) + 2.8
    reach = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    with figure(size + 1.0, size) as (plt, save):
        # orange to white to blue: told apart with any colour vision
        scale = plt.matplotlib.colors.LinearSegmentedColormap.from_list("difference", [ORANGE, "white", BLUE])
        _matrix(plt, values, labels, labels, "row minus column", scale, (-reach, reach), texts.__getitem__, sure)
        return save()


def confusion(found: ProtocolResult) -> str:
    """Which adapter was found first (columns) for the rows of each task (rows), in percent of the task's rows."""
    tasks = sorted({row.task for row in found.rows})
    names = sorted({name for name in found.top if name} | set(tasks))
    counts = np.zeros((len(tasks), len(names)))
    for row, name in zip(found.rows, found.top, strict=True):
        if name is not None:
            counts[tasks.index(row.task), names.index(name)] += 1
    per_task = np.array([sum(row.task == task for row in found.rows) for task in tasks])
    values = 100 * counts / per_task[:, None]
    values[values == 0] = np.nan
    with figure(0.42 * len(names) + 3.4, 0.34 * len(tasks) + 2.2) as (plt, save):
        _matrix(
            plt, values, tasks, names, "% of the task's rows", "cividis", (0.0, 100.0), lambda at: f"{values[at]:.0f}"
        )
        axes = plt.gcf().axes[0]
        axes.set_xlabel("adapter found first")
        axes.set_ylabel("task of the row")
        return save()


def quality_and_cost(summary: Summary) -> str:
    """Score against milliseconds a prompt of the methods that were timed; the area of a point is what they add."""
    timed = sorted((x for x in summary.lines if x.ms is not None), key=lambda line: line.score.value)
    with figure(8.5, 5.0) as (plt, save):
        axes = plt.gca()
        most = max(1, *(line.added_bytes for line in timed))
        areas = [25 + 275 * line.added_bytes / most for line in timed]
        for line, area in zip(timed, areas, strict=True):
            colour = GREY if line.label in REFERENCES else BLUE
            axes.scatter(
                max(line.ms or 0.0, LEAST_MS), line.score.value, s=area, color=colour, alpha=0.7, edgecolors="white"
            )
        axes.set_xscale("log")
        for axis_format in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis_format(plt.matplotlib.ticker.LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        axes.margins(x=0.18, y=0.1)
        _name_points(plt, axes, timed, areas)
        axes.set_xlabel(f"milliseconds a prompt (area: bytes added, the largest {most / 1e6:.1f} MB)")
        axes.set_ylabel("mean score over tasks")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        return save()


def _name_points(plt: Any, axes: Any, lines: Sequence[Line], areas: Sequence[float]) -> None:
    """Names beside their points, left of those near the right edge; moved up with a thin line where others lie."""
    plt.gcf().canvas.draw()  # only now are places on the page known
    points = [(max(line.ms or 0.0, LEAST_MS), line.score.value) for line in lines]
    pixels = plt.gcf().dpi / 72
    radii = [pixels * math.sqrt(area / math.pi) for area in areas]
    bounds = plt.matplotlib.transforms.Bbox.from_bounds
    places = axes.transData.transform(points)
    taken = [bounds(x - r, y - r, 2 * r, 2 * r) for (x, y), r in zip(places, radii, strict=True)]
    edge = axes.get_window_extent().x1
    for line, point, radius in zip(lines, points, radii, strict=True):
        gap = radius / pixels + 4
        for step in range(100):
            lift, right = 3 * (step // 2), step % 2 == 0
            place = {
                "xy": point,
                "xytext": (gap if right else -gap, lift),
                "textcoords": "offset points",
                "fontsize": 9,
            }
            name = axes.annotate(line.label, ha="left" if right else "right", va="center", **place)
            box = name.get_window_extent()
            if box.x1 < edge and not any(box.overlaps(other) for other in taken):
                break
            name.remove()
        taken.append(box)
        if lift > LONGEST_GAP:
            name.remove()
            arrow = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.6}
            axes.annotate(line.label, ha="left" if right else "right", va="center", arrowprops=arrow, **place)


def _matrix(
    plt: Any,
    values: np.ndarray[Any, Any],
    rows: Any,
    columns: Any,
    meaning: str,
    colours: Any,
    limits: tuple[float, float],
    text: Callable[[tuple[int, int]], str],
    bold: np.ndarray[Any, Any] | None = None,
) -> None:
    """A heat map with its numbers written in."""
    axes = plt.gca()
    image = axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=55, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for at, value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            weight = "bold" if bold is not None and bold[at] else "normal"
            axes.text(at[1], at[0], text(at), ha="center", va="center", fontsize=7.5, color=ink, weight=weight)
    plt.colorbar(image, ax=axes, label=meaning, fraction=0.03, pad=0.02)


@contextmanager
def figure(width: float, height: float) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A figure of so many inches, and a function that gives it as SVG."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a report needs the package matplotlib: pip install 'loracompose[eval]'") from error
    mpl.use("svg")
    from matplotlib import pyplot as plt

    with mpl.rc_context(STYLE):
        figure = plt.figure(figsize=(width, height))

        def save() -> str:
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata={"Date": None})
            return out.getvalue()

        try:
            yield plt, save
        finally:
            plt.close(figure)
