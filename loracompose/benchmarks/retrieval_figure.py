"""The figure of a measurement of retrieval: hits, calibration, and what abstaining buys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Draw a result of `retrieval.measure` into a file; its suffix says the format.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'loracompose[bench]'") from error
    style = {"svg.hashsalt": "loracompose", "svg.fonttype": "none", "font.size": 9}
    with plt.rc_context({**style, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (first, second, third) = plt.subplots(1, 3, figsize=(12.5, 4.2), width_ratios=(1.9, 1, 1))
        _hits(first, result)
        _reliability(second, result)
        _abstention(third, result)
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
        plt.close(figure)


def _hits(axes: Any, result: Mapping[str, Any]) -> None:
    rows = [
        (name, [parts["all"]["hit"][k] for k in ("1", "3", "5", "8")])
        for name, parts in result["scorings"].items()
        if name != "random"
    ]
    paper = [(name, list(row.values())) for name, row in result["paper"].items()]
    names = [name for name, _ in rows] + [name for name, _ in paper]
    for place, (_, row) in enumerate(rows):
        for k, hit, colour in zip((1, 3, 5, 8), row, _COLOURS, strict=False):
            error = [[hit["share"] - hit["low"]], [hit["high"] - hit["share"]]]
            label = f"top {k}" if place == 0 else None
            axes.errorbar(hit["share"], place, xerr=error, fmt="o", color=colour, ms=4, capsize=2, label=label)
    for place, (_, shares) in enumerate(paper, start=len(rows)):
        for share, colour in zip(shares, _COLOURS, strict=False):
            axes.plot(share, place, "D", color=colour, mfc="none", ms=5)
    axes.set_yticks(range(len(names)), [name.replace("LoraRetriever, ", "paper: ") for name in names])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("own adapter among the first k, % of prompts (95 % interval)")
    axes.set_title(f"{result['adapters']} adapters, {result['rows']['all']:,} prompts", loc="left", pad=20)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 0.985), ncols=4, frameon=False, handletextpad=0.2)


def _reliability(axes: Any, result: Mapping[str, Any]) -> None:
    axes.plot([0, 1], [0, 1], color="#999999", lw=1)
    for (part, found), colour in zip(result["scorings"]["hybrid"].items(), _COLOURS, strict=False):
        bins = found["reliability"]
        label = f"{part}, error {found['calibration_error']:.3f}"
        axes.plot([b["sure"] for b in bins], [b["right"] for b in bins], color=colour, lw=1, alpha=0.5)
        area = [2 + 150 * b["rows"] / result["rows"][part] for b in bins]  # a bin of few rows says little
        axes.scatter([b["sure"] for b in bins], [b["right"] for b in bins], s=area, color=colour, label=label)
    axes.set(xlabel="probability of the best adapter", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.set_title("calibration of the hybrid", loc="left")
    axes.legend(loc="upper left", frameon=False)


def _abstention(axes: Any, result: Mapping[str, Any]) -> None:
    for (part, found), colour in zip(result["scorings"]["hybrid"].items(), _COLOURS, strict=False):
        points = sorted((100 - entry["abstained"], entry["hit"]) for entry in found["abstention"].values())
        axes.plot([kept for kept, _ in points], [hit for _, hit in points], "o-", color=colour, ms=4, label=part)
    axes.set(xlabel="prompts that get an adapter, %", ylabel="of these, the right one first, %")
    axes.set_title("conformal abstention", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
