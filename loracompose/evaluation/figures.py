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
LONGEST_GAP = 7  # points between a point and a number without a line
ROUND = 12  # places around a point that are tried at one distance
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
            _hits_and_misses(axes, lines, *_found(summary))
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


def _found(summary: Summary) -> tuple[int, int]:
    """How many rows found their own adapter first, and how many another."""
    rows = len(summary.scores.values)
    first = round(summary.found_first * rows / 100)
    return first, rows - first


def _hits_and_misses(axes: Any, lines: Sequence[Line], hits: int, misses: int) -> None:
    """Small triangles at the mean over rows whose own adapter was found first (up) and over the others (down)."""
    for kind, marker, colour, meaning in (
        ("hit", "^", GREEN, f"own adapter found first ({hits} rows)"),
        ("miss", "v", ORANGE, f"another found first ({misses} rows)"),
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
    """Score against milliseconds a prompt of the methods that were timed; the area of a point is what they add.

    Points have the methods' places in the leaderboard, for names would cover them; a key says which is which.
    """
    timed = [(place, line) for place, line in enumerate(summary.lines, 1) if line.ms is not None]
    with figure(9.5, max(5.0, 0.165 * len(timed) + 0.8)) as (plt, save):
        axes, key = plt.gcf().subplots(1, 2, width_ratios=(3.2, 1))
        most = max(1, *(line.added_bytes for _, line in timed))
        areas = [25 + 275 * line.added_bytes / most for _, line in timed]
        for (_, line), area in zip(timed, areas, strict=True):
            colour = GREY if line.label in REFERENCES else BLUE
            axes.scatter(
                max(line.ms or 0.0, LEAST_MS), line.score.value, s=area, color=colour, alpha=0.7, edgecolors="white"
            )
        axes.set_xscale("log")
        ticker = plt.matplotlib.ticker
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.margins(x=0.08, y=0.08)
        axes.set_xlabel(f"milliseconds a prompt (area: bytes added, the largest {most / 1e6:.1f} MB)")
        axes.set_ylabel("mean score over tasks")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        _key(key, timed)
        _number_points(plt, axes, timed, areas)
        return save()


def _key(axes: Any, lines: Sequence[tuple[int, Line]]) -> None:
    """Which number is which method."""
    axes.set_axis_off()
    for row, (place, line) in enumerate(lines):
        y = 1 - (row + 0.5) / len(lines)
        axes.text(0.08, y, place, transform=axes.transAxes, ha="right", va="center", fontsize=8, weight="bold")
        axes.text(0.12, y, line.label, transform=axes.transAxes, ha="left", va="center", fontsize=8)


def _number_points(plt: Any, axes: Any, lines: Sequence[tuple[int, Line]], areas: Sequence[float]) -> None:
    """Numbers beside their points, around them and then further off with a thin line where others lie."""
    plt.gcf().canvas.draw()  # only now are places on the page known
    points = [(max(line.ms or 0.0, LEAST_MS), line.score.value) for _, line in lines]
    pixels = plt.gcf().dpi / 72
    radii = [pixels * math.sqrt(area / math.pi) for area in areas]
    bounds = plt.matplotlib.transforms.Bbox.from_bounds
    places = axes.transData.transform(points)
    taken = [bounds(x - r, y - r, 2 * r, 2 * r) for (x, y), r in zip(places, radii, strict=True)]
    for (number, _), point, radius in zip(lines, points, radii, strict=True):
        nearest = radius / pixels + 5
        for step in range(16 * ROUND):
            away, turn = nearest + 4 * (step // ROUND), 2 * math.pi * (step % ROUND) / ROUND
            place = {"xy": point, "xytext": (away * math.cos(turn), away * math.sin(turn))}
            style = {"textcoords": "offset points", "fontsize": 8, "ha": "center", "va": "center"}
            name = axes.annotate(str(number), **place, **style)
            box = name.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            name.remove()
        taken.append(box)
        if away > nearest + LONGEST_GAP:
            name.remove()
            arrow = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
            axes.annotate(str(number), arrowprops=arrow, **place, **style)


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
