"""The picture of a sensitivity study: one panel a study and protocol, one colour a method, bars for intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loracompose.evaluation.figures import figure
from loracompose.evaluation.sensitivity import Curve, Study

# Okabe and Ito's palette with markers of its own for each, so that grey prints can be read.
LOOKS: tuple[tuple[str, str], ...] = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#E69F00", "P"),
)


def sensitivity(curves: Sequence[Curve], studies: Sequence[Study]) -> str:
    """A row of two panels for each study: left in-domain, right masked; the same scale in all.

    Args:
        curves: measured.
        studies: in the order of the rows; those without a curve are left out.
    """
    shown = [study for study in studies if any(curve.study == study.name for curve in curves)]
    columns = list(dict.fromkeys(name for study in shown for name in study.protocols))
    with figure(4.6 * len(columns) + 1.9, 2.35 * len(shown) + 0.4) as (plt, save):
        panels = plt.gcf().subplots(len(shown), len(columns), squeeze=False, sharey="row")
        for row, study in zip(panels, shown, strict=True):
            for axes, protocol in zip(row, columns, strict=True):
                own = [c for c in curves if (c.study, c.protocol) == (study.name, protocol)]
                _panel(axes, study, own)
                if study is shown[0]:
                    axes.set_title(protocol, fontsize=11, loc="left")
            row[0].set_ylabel("score")
            handles, labels = row[0].get_legend_handles_labels()
            row[-1].legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
        return save()


def _panel(axes: Any, study: Study, own: Sequence[Curve]) -> None:
    numbers = all(isinstance(x, int | float) for x in study.points)
    for place, (curve, (colour, marker)) in enumerate(zip(own, LOOKS, strict=False)):
        found = curve.estimates()
        shift = 0.0 if numbers else 0.09 * (place - (len(own) - 1) / 2)
        x = [float(p) if numbers else i + shift for i, p in enumerate(curve.points)]
        y = [estimate.value for estimate in found]
        spread = [[e.value - e.low for e in found], [e.high - e.value for e in found]]
        line = "-" if numbers else "none"
        axes.errorbar(
            x, y, yerr=spread, color=colour, marker=marker, markersize=5, linestyle=line, linewidth=1.4, elinewidth=0.7
        )
        axes.plot([], [], color=colour, marker=marker, linestyle=line, label=curve.label)
    if study.logarithmic:
        axes.set_xscale("log", base=2)
    ticks = [float(p) for p in study.points] if numbers else list(range(len(study.points)))
    axes.set_xticks(ticks, [f"{p:g}" if isinstance(p, int | float) else p for p in study.points])
    axes.minorticks_off()
    axes.set_xlabel(study.axis, fontsize=9.5)
    axes.set_ylim(bottom=0.0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
