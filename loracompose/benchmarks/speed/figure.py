"""The figures of the measurements of speed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS, OTHERS, BASE = "#0072B2", "#999999", "#000000"  # told apart with any colour vision, and in print


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Draw a result of `measure.measure`: every way on the first case, and ours beside the others on all.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'loracompose[bench]'") from error
    with rc_context({"svg.hashsalt": "loracompose", "svg.fonttype": "none", "font.size": 9}):
        several = len(result["cases"]) > 1
        figure = Figure(figsize=(12 if several else 9, 4.8), layout="constrained")
        axes = figure.subplots(1, 2, width_ratios=(1.5, 1)) if several else [figure.subplots()]
        name, first = next(iter(result["cases"].items()))
        _ways(axes[0], name, first)
        if several:
            _cases(axes[1], result["cases"])
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _ways(axes: Any, title: str, case: Mapping[str, Any]) -> None:
    ways = {name: way for name, way in case["ways"].items() if name != "base model"}
    ordered = sorted(ways, key=lambda name: ways[name]["ratio_to_base"]["decode"]["median"])
    for place, name in enumerate(ordered):
        ratios = ways[name]["ratio_to_base"]
        colour = OURS if name.startswith("loracompose") else OTHERS
        for phase, marker, shift in (("decode", "o", -0.13), ("first_token", "s", 0.13)):
            r = ratios[phase]
            error = [[r["median"] - r["low"]], [r["high"] - r["median"]]]
            fill = colour if phase == "decode" else "white"
            axes.errorbar(r["median"], place + shift, xerr=error, fmt=marker, color=colour, mfc=fill, ms=5, capsize=2)
    axes.axvline(1, color=BASE, lw=1)
    axes.set_yticks(range(len(ordered)), [_label(name, ways[name]) for name in ordered])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks([1, 1.5, 2, 4, 8, 16, 32], ["1", "1.5", "2", "4", "8", "16", "32"], minor=False)
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(
        "time over that of the base model (filled: a decoding step, open: the first token)\n"
        "* does not compute each row's weighted sum"
    )
    axes.set_title(title, loc="left")


def _label(name: str, way: Mapping[str, Any]) -> str:
    return name if way["computes"] == "the mixture" else f"{name} *"


def _cases(axes: Any, cases: Mapping[str, Any]) -> None:
    names = list(cases)
    cat = "PEFT add_weighted_adapter(cat), then adapter_names"
    shown = (
        ("loracompose", "loracompose, k adapters a row", OURS, "o"),
        ("PEFT adapter_names, one adapter a row", "PEFT adapter_names, one adapter a row", "#E69F00", "s"),
        (cat, "PEFT cat, then adapter_names", "#009E73", "^"),
        ("LoraRetriever's einsum, mixture", "LoraRetriever's einsum", "#CC79A7", "D"),
    )
    for way, label, colour, marker in shown:
        points = [(place, cases[name]["ways"][way]) for place, name in enumerate(names) if way in cases[name]["ways"]]
        x = [found["ratio_to_base"]["decode"]["median"] for _, found in points]
        axes.plot(x, [place for place, _ in points], marker, color=colour, label=label, ms=6, alpha=0.9)
    axes.axvline(1, color=BASE, lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"], minor=False)
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("a decoding step over that of the base model")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
